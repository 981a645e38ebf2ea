"""table_of_runs.py: recipes over their seeds, from the results.json of made runs."""

import json

import pytest

import config
from research import table_of_runs
from utils import UserError


@pytest.fixture
def made(tmp_path):
    """A function that writes the results of a run that never was, and returns its folder."""

    def write(name, accuracies, **settings):
        folder = tmp_path / name / "results"
        folder.mkdir(parents=True)
        results = {
            "per_fold": [{"fold": fold, "accuracy": value} for fold, value in enumerate(accuracies)],
            "run": {"settings": {"model": config.MODEL, "epochs": config.EPOCHS, "seed": 0, **settings}},
        }
        (folder / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    return write


def test_seeds_are_averaged_and_errors_compared(made, monkeypatch, capsys):
    folders = [
        made("plain_s0", [0.5, 0.4], epochs=7, seed=0),
        made("plain_s1", [0.5, 0.6], epochs=7, seed=1),
        made("best_s0", [0.7, 0.6], seed=0),
        made("best_s2", [0.7, 0.8], seed=2) / "results",
        made("once", [0.2, 0.2], model="AudioCNN"),
    ]
    monkeypatch.setattr("sys.argv", ["table_of_runs", *map(str, folders), "--reference", str(folders[1])])
    table_of_runs.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["runs", "seeds", "fold 0", "fold 1", "mean", "± seeds", "errors", "different from config.py"]
    assert rows[2] == ["best", "2", "70.0 %", "70.0 %", "70.0 %", "7.1", "-40%", "as in config.py"]  # of 65 and 75
    assert rows[3] == ["plain", "2", "50.0 %", "50.0 %", "50.0 %", "7.1", "+0%", "epochs 7"]
    assert rows[4] == ["once", "1", "20.0 %", "20.0 %", "20.0 %", "–", "+60%", "model AudioCNN"]
    assert " – | as in config.py" in table_of_runs.make_table(table_of_runs.group_runs(folders))


def test_runs_that_can_not_be_compared_are_named(made, tmp_path):
    one, two, again = made("a", [0.5, 0.4]), made("b", [0.5]), made("c", [0.5, 0.5])
    damaged = made("d", [0.5, 0.4])
    (damaged / "results" / "results.json").write_text('{"run": [], "per_fold": 3}')
    for folders, named in (
        ([one, two], "tests the folds"),
        ([one, again], "same seed"),
        ([tmp_path], "no results.json"),
        ([damaged], "lacks settings"),
    ):
        with pytest.raises(UserError, match=named):
            table_of_runs.group_runs(folders)
    for name, accuracies in {"none": [], "nan": [float("nan")], "infinite": [float("inf")]}.items():
        with pytest.raises(UserError, match="lacks settings or accuracies"):
            table_of_runs.make_table(table_of_runs.group_runs([made(name, accuracies)]))
    with pytest.raises(UserError, match="is none of the runs"):
        table_of_runs.make_table(table_of_runs.group_runs([one]), reference=two)
