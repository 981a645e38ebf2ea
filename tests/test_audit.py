"""audit.py: each leak is planted in files that a training wrote, and the audit must name it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from result_files import read_rows, write_rows
from safetensors.torch import load_file

import data_loader
import model_file
import utils
from research import audit


@pytest.fixture(scope="module")
def honest(tmp_path_factory, random_data, scripts):
    """A finished training on 24 random clips of two classes: its assets folder. Read it, don't write."""
    assets = tmp_path_factory.mktemp("honest")
    random_data(assets / "data")
    done = scripts.run("train", "--epochs", 1, "--batch_size", 8, "--model", "AudioCNN", "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    assert "audit: nothing found in 24 clips of random and 6 files" in done.stdout
    return assets


@pytest.fixture
def assets(honest, tmp_path):
    """A copy of the honest run, to plant a leak in."""
    return shutil.copytree(honest, tmp_path / "assets")


def findings(assets):
    folders = {name: assets / name for name in ("checkpoints", "models", "results")}
    paths = SimpleNamespace(processed=assets / "data", **folders)
    return "\n".join(audit.audit(paths)[0])


def change_data(assets, change):
    """Write the processed files again after `change`, a function of (features, labels, clips)."""
    data = data_loader.load_processed(assets / "data")
    features, clips = data.features.copy(), data.clips.copy()
    change(features, data.labels, clips)
    data_loader.save_processed(assets / "data", features, clips, data.audio, "random")


def change_model(assets, tensors=None, **info):
    path = model_file.model_path(assets / "models", 0)
    model_file.save_model(path, {**load_file(path), **(tensors or {})}, {**model_file.load_model(path)[1], **info})


def test_damaged_files_of_checkpoints_and_of_the_model_of_all_clips_are_named(assets):
    folder = assets / "checkpoints" / "fold_1"
    shutil.copytree(folder, folder.with_name("fold_none"))
    (assets / "models" / "model_fold_none_best.safetensors").touch()
    paths = [folder / name for name in ("epoch_1.pt", "best_model_this_fold.pt", "epoch_1.safetensors")]
    paths.append(folder.with_name("fold_none") / "epoch_1.pt")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    found = findings(assets)
    assert all(f"{path} is damaged (" in found for path in paths)
    assert "the model file of fold none is not of the run" in found


def copy_a_test_clip(features, labels, clips):
    features[-1] = features[0]


def write_labels_into_a_cell(features, labels, clips):
    features[:, 127, 172] = 10 * labels


def swap_folds(features, labels, clips):
    clips["fold"] = [3, *clips["fold"][1:-1], 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (copy_a_test_clip, "in several folds, 2 clips in all, such as 0-0-0-0.wav (fold 1), 23-1-0-0.wav (fold 3)"),
        (write_labels_into_a_cell, "mel band 127, frame 172 alone tells the class"),
        (swap_folds, "was not trained on the clips of folds"),
    ],
)
def test_leak_in_the_data_is_named(assets, change, named):
    change_data(assets, change)
    assert named in findings(assets)


def test_model_that_trained_on_its_test_fold_is_named(assets):
    data = data_loader.load_processed(assets / "data")
    mean, std = data_loader.band_statistics(data.features, range(24))
    digest = data_loader.names_digest(data.clips, range(24))
    change_model(assets, training_folds=[1, 2, 3], training_digest=digest)
    assert "trained on clips of the fold that tests it" in findings(assets)
    change_model(assets, {"band_mean": torch.tensor(mean), "band_std": torch.tensor(std)})
    assert "not normalised" not in findings(assets)


def test_normalisation_with_different_clips_is_named(assets):
    network, _ = model_file.load_model(model_file.model_path(assets / "models", 0))
    change_model(assets, {name: network.get_buffer(name) + 1 for name in ("band_mean", "band_std")})
    found = findings(assets)
    for name in ("band_mean", "band_std"):
        assert f"not normalised by its own training clips: {name} is up to 1 dB off" in found


@pytest.mark.parametrize("numbers", ["1, 2", [1.5]])
def test_model_with_untrusted_metadata_is_a_finding(assets, numbers):
    change_model(assets, class_names=["siren", "dog_bark"], training_folds=numbers)
    found = findings(assets)
    assert "has the classes ['siren', 'dog_bark']" in found and "does not say on which folds" in found


def test_damaged_model_and_predictions_are_findings(assets):
    model_file.model_path(assets / "models", 0).write_bytes(b"half")
    (assets / "results" / "predictions_fold_1.csv").write_text("half")
    found = findings(assets)
    assert "model_fold_0_best.safetensors" in found and "predictions_fold_1.csv lacks" in found


@pytest.mark.parametrize(
    ("file", "harm", "named"),
    [
        (
            "models/model_fold_1_best.safetensors",
            Path.unlink,
            "the model file of fold 1 is missing: run python train.py",
        ),
        ("results/predictions_fold_0.csv", Path.unlink, "the predictions file of fold 0 is missing"),
        (
            "results/history_fold_0.csv",
            lambda path: path.write_text("x"),
            "the history file of fold 0 is not of the run",
        ),
    ],
)
def test_missing_or_edited_file_of_a_run_is_a_finding(assets, file, harm, named):
    harm(assets / file)
    assert named in findings(assets)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: [rows[0], *([r[0], r[1], r[3], r[2]] for r in rows[1:])], "is not what its model predicts"),
        (lambda rows: rows[:-1], "does not test the clips of its fold once each: 1 differ"),
        (lambda rows: [*rows, rows[-1]], "does not test the clips of its fold once each: 1 differ"),
        (lambda rows: [rows[0], [rows[1][0], "1", *rows[1][2:]], *rows[2:]], "a different classID than the data"),
        (lambda rows: [["slice_file_name", "classID", "siren", "dog_bark"], *rows[1:]], "has the columns"),
    ],
)
def test_predictions_that_are_not_the_models_are_named(assets, change, named):
    path = assets / "results" / "predictions_fold_0.csv"
    write_rows(path, change(read_rows(path)))
    assert named in findings(assets)


def test_command_ends_with_1_if_there_is_a_finding(assets, monkeypatch, capsys):
    utils.save_pickle(assets / "data" / "class_mapping.pkl", {0: "siren", 1: "dog_bark"})
    monkeypatch.setattr("sys.argv", ["audit", "--assets_dir", str(assets)])
    with pytest.raises(SystemExit, match="1"):
        audit.main()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("audit: ") and "class_mapping" in printed.err
