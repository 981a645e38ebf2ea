"""tables.py: what the report says, 'optimistic' where it must, and that files can't write markup into it."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from result_files import CLASSES, read_rows, write_clips, write_rows, write_run

import evaluate
from reports import metrics, tables
from reports.metrics import OPTIMISTIC

PICTURES = ["confusion_matrix.png", "per_class.png", "reliability.png", "curves.png"]


def report(folder, processed_dir=None):
    """Return (results, text of the report), without the second that drawing takes."""
    results = {**metrics.read_results(folder, processed_dir), "files": []}
    return results, tables.report_text(results)


def test_table_aligns_and_escapes():
    assert tables.table(["a|b", "n"], [["x", None], ["long\nname", 7], ["*b* `c` _d_ e_f", 0]]).splitlines() == [
        "| a\\|b                  |   n |",
        "| --------------------- | --: |",
        "| x                     |   – |",
        "| long name             |   7 |",
        "| \\*b\\* \\`c\\` \\_d\\_ e_f |   0 |",
    ]


@pytest.mark.parametrize("validation", ["test_fold", "next_fold"])
def test_optimistic_is_said_everywhere_or_nowhere(tmp_path, capsys, validation):
    folder = write_run(tmp_path / "run", validation=validation)
    is_optimistic = validation == "test_fold"
    results = tables.write_report(folder)
    printed = capsys.readouterr().out
    assert results["optimistic"] is is_optimistic and results["note"] == (OPTIMISTIC if is_optimistic else None)
    text = (folder / "report.md").read_text()
    comparison, _ = evaluate.compare(write_run(tmp_path / "honest"), folder)
    titles = [line for line in (text + comparison).splitlines() if line.startswith("#")]
    assert len(titles) == 7 + 2
    titles += [line for line in printed.splitlines() if line.startswith(("Folds", "3 folds"))]
    for name in PICTURES:
        with Image.open(folder / name) as image:
            titles.append(image.text["Title"])
    assert len(titles) == 9 + 2 + 4 and all((OPTIMISTIC in title) == is_optimistic for title in titles)
    assert f"protocol {validation}" in printed and f"protocol {validation}" in text


def test_unknown_protocol_is_not_called_honest(tmp_path):
    folder = write_run(tmp_path)
    (folder / "run.json").unlink()
    results, text = report(folder)
    assert results["protocol"] is None and results["optimistic"] is None
    assert [row["best_epoch"] for row in results["per_fold"]] == [None] * 3
    assert "may be higher than the truth" in text


def test_part_of_the_folds_is_named_as_a_part(tmp_path):
    folder, data = write_run(tmp_path / "results", folds=[0, 4]), write_clips(tmp_path / "data")
    results, text = report(folder, data)
    assert [(row["fold"], row["dataset_fold"]) for row in results["per_fold"]] == [(0, 1), (4, 5)]
    assert "2 of 10 folds, 60 of 300 clips" in text and "all folds of the whole data set" in text
    (folder / "predictions_fold_4.csv").unlink()
    results, text = report(folder, data)
    assert results["accuracy_std"] is None and results["accuracy_interval_95"] is None
    assert "one fold, so no spread" in text and "1 of 10 folds, 30 of 300 clips" in text


def test_temperature_is_in_the_report_only_if_every_fold_has_one(tmp_path):
    results, text = report(write_run(tmp_path, temperatures={"0": 2.0, "1": 0.5, "2": 1.5}))
    assert results["confidence"]["before"]["ece"] != results["confidence"]["after"]["ece"]
    assert f"{100 * results['confidence']['after']['ece']:.1f} % with each fold's temperature (0.50 to 2.00)" in text
    assert "Not every fold here has a temperature" in report(write_run(tmp_path, temperatures={"0": 2.0}))[1]


def test_folds_that_are_all_right_have_no_confusions(tmp_path):
    folder = write_run(tmp_path)
    for path in folder.glob("predictions_fold_*.csv"):
        header, *rows = read_rows(path)
        write_rows(path, [header, *([row[0], row[1], *np.eye(3)[int(row[1])]] for row in rows)])
    results, text = report(folder)
    assert results["accuracy_interval_95"] == [1, 1] and results["worst_confusions"] == []
    assert "Every clip was classified right" in text


def test_class_without_clips_has_a_dash_and_no_warning(tmp_path):
    folder = write_run(tmp_path, missing=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = tables.write_report(folder)
    scores = results["per_class"][CLASSES[0]]
    assert scores["recall"] is None and scores["f1"] is None and scores["clips"] == 0
    text = (folder / "report.md").read_text()
    assert "nan" not in ((folder / "results.json").read_text() + text).lower() and "|      – |" in text


def test_text_of_files_stays_text_in_the_report(tmp_path):
    settings = {"note": "a | b\n# Title\n\x1b[2J", "link": "[x](http://y)", "nested": {"deep": [1]}}
    folder = write_run(tmp_path, settings=settings)
    for path in folder.glob("predictions_fold_*.csv"):
        path.write_text(path.read_text().replace("siren", "<b>*siren*</b>"))
    _, text = report(folder)
    assert "\\<b\\>\\*siren\\*\\</b\\>" in text and "<b>" not in text.replace("\\<", "")
    assert "a \\| b # Title" in text and "\n# Title" not in text and "\x1b" not in text
    assert "\\[x\\](http://y)" in text


def test_second_report_has_no_picture_of_the_first_that_it_can_not_draw(tmp_path, capsys):
    folder = write_run(tmp_path)
    (folder / "per_class.png").mkdir()  # in the way of a file
    (folder / "curves.png").write_bytes(b"of an earlier run")
    for path in folder.glob("history_fold_*.csv"):
        path.unlink()
    results = tables.write_report(folder)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"warning: {folder / 'per_class.png'} is not drawn: ")
    assert results["files"] == ["results.json", "report.md", "confusion_matrix.png", "reliability.png"]
    assert json.loads((folder / "results.json").read_text()) == results
    text = (folder / "report.md").read_text()
    assert "curves.png" not in text and "per_class.png" not in text and not (folder / "curves.png").exists()
