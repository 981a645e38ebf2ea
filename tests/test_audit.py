"""audit.py: each leak is planted in files that a training wrote, and must be named."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data_loader
import model
from research import audit


@pytest.fixture(scope="module")
def honest(tmp_path_factory, random_data, run_script):
    """A finished two-epoch training on 24 random clips of two classes: its assets folder."""
    assets = tmp_path_factory.mktemp("honest")
    random_data(assets / "data")
    done = run_script("train.py", "--epochs", "2", "--batch_size", "8", "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    assert "audit: nothing found in 24 clips and 6 files" in done.stdout
    return assets


@pytest.fixture
def assets(honest, tmp_path):
    """A copy of the honest run, to plant a leak in."""
    return shutil.copytree(honest, tmp_path / "assets")


def findings(assets):
    paths = SimpleNamespace(processed=assets / "data", models=assets / "models", results=assets / "results")
    return audit.audit(paths)[0]


def save_again(assets, features=None, folds=None):
    """Write the processed files again with other features or folds."""
    data = data_loader.load_processed(assets / "data")
    features = data.features if features is None else features
    folds = data.folds if folds is None else folds
    data_loader.save_processed(assets / "data", features, data.clips.assign(fold=folds), data.audio, "random")


def rewrite_model(assets, weights=None, **changes):
    path = model.model_path(assets / "models", 0)
    _, info = model.load_model(path)
    model.save_model(path, {**load_file(path), **(weights or {})}, {**info, **changes})


def test_an_honest_run_has_no_finding(assets):
    assert findings(assets) == []


def test_copies_without_end_take_a_few_lines(assets):
    data = data_loader.load_processed(assets / "data")
    save_again(assets, features=np.concatenate([data.features[:12], data.features[:12]]))
    several = [finding for finding in findings(assets) if "same features" in finding]
    assert len(several) == audit.SHOWN + 1
    assert several[-1].endswith(f"{12 - audit.SHOWN} more groups of clips")
    save_again(assets, features=np.repeat(data.features[:1], 24, axis=0))
    (one,) = [finding for finding in findings(assets) if "same features" in finding]
    assert one.endswith(f"and {24 - audit.SHOWN} more") and one.count(".wav") == audit.SHOWN


def test_test_clip_copied_into_another_fold(assets):
    data = data_loader.load_processed(assets / "data")
    features = data.features.copy()
    features[-1] = features[0]  # a clip of fold 1 under a name of fold 3
    save_again(assets, features)
    assert any("0-0-0-0.wav (fold 1), 23-1-0-0.wav (fold 3)" in finding for finding in findings(assets))


def test_label_in_the_features(assets):
    data = data_loader.load_processed(assets / "data")
    features = data.features.copy()
    features[:, 127, 172] = 10 * data.labels
    save_again(assets, features)
    assert any("mel band 127, frame 172" in finding for finding in findings(assets))


def test_training_on_the_test_fold(assets):
    data = data_loader.load_processed(assets / "data")
    everything = np.arange(len(data.labels))
    rewrite_model(assets, training_folds=[1, 2, 3], training_digest=data_loader.names_digest(data.clips, everything))
    assert any("trained on clips of the fold that tests it" in finding for finding in findings(assets))


def test_training_on_clips_that_moved_in_from_the_test_fold(assets):
    data = data_loader.load_processed(assets / "data")
    folds = data.folds.copy()
    folds[0], folds[-1] = folds[-1], folds[0]
    save_again(assets, folds=folds)
    assert any("was not trained on the clips of folds" in finding for finding in findings(assets))


def test_normalisation_from_the_test_fold(assets):
    data = data_loader.load_processed(assets / "data")
    mean, _ = data_loader.band_statistics(data.features, np.arange(len(data.labels)))
    rewrite_model(assets, {"band_mean": torch.from_numpy(mean)})
    assert any("not normalised by its own training clips: band_mean" in finding for finding in findings(assets))


def test_permuted_class_mapping_in_the_model(assets):
    rewrite_model(assets, class_names=["siren", "dog_bark"])
    assert any("has the classes ['siren', 'dog_bark']" in finding for finding in findings(assets))


def edit_predictions(assets, change):
    path = assets / "results" / "predictions_fold_0.csv"
    with open(path, newline="") as file:
        rows = change(list(csv.reader(file)))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: [rows[0], *([r[0], r[1], r[3], r[2]] for r in rows[1:])], "is not what its model predicts"),
        (lambda rows: rows[:-1], "does not test the clips of its fold once each: 1 differ"),
        (lambda rows: [*rows, rows[-1]], "does not test the clips of its fold once each"),
        (lambda rows: [rows[0], [rows[1][0], "1", *rows[1][2:]], *rows[2:]], "has a different classID than the data"),
        (lambda rows: [["slice_file_name", "classID", "siren", "dog_bark"], *rows[1:]], "has the columns"),
    ],
)
def test_predictions_that_are_not_the_models(assets, change, named):
    edit_predictions(assets, change)
    assert any(named in finding for finding in findings(assets))


def test_command_line_exit_status_is_0_or_1(assets, run_script):
    done = run_script("research/audit.py", "--assets_dir", assets)
    assert done.returncode == 0
    assert done.stdout.startswith("audit: nothing found")
    model.model_path(assets / "models", 0).write_bytes(b"half")
    done = run_script("research/audit.py", "--assets_dir", assets)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "is not a readable safetensors file" in line
