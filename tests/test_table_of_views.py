"""table_of_views.py: the branches of AudioViews, alone and together, against one clip at a time."""

import itertools

import numpy as np
import pytest
import torch
from untrained import write_model

import batches
import data_loader
import demo_data
import model


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """The processed files of 40 random clips of the ten classes in two folds, unlike each other."""
    folder = tmp_path_factory.mktemp("processed")
    audio, rng = data_loader.AudioSettings(), np.random.default_rng(0)
    clips = [
        {
            "slice_file_name": f"{index}.wav",
            "fsID": index,
            "start": 0,
            "end": 4,
            "salience": 1,
            "fold": 1 + index % 2,
            "classID": index % 10,
            "class": demo_data.CLASS_NAMES[index % 10],
        }
        for index in range(40)
    ]
    shapes = [(40, 1, 1), (40, 192, 1), (40, 1, 173), (40, 192, 173)]
    features = sum(rng.normal(-10, 10, shape) for shape in shapes).astype("float16")
    data_loader.save_processed(folder, features, clips, audio, "random")
    return folder


def test_each_row_is_the_accuracy_of_its_branches(processed, scripts, run_script, tmp_path):
    data = data_loader.load_processed(processed)
    paths = [write_model(tmp_path / "run" / "models", fold, model="AudioViews") for fold in (0, 1)]
    done = run_script("table_of_views.py", tmp_path / "run", "--processed_dir", processed)
    assert done.returncode == 0, done.stderr
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert header == ["views", "fold 0", "fold 1", "mean"]
    assert [row[0] for row in rows] == [
        " + ".join(names) for count in (1, 2, 3) for names in itertools.combinations(model.VIEWS, count)
    ]
    wanted = []
    for fold, path in enumerate(paths):
        network, info = model.load_model(path)
        right = []
        for clip in np.flatnonzero(data.folds == fold + 1):
            x = batches.normalise(torch.from_numpy(data.features[clip][None]), batches.statistics_of(info))
            level = x[:, :, :128, :172].unflatten(3, (43, 4)).mean(dim=4)
            fine = torch.stack([x[:, :, 128:160], x[:, :, 160:]], dim=4).flatten(3)
            seen = level, model.without_mean(level, 3), model.without_mean(fine, 2)
            with torch.inference_mode():
                logits = [branch(view)[0] for branch, view in zip(network.branches.values(), seen, strict=True)]
                assert network(x).argmax() == sum(logits).argmax()
            right.append(
                [
                    sum(chosen).argmax() == data.labels[clip]
                    for count in (1, 2, 3)
                    for chosen in itertools.combinations(logits, count)
                ]
            )
        wanted.append(100 * np.mean(right, axis=0))
    for row, shares in zip(rows, zip(*wanted, strict=True), strict=True):
        assert row[1:3] == [f"{share:.1f} %" for share in shares]
        assert float(row[3].split()[0]) == pytest.approx(np.mean(shares), abs=0.06)
    assert len({tuple(row[1:]) for row in rows}) > 2  # the branches do not answer alike


def test_what_has_no_branches_is_named(processed, scripts, tmp_path):
    done = scripts.run("table_of_views", tmp_path, "--processed_dir", processed)
    assert done.returncode == 2 and "no models in" in done.stderr
    write_model(tmp_path / "models", 0)
    done = scripts.run("table_of_views", tmp_path, "--processed_dir", processed)
    assert done.returncode == 2 and "is AudioCNN, which has no branches" in done.stderr
    write_model(tmp_path / "models", 7, model="AudioViews")
    model.model_path(tmp_path / "models", 0).unlink()
    done = scripts.run("table_of_views", tmp_path, "--processed_dir", processed)
    assert done.returncode == 2 and "no clips of fold 7" in done.stderr
    info = model.load_model(model.model_path(tmp_path / "models", 7))[1] | {"fold": "7"}  # a stranger's
    state = model.build_model("AudioViews", len(info["class_names"]), data_loader.AudioSettings()).state_dict()
    model.save_model(model.model_path(tmp_path / "models", 7), state, info)
    done = scripts.run("table_of_views", tmp_path, "--processed_dir", processed)
    assert done.returncode == 2 and "does not say which fold it tests" in done.stderr
