"""table_of_runs.py: recipes over their seeds, as numbers of real trainings and of made ones."""

import json

import pytest

import config
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
    assert best["different from config.py"] == "as in config.py" and plain["different from config.py"] == "epochs 7"
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
    assert row["different from config.py"] == "validation none, epochs 1"
