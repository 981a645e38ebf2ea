"""tables.py: what the report says, 'optimistic' where it must, and that files can't write markup into it."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from result_files import CLASSES, read_rows, write_clips, write_rows, write_run

import evaluate
from reports import tables
from reports.metrics import OPTIMISTIC

PICTURES = ["confusion_matrix.png", "per_class.png", "reliability.png", "curves.png"]


def title_of(picture):
    with Image.open(picture) as image:
        return image.text["Title"]


def test_table_aligns_and_escapes():
    assert tables.table(["a|b", "n"], [["x", None], ["long\nname", 7], ["*b* `c` _d_ e_f", 0]]).splitlines() == [
        "| a\\|b                  |   n |",
        "| --------------------- | --: |",
        "| x                     |   – |",
        "| long name             |   7 |",
        "| \\*b\\* \\`c\\` \\_d\\_ e_f |   0 |",
    ]


@pytest.mark.parametrize("validation", ["test_fold", "next_fold", "none"])
def test_optimistic_is_said_everywhere_or_nowhere(tmp_path, capsys, validation):
    folder = write_run(tmp_path / "run", validation=validation)
    is_optimistic = validation == "test_fold"
    results = tables.write_report(folder)
    printed = capsys.readouterr().out
    assert results["optimistic"] is is_optimistic and results["note"] == (OPTIMISTIC if is_optimistic else None)
    text = (folder / "report.md").read_text()
    comparison, _ = evaluate.compare(write_run(tmp_path / "honest"), folder)
    headings = [line for line in (text + comparison).splitlines() if line.startswith("#")]
    assert len(headings) == 8 + 2
    titles = [*headings, *map(title_of, map(folder.joinpath, PICTURES)), printed.splitlines()[0]]
    titles.append(next(line for line in printed.splitlines() if line.startswith("3 folds")))
    assert all((OPTIMISTIC in title) == is_optimistic for title in titles)
    assert f"protocol {validation}" in printed and f"protocol {validation}" in text


def test_unknown_protocol_is_not_called_honest(tmp_path):
    folder = write_run(tmp_path)
    (folder / "run.json").unlink()
    results = tables.write_report(folder)
    assert results["protocol"] is None and results["optimistic"] is None
    assert [row["best_epoch"] for row in results["per_fold"]] == [None] * 3
    assert "may be higher than the truth" in (folder / "report.md").read_text()


def test_part_of_the_folds_is_named_as_a_part(tmp_path, capsys):
    folder = write_run(tmp_path / "results", folds=[0, 4])
    results = tables.write_report(folder, write_clips(tmp_path / "data"))
    assert [(row["fold"], row["dataset_fold"]) for row in results["per_fold"]] == [(0, 1), (4, 5)]
    text = (folder / "report.md").read_text()
    assert "2 of 10 folds, 60 of 300 clips" in text and "all folds of the whole data set" in text
    assert "2 of 10 folds, 60 of 300 clips" in capsys.readouterr().out


def test_one_fold_has_no_spread(tmp_path, capsys):
    results = tables.write_report(write_run(tmp_path, folds=[7]))
    assert results["accuracy_std"] is None and results["accuracy_interval_95"] is None
    assert "one fold, so no spread" in capsys.readouterr().out


def test_folds_that_are_all_right_have_no_confusions(tmp_path):
    folder = write_run(tmp_path)
    for path in folder.glob("predictions_fold_*.csv"):
        header, *rows = read_rows(path)
        write_rows(path, [header, *([row[0], row[1], *np.eye(3)[int(row[1])]] for row in rows)])
    results = tables.write_report(folder)
    assert results["accuracy_interval_95"] == [1, 1] and results["worst_confusions"] == []
    assert "every clip was classified right" in (folder / "report.md").read_text()


@pytest.mark.parametrize("missing", [0, 2])
def test_class_without_clips_has_a_dash_and_no_warning(tmp_path, missing):
    folder = write_run(tmp_path, missing=missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = tables.write_report(folder)
    scores = results["per_class"][CLASSES[missing]]
    assert scores["recall"] is None and scores["f1"] is None and scores["clips"] == 0
    assert "nan" not in ((folder / "results.json").read_text() + (folder / "report.md").read_text()).lower()


def test_report_has_recordings_and_temperatures_only_where_there_are_some(tmp_path):
    folder = write_run(tmp_path / "results", temperatures={"0": 2.0, "1": 0.5, "2": 1.5})
    results = tables.write_report(folder, write_clips(tmp_path / "data"))
    text = (folder / "report.md").read_text()
    assert f"cut from {results['recordings']['count']:,} recordings" in text
    assert f"{100 * results['confidence']['after']['ece']:.1f} % with each fold's temperature" in text
    tables.write_report(write_run(tmp_path / "results"))
    text = (folder / "report.md").read_text()
    assert "## Recordings" not in text and "Not every fold here has a temperature" in text


def test_second_report_has_the_same_bytes_and_no_curves_of_an_earlier_run(tmp_path):
    folder = write_run(tmp_path, folds=[0, 1])
    tables.write_report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tables.write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for path in folder.glob("history_fold_*.csv"):
        path.unlink()
    assert "curves.png" not in tables.write_report(folder)["files"]
    assert not (folder / "curves.png").exists() and "curves.png" not in (folder / "report.md").read_text()


def test_text_of_files_stays_text_in_the_report(tmp_path, capsys):
    settings = {"note": "a | b\n# Title\n\x1b[2J", "link": "[x](http://y)", "nested": {"deep": [1]}}
    folder = write_run(tmp_path, settings=settings)
    for path in folder.glob("predictions_fold_*.csv"):
        path.write_text(path.read_text().replace("siren", "<b>*siren*</b>").replace("clip0_1.wav", "a|b`.wav"))
    tables.write_report(folder)
    text = (folder / "report.md").read_text()
    assert "\\<b\\>\\*siren\\*\\</b\\>" in text and "<b>" not in text.replace("\\<", "")
    assert "a \\| b # Title" in text and "\n# Title" not in text and "\x1b" not in text
    assert "\\[x\\](http://y)" in text
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_picture_that_fails_is_one_line_and_the_numbers_stay(tmp_path, capsys):
    folder = write_run(tmp_path)
    (folder / "curves.png").mkdir()  # in the way of a file
    results = tables.write_report(folder)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"warning: {folder / 'curves.png'} is not drawn: ")
    assert results["files"] == ["results.json", "report.md", *PICTURES[:3]]
    assert json.loads((folder / "results.json").read_text()) == results
