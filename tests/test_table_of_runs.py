"""table_of_runs.py: recipes over their seeds, as numbers of real trainings and of made ones."""

import json
import math

import numpy as np
import pytest

import config
from reports import metrics
from research import table_of_runs
from utils import UserError


@pytest.fixture
def made(tmp_path):
    """A function that writes the results of a run that never was, and returns its folder."""

    def write(name, accuracies, **settings):
        defaults = {"model": config.MODEL, "epochs": config.EPOCHS, "seed": 0}
        folder = tmp_path / name / "results"
        folder.mkdir(parents=True)
        results = {
            "per_fold": [{"fold": fold, "accuracy": value} for fold, value in enumerate(accuracies)],
            "run": {"settings": {**defaults, **settings}},
        }
        (folder / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    return write


def rows_of(table):
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_seeds_are_averaged_and_errors_compared(made):
    folders = [
        made("plain_s0", [0.5, 0.4], epochs=7, seed=0),
        made("plain_s1", [0.5, 0.6], epochs=7, seed=1),
        made("best_s0", [0.7, 0.6], seed=0),
        made("best_s2", [0.7, 0.8], seed=2),
        made("once", [0.2, 0.2], model="another"),
    ]
    table = table_of_runs.make_table(table_of_runs.group_runs(folders), reference=folders[1])
    best, plain, once = rows_of(table)
    assert [row["runs"] for row in (best, plain, once)] == ["best", "plain", "once"]
    assert (best["seeds"], best["fold 0"], best["fold 1"], best["mean"]) == ("2", "70.0 %", "70.0 %", "70.0 %")
    assert best["± seeds"] == "7.1" and once["± seeds"] == "–"  # of 0.65 and 0.75
    assert (best["errors"], plain["errors"], once["errors"]) == ("-40%", "+0%", "+60%")
    assert best["other than config.py"] == "as in config.py" and plain["other than config.py"] == "epochs 7"
    assert rows_of(table_of_runs.make_table(table_of_runs.group_runs(folders)))[0]["errors"] == "–"


def test_what_can_not_be_compared_is_named(made, tmp_path):
    one, two, again = made("a", [0.5, 0.4]), made("b", [0.5]), made("c", [0.5, 0.5])
    for folders, named in (
        ([one, two], "tests the folds"),
        ([one, again], "same seed"),
        ([tmp_path], "no results.json"),
    ):
        with pytest.raises(UserError, match=named):
            table_of_runs.group_runs(folders)
    with pytest.raises(UserError, match="is none of the runs"):
        table_of_runs.make_table(table_of_runs.group_runs([one]), reference=two)


def test_networks_together_outvote_the_one_that_is_wrong(tmp_path):
    """Two of three are right about each clip, and the third is wrong, less surely."""
    folders = []
    for seed in range(3):
        results = tmp_path / f"r_s{seed}" / "results"
        results.mkdir(parents=True)
        (results / "results.json").write_text("{}")
        lines = ["slice_file_name,classID,a,b,c"]
        for clip in range(6):
            row = [0.2, 0.2, 0.2]
            row[clip % 3] = 0.6
            if clip % 3 == seed:
                row = [0.25, 0.25, 0.25]
                row[clip % 3], row[(clip + 1) % 3] = 0.35, 0.4
            lines.append(f"{clip}.wav,{clip % 3},{','.join(map(str, row))}")
        (results / "predictions_fold_0.csv").write_text("\n".join(lines) + "\n")
        folders.append(tmp_path / f"r_s{seed}")
    assert [table_of_runs.more_of([folder])[2] for folder in folders] == ["66.7 %"] * 3
    assert table_of_runs.more_of(folders)[2] == "100.0 %"
    first = folders[0] / "results" / "predictions_fold_0.csv"
    first.write_text(first.read_text().replace("5.wav", "6.wav"))
    with pytest.raises(UserError, match="other clips"):
        table_of_runs.more_of(folders)


@pytest.mark.parametrize("sureness", [0.3, 1, 3])
def test_likelihood_is_the_entropy_of_probabilities_that_are_true_however_sure_they_sound(sureness):
    """Two classes, said with 80 % and right in 80 % of the clips: less than log 2, and more than nothing."""
    true = np.arange(10) % 2
    said = np.where(np.arange(10) < 2, 1 - true, true)  # eight of ten are right
    probabilities = np.where(said[:, None] == [0, 1], 0.8, 0.2) ** sureness
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    run = metrics.Predictions(["a", "b"], list(range(10)), true, true, probabilities, {})
    assert table_of_runs.likelihood(run) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2), abs=1e-6)


def test_command_line_on_trainings(data, scripts, run_script, tmp_path):
    for seed in (0, 1):
        flags = ("--folds", 0, "--epochs", 1, "--validation", "none", "--seed", seed, "--processed_dir", data)
        done = scripts.run("train", *flags, "--assets_dir", tmp_path / f"short_s{seed}")
        assert done.returncode == 0, done.stderr
    folders = [tmp_path / "short_s0", tmp_path / "short_s1" / "results"]
    done = run_script("research/table_of_runs.py", *folders, "--reference", folders[0])
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(done.stdout)
    assert row["seeds"] == "2" and row["errors"] == "+0%"
    assert "likelihood" not in row
    predictions = [metrics.read_predictions(tmp_path / f"short_s{seed}" / "results") for seed in (0, 1)]
    product = predictions[0].probabilities * predictions[1].probabilities
    right = (product.argmax(axis=1) == predictions[0].true).mean()
    (row,) = rows_of(run_script("research/table_of_runs.py", *folders, "--more").stdout)
    assert row["together"] == f"{100 * right:.1f} %"
    recordings = [
        json.loads((tmp_path / f"short_s{seed}" / "results" / "results.json").read_text())["recordings"]["accuracy"]
        for seed in (0, 1)
    ]
    assert row["recordings"] == f"{50 * sum(recordings):.1f} %"
    assert 0 < float(row["likelihood"]) < 3
    assert "epochs 1" in row["other than config.py"] and "validation none" in row["other than config.py"]
