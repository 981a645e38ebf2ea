import csv
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

import evaluate
from reports import metrics, tables
from utils import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "evaluate.py"
CLASSES = ["siren", "dog_bark", "drilling"]
PICTURES = ["confusion_matrix.png", "per_class.png", "reliability.png", "curves.png"]
LABEL = "optimistic: epoch chosen on the test fold"
CLIPS_A_FOLD = 30


def class_of(clip, missing):
    return clip % 3 if clip % 3 != missing else (missing + 1) % 3


def write_run(folder, folds=(0, 1, 2), validation="next_fold", seed=0, missing=None, history=True):
    """Write what train.py leaves of a run: 30 clips a fold, right in two of three cases; class `missing` has none."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for fold in folds:
        rows = [["slice_file_name", "classID", *CLASSES]]
        for clip in range(CLIPS_A_FOLD):
            true = class_of(clip, missing)
            logits = rng.normal(0, 1, 3) + 1.5 * (np.arange(3) == true)
            shares = np.exp(logits) / np.exp(logits).sum()
            rows.append([f"clip{fold}_{clip}.wav", true, *(f"{share:.6f}" for share in shares)])
        write_rows(folder / f"predictions_fold_{fold}.csv", rows)
        if history:
            columns = ["epoch", "learning_rate"]
            columns += ["train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
            empty = validation == "none"
            epochs = [[e, 0.01, 2 / e, 1 - 0.5 / e, "" if empty else 2.5 / e, "" if empty else 0.4] for e in (1, 2, 3)]
            write_rows(folder / f"history_fold_{fold}.csv", [columns, *epochs])
    run = {"validation": validation, "model": "AudioCNN", "best_epochs": {str(fold): 2 for fold in folds}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def write_clips(folder, folds=range(10), missing=None):
    """Write clips.csv for the same clips; every third is in the background."""
    columns = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
    rows = []
    for fold in folds:
        for clip in range(CLIPS_A_FOLD):
            true = class_of(clip, missing)
            salience = 2 if clip < 10 else 1
            rows.append([f"clip{fold}_{clip}.wav", clip, 0, 4, salience, fold + 1, true, CLASSES[true]])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "clips.csv", [columns, *rows])
    return folder


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def raw_predictions(folder, fold):
    """Return (true, predicted) as plain columns, read without the project's code."""
    rows = read_rows(folder / f"predictions_fold_{fold}.csv")[1:]
    return [int(row[1]) for row in rows], [int(np.argmax([float(value) for value in row[2:]])) for row in rows]


def title_of(picture):
    with Image.open(picture) as image:
        return image.text["Title"]


def run_script(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


# --- Values ------------------------------------------------------------------------------------------------------


def test_results_equal_scikit_learns(tmp_path):
    folder = write_run(tmp_path / "results")
    results = tables.read_results(folder, write_clips(tmp_path / "data"))
    folds = [raw_predictions(folder, fold) for fold in range(3)]
    true, predicted = (np.concatenate([fold[part] for fold in folds]) for part in (0, 1))
    accuracies = [reference.accuracy_score(*fold) for fold in folds]
    assert [row["accuracy"] for row in results["per_fold"]] == pytest.approx(accuracies)
    assert [row["macro_f1"] for row in results["per_fold"]] == pytest.approx(
        [reference.f1_score(*fold, average="macro") for fold in folds]
    )
    assert results["accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert results["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert results["accuracy_all_clips"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert results["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
    assert results["confusion_matrix"] == reference.confusion_matrix(true, predicted).tolist()
    expected = reference.classification_report(true, predicted, target_names=CLASSES, output_dict=True)
    for name in CLASSES:
        scores = results["per_class"][name]
        assert scores["f1"] == pytest.approx(expected[name]["f1-score"])
        assert scores["clips"] == expected[name]["support"]
    background = np.tile(np.arange(CLIPS_A_FOLD) < 10, 3)
    assert results["background_accuracy"] == pytest.approx((true == predicted)[background].mean())
    assert results["foreground_accuracy"] == pytest.approx((true == predicted)[~background].mean())
    assert (results["background_clips"], results["foreground_clips"]) == (30, 60)


def test_agreement_of_folds(tmp_path):
    folder = write_run(tmp_path)
    agreement = tables.write_report(folder)["agreement"]
    recalls = np.array([reference.recall_score(*raw_predictions(folder, fold), average=None) for fold in range(3)])
    spreads = recalls.std(axis=0, ddof=1)
    for column, name in enumerate(CLASSES):
        assert agreement["per_class"][name]["recall"] == pytest.approx(recalls[:, column])
        assert agreement["per_class"][name]["recall_std"] == pytest.approx(spreads[column])
    assert agreement["most_varied_class"] == CLASSES[spreads.argmax()]
    assert f"that of {CLASSES[spreads.argmax()]} most" in (folder / "report.md").read_text()


def test_folds_that_are_all_right_show_no_spread(tmp_path):
    folder = write_run(tmp_path, history=False)
    for path in folder.glob("predictions_fold_*.csv"):
        header, *rows = read_rows(path)
        write_rows(path, [header, *([row[0], row[1], *np.eye(3)[int(row[1])]] for row in rows)])
    results = tables.write_report(folder)
    assert results["accuracy_interval_95"] == [1, 1] and results["worst_confusions"] == []
    assert results["agreement"]["most_varied_class"] is None
    text = (folder / "report.md").read_text()
    assert "every clip was classified right" in text and "No class has a recall that differs" in text


def test_class_ids_come_from_the_table_not_from_the_columns(tmp_path):
    folder, data = write_run(tmp_path / "results", folds=[0]), write_clips(tmp_path / "data")
    before = tables.read_results(folder, data)
    for path in (folder / "predictions_fold_0.csv", data / "clips.csv"):
        rows = read_rows(path)
        column = rows[0].index("classID")
        for row in rows[1:]:
            row[column] = str({0: 2, 1: 5, 2: 9}[int(row[column])])
        write_rows(path, rows)
    assert tables.read_results(folder, data) == before


# --- Confidence --------------------------------------------------------------------------------------------------


def set_temperatures(folder, temperatures):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "temperatures": temperatures}))


def test_confidence_before_and_after_the_temperatures(tmp_path):
    folder, temperatures = write_run(tmp_path), {"0": 2.0, "1": 0.5, "2": 1.0}
    set_temperatures(folder, temperatures)
    values = tables.write_report(folder)["confidence"]
    confidence, right = {"before": [], "after": []}, []
    for fold in range(3):
        shares = np.array([row[2:] for row in read_rows(folder / f"predictions_fold_{fold}.csv")[1:]], float)
        powers = shares ** (1 / temperatures[str(fold)])
        confidence["before"] += shares.max(axis=1).tolist()
        confidence["after"] += (powers / powers.sum(axis=1, keepdims=True)).max(axis=1).tolist()
        right += [true == guess for true, guess in zip(*raw_predictions(folder, fold), strict=True)]
    for name in ("before", "after"):
        expected = {}
        for sure, is_right in zip(confidence[name], right, strict=True):
            expected.setdefault(int(np.ceil(15 * sure)) - 1, []).append(sure - is_right)
        error = sum(abs(sum(gaps)) for gaps in expected.values()) / len(right)
        assert values[name]["ece"] == pytest.approx(error)
        assert values[name]["answered"][0]["accuracy"] == pytest.approx(np.mean(right))
    assert [row["temperature"] for row in values["per_fold"]] == [2.0, 0.5, 1.0]
    same = values["per_fold"][2]
    assert same["ece_after"] == pytest.approx(same["ece_before"]) and values["before"]["ece"] != values["after"]["ece"]
    text = (folder / "report.md").read_text()
    assert f"{100 * values['after']['ece']:.1f} % with each fold's temperature" in text
    assert "(reliability.png)" in text and "temperatures" not in text


@pytest.mark.parametrize("temperatures", [{}, {"0": 1.5, "1": 1.5}])
def test_without_every_folds_temperature_there_is_only_before(tmp_path, temperatures):
    folder = write_run(tmp_path, validation="next_fold" if temperatures else "none")
    set_temperatures(folder, temperatures)
    values = tables.write_report(folder)["confidence"]
    assert values["after"] is None and values["before"]["ece"] > 0
    assert values["per_fold"][2]["ece_after"] is None
    assert (values["per_fold"][0]["ece_after"] is None) == (not temperatures)
    assert "Not every fold here has a temperature" in (folder / "report.md").read_text()


def test_confident_and_wrong_shows_in_the_calibration_error(tmp_path):
    folder = write_run(tmp_path, folds=[0])
    path = folder / "predictions_fold_0.csv"
    header, *rows = read_rows(path)
    write_rows(path, [header, *([row[0], row[1], "1", "0", "0"] for row in rows)])  # a third of the clips is a siren
    values = tables.read_results(folder)["confidence"]["before"]
    assert values["ece"] == pytest.approx(2 / 3)
    assert {row["least_confidence"] for row in values["answered"]} == {1.0}


# --- What part of the data set the results speak for --------------------------------------------------------------


def test_part_of_the_folds(tmp_path, capsys):
    folder = write_run(tmp_path / "results", folds=[0, 4])
    results = tables.write_report(folder, write_clips(tmp_path / "data"))
    assert [(row["fold"], row["dataset_fold"]) for row in results["per_fold"]] == [(0, 1), (4, 5)]
    assert (results["folds_present"], results["folds_total"], results["clips"], results["clips_total"]) == (
        2,
        10,
        60,
        300,
    )
    assert "2 of 10 folds, 60 of 300 clips" in (folder / "report.md").read_text()
    assert "2 of 10 folds, 60 of 300 clips" in capsys.readouterr().out


def test_one_fold_has_no_spread(tmp_path, capsys):
    folder = write_run(tmp_path, folds=[7])
    results = tables.write_report(folder)
    assert results["accuracy_std"] is None and results["accuracy_interval_95"] is None
    assert results["agreement"]["most_varied_class"] is None
    assert "one fold, so no spread" in capsys.readouterr().out


def test_report_has_the_recordings_where_the_table_tells_them(tmp_path):
    folder, clips = write_run(tmp_path / "results"), write_clips(tmp_path / "data")
    results = tables.write_report(folder, clips)
    text = (folder / "report.md").read_text()
    assert f"cut from {results['recordings']['count']:,} recordings" in text
    wrong = sum(true != guess for fold in range(3) for true, guess in zip(*raw_predictions(folder, fold), strict=True))
    assert f"of the {wrong} errors" in text
    worst = results["recordings"]["most_errors"][0]
    assert f"| {worst['recording']} " in text
    tables.write_report(folder)
    assert "## Recordings" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("clips_of_another_set", [False, True])
def test_without_a_fitting_table_no_salience_is_claimed(tmp_path, clips_of_another_set):
    folder = write_run(tmp_path / "results")
    data = write_clips(tmp_path / "data", folds=[0, 1])  # lacks the clips of fold 2
    results = tables.read_results(folder, data if clips_of_another_set else tmp_path)
    assert results["clips_total"] is None and results["folds_total"] is None
    assert results["foreground_accuracy"] is None and results["background_accuracy"] is None


@pytest.mark.parametrize("missing", [0, 2])
def test_class_without_clips(tmp_path, missing):
    folder = write_run(tmp_path / "results", missing=missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = tables.write_report(folder)
    scores = results["per_class"][CLASSES[missing]]
    assert scores["recall"] is None and scores["f1"] is None and scores["clips"] == 0
    folds = [raw_predictions(folder, fold) for fold in range(3)]
    true, predicted = (np.concatenate([fold[part] for fold in folds]) for part in (0, 1))
    present = [index for index in range(3) if index != missing]
    expected = reference.f1_score(true, predicted, labels=present, average="macro")
    assert results["macro_f1"] == pytest.approx(expected)
    assert "NaN" not in (folder / "results.json").read_text()
    assert "nan" not in (folder / "report.md").read_text()


def test_class_missing_from_one_fold_only(tmp_path):
    folder = write_run(tmp_path)
    path = folder / "predictions_fold_1.csv"
    write_rows(path, [row for row in read_rows(path) if row[1] != "2"])
    results = tables.read_results(folder)
    recalls = results["agreement"]["per_class"]["drilling"]["recall"]
    assert recalls[1] is None and None not in (recalls[0], recalls[2])
    assert results["agreement"]["per_class"]["drilling"]["recall_std"] == pytest.approx(
        abs(recalls[0] - recalls[2]) / 2**0.5
    )


# --- The report --------------------------------------------------------------------------------------------------


def test_optimistic_protocol_is_said_everywhere(tmp_path, capsys):
    folder = write_run(tmp_path, validation="test_fold")
    results = tables.write_report(folder)
    assert results["optimistic"] is True and results["note"] == LABEL
    assert LABEL in (folder / "results.json").read_text()
    headings = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("#")]
    assert len(headings) == 10 and all(LABEL in line for line in headings)
    printed = capsys.readouterr().out.splitlines()
    assert LABEL in printed[0] and any(line.startswith("3 folds") and LABEL in line for line in printed)
    for name in PICTURES:
        assert LABEL in title_of(folder / name)
    text, _ = evaluate.compare(folder, write_run(tmp_path / "honest"))
    assert all(LABEL in line for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("validation", ["next_fold", "none"])
def test_honest_protocol_is_not_called_optimistic(tmp_path, capsys, validation):
    folder = write_run(tmp_path, folds=[0, 1], validation=validation)
    assert tables.write_report(folder)["optimistic"] is False
    written = "".join((folder / name).read_text() for name in ("report.md", "results.json")) + capsys.readouterr().out
    assert LABEL not in written and f"protocol {validation}" in written
    assert not any(LABEL in title_of(folder / name) for name in PICTURES)


def test_unknown_protocol_is_not_called_honest(tmp_path):
    folder = write_run(tmp_path)
    (folder / "run.json").unlink()
    results = tables.write_report(folder)
    assert results["protocol"] is None and results["optimistic"] is None
    assert [row["best_epoch"] for row in results["per_fold"]] == [None] * 3
    assert "nobody can tell" in (folder / "report.md").read_text()


def test_rerun_writes_the_same_bytes(tmp_path):
    folder = write_run(tmp_path, folds=[0, 1])
    tables.write_report(folder)
    names = ["results.json", "report.md", *PICTURES]
    before = {name: (folder / name).read_bytes() for name in names}
    tables.write_report(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not list(folder.glob("*.tmp"))


def test_without_history_there_are_no_curves(tmp_path):
    folder = write_run(tmp_path, folds=[3])
    tables.write_report(folder)
    text = (folder / "report.md").read_text()
    assert all(f"({name})" in text for name in PICTURES)
    for path in folder.glob("history_fold_*.csv"):
        path.unlink()
    assert "curves.png" not in tables.write_report(folder)["files"]
    assert not (folder / "curves.png").exists()
    assert "curves.png" not in (folder / "report.md").read_text()


def test_table_aligns_and_escapes():
    assert tables.table(["a|b", "n"], [["x", None], ["long name", 7]]).splitlines() == [
        "| a\\|b      |   n |",
        "| --------- | --: |",
        "| x         |   – |",
        "| long name |   7 |",
    ]


# --- Bad input ---------------------------------------------------------------------------------------------------


def cell(line, column, value):
    def change(rows):
        rows[line - 1][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cell(5, 2, "nan"), ["line 5", "probabilities"]),
        (cell(5, 2, "-0.2"), ["line 5", "probabilities"]),
        (cell(7, 2, "3"), ["line 7", "sum 1"]),
        (cell(7, 2, "many"), ["line 7", "'many'"]),
        (cell(4, 1, "dog"), ["line 4", "'dog'"]),
        (cell(4, 1, "3"), ["line 4", "classID 3", "no column"]),
        (cell(1, 0, "file"), ["line 1", "slice_file_name"]),
        (cell(1, 3, "siren"), ["line 1", "each once"]),
        (cell(1, 3, "cat"), ["line 1", "cat", "predictions_fold_0.csv"]),
        (cell(9, 0, "clip1_0.wav"), ["line 9", "clip1_0.wav", "predictions_fold_1.csv, line 2"]),
        (cell(9, 0, "clip0_3.wav"), ["line 9", "clip0_3.wav", "predictions_fold_0.csv, line 5"]),
        (lambda rows: rows[3].pop(), ["line 4", "4 values under 5 columns"]),
        (lambda rows: rows.clear(), ["line 1", "none"]),
        (lambda rows: rows.__delitem__(slice(1, None)), ["no clips"]),
        (lambda rows: [row.pop(1) for row in rows], ["line 1", "classID"]),
    ],
)
def test_bad_predictions_are_refused_by_file_and_line(tmp_path, change, said):
    folder = write_run(tmp_path)
    path = folder / "predictions_fold_1.csv"
    rows = read_rows(path)
    change(rows)
    write_rows(path, rows)
    with pytest.raises(UserError) as caught:
        tables.write_report(folder)
    assert all(part in str(caught.value) for part in [str(path), *said])
    assert not (folder / "results.json").exists()


def test_small_rounding_and_empty_last_lines_are_accepted(tmp_path):
    folder = write_run(tmp_path, folds=[0])
    path = folder / "predictions_fold_0.csv"
    rows = read_rows(path)
    rows[1][2:] = ["0.3335", "0.3335", "0.3335"]
    write_rows(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert tables.read_results(folder)["clips"] == CLIPS_A_FOLD


@pytest.mark.parametrize(
    ("column", "value", "said"), [("fold", "3", "fold 3"), ("classID", "1", "classID 1"), ("fold", "11", "fold 11")]
)
def test_table_at_odds_with_the_predictions_is_refused(tmp_path, column, value, said):
    folder, data = write_run(tmp_path / "results"), write_clips(tmp_path / "data")
    rows = read_rows(data / "clips.csv")
    index = rows[0].index(column)
    for row in rows[1:]:
        if row[0] == "clip0_0.wav":
            row[index] = value
            row[-1] = CLASSES[int(row[-2])]
    write_rows(data / "clips.csv", rows)
    with pytest.raises(UserError, match=said):
        tables.write_report(folder, data)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("history_fold_0.csv", "epoch,train_loss\n1,2\n", "train_accuracy"),
        (
            "history_fold_0.csv",
            "epoch,train_loss,train_accuracy,validation_loss,validation_accuracy\n1,x,,,\n",
            "line 2",
        ),
        ("run.json", "[]", "does not describe a run"),
        ("run.json", '{"validation": ["none"]}', "does not describe a run"),
        ("run.json", "{", "not JSON"),
        ("run.json", '{"temperatures": [1, 2]}', "does not describe a run"),
        ("run.json", '{"temperatures": {"0": -1}}', "the temperature of fold 0 is '-1'"),
        ("run.json", '{"temperatures": {"1": NaN}}', "the temperature of fold 1 is 'nan'"),
        ("run.json", '{"temperatures": {"1": true}}', "the temperature of fold 1 is 'True'"),
    ],
)
def test_damaged_companions_are_named(tmp_path, name, content, said):
    folder = write_run(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        tables.write_report(folder)
    assert str(folder / name) in str(caught.value)


def test_binary_predictions_are_refused(tmp_path):
    (tmp_path / "predictions_fold_0.csv").write_bytes(b"\x89PNG\r\n\xff\x00")
    with pytest.raises(UserError, match="not a CSV file"):
        metrics.read_predictions(tmp_path)


# --- Comparison --------------------------------------------------------------------------------------------------


def test_compare_equals_the_answers_counted_by_hand(tmp_path):
    a, b = write_run(tmp_path / "a", folds=[0, 1]), write_run(tmp_path / "b", folds=[1, 2], seed=1)
    text, values = evaluate.compare(a, b)
    true, guess_a = map(np.array, raw_predictions(a, 1))
    guess_b = np.array(raw_predictions(b, 1)[1])
    right_a, right_b = true == guess_a, true == guess_b
    assert values["clips"] == CLIPS_A_FOLD
    assert (values["only_a"], values["only_b"]) == ((right_a & ~right_b).sum(), (right_b & ~right_a).sum())
    for row in values["classes"]:
        here = true == CLASSES.index(row["class"])
        assert (row["a"], row["b"]) == (pytest.approx(right_a[here].mean()), pytest.approx(right_b[here].mean()))
    moves = [abs(row["b"] - row["a"]) for row in values["classes"]]
    assert moves == sorted(moves, reverse=True)
    assert f"p = {values['p_value']:.2g}" in text and "2 folds, 60 clips" in text


def test_compare_with_itself(tmp_path):
    folder = write_run(tmp_path)
    _, values = evaluate.compare(folder, folder)
    assert values["p_value"] == 1 and values["accuracy_a"] == values["accuracy_b"]


def test_compare_takes_classes_by_name(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for path in b.glob("predictions_fold_*.csv"):  # the same answers, with the columns and the classIDs turned around
        rows = [[row[0], str(2 - int(row[1])) if row[1].isdigit() else row[1], *row[:1:-1]] for row in read_rows(path)]
        write_rows(path, rows)
    assert evaluate.compare(a, b)[1]["only_a"] == evaluate.compare(a, b)[1]["only_b"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[0].__setitem__(2, "cat"), "other classes"),
        (lambda rows: rows[1].__setitem__(1, "1"), "clip0_0.wav is siren in .* and dog_bark in"),
        (lambda rows: [row.__setitem__(0, "x" + row[0]) for row in rows[1:]], "no test clip in common"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, change, said):
    a, b = write_run(tmp_path / "a", folds=[0]), write_run(tmp_path / "b", folds=[0])
    rows = read_rows(b / "predictions_fold_0.csv")
    change(rows)
    write_rows(b / "predictions_fold_0.csv", rows)
    with pytest.raises(UserError, match=said):
        evaluate.compare(a, b)


# --- Command line ------------------------------------------------------------------------------------------------


def test_command_line_on_an_assets_folder(tmp_path):
    write_run(tmp_path / "results")
    write_clips(tmp_path / "data")
    done = run_script("--assets_dir", tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert f"accuracy {100 * results['accuracy_mean']:.1f} % ± {100 * results['accuracy_std']:.1f}" in done.stdout
    for name in ["results.json", "report.md", *PICTURES]:
        assert str(tmp_path / "results" / name) in done.stdout and (tmp_path / "results" / name).is_file()


def test_command_line_compares(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    done = run_script("--assets_dir", tmp_path, "--compare", a, b, "--output", tmp_path / "comparison.md")
    assert done.returncode == 0
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "McNemar" in text and done.stdout.startswith(text)
    assert not (a / "results.json").exists()


def test_command_line_without_predictions(tmp_path):
    done = run_script("--assets_dir", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no predictions in {tmp_path / 'results'}: run python train.py first\n"


def test_command_line_refuses_a_processed_dir_without_the_table(tmp_path):
    folder = write_run(tmp_path / "results")
    done = run_script("--results_dir", folder, "--processed_dir", tmp_path)
    assert done.returncode == 2 and "no clips.csv" in done.stderr


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    folder = write_run(tmp_path, folds=[0])
    shutil.copy(folder / "predictions_fold_0.csv", folder / "predictions_fold_0 (copy).csv")
    (folder / "predictions_fold_1.csv.tmp").write_text("half a fi")
    assert tables.read_results(folder)["folds_present"] == 1


# --- Folds that were trained apart -----------------------------------------------------------------------------------


def test_joined_folds_have_the_report_of_one_run(tmp_path):
    write_clips(tmp_path / "assets" / "data")
    whole = write_run(tmp_path / "whole")
    apart = [tmp_path / "a", tmp_path / "b" / "results"]  # a results folder, and an assets folder
    for folder, folds in zip(apart, ([0, 2], [1]), strict=True):
        folder.mkdir(parents=True)
        for fold in folds:
            for name in ("predictions", "history"):
                shutil.copy(whole / f"{name}_fold_{fold}.csv", folder)
        run = json.loads((whole / "run.json").read_text())
        kept = {str(fold): 2 for fold in folds}
        (folder / "run.json").write_text(json.dumps({**run, "best_epochs": kept, "temperatures": kept}))
    set_temperatures(whole, {"0": 2, "1": 2, "2": 2})
    assets = tmp_path / "assets"
    for _ in range(2):  # the second time over the first
        done = run_script("--assets_dir", assets, "--join", apart[0], apart[1].parent)
        assert done.returncode == 0, done.stderr
    run_script("--results_dir", whole, "--processed_dir", assets / "data")
    for name in ("results.json", "report.md", "confusion_matrix.png", "curves.png"):
        assert (assets / "results" / name).read_bytes() == (whole / name).read_bytes()


def test_runs_that_do_not_join(tmp_path):
    a, b = write_run(tmp_path / "a", [0, 1]), write_run(tmp_path / "b", [2])
    joined = tmp_path / "joined"
    said = {
        (a, write_run(tmp_path / "c", [1])): "predictions_fold_1.csv is in .*a and in .*c: each fold counts once",
        (a, write_run(tmp_path / "d", [2], "none")): "d was trained with another validation than .*a",
        (a, tmp_path / "nothing"): "no predictions in .*nothing: name the results folder of a run",
    }
    for folders, words in said.items():
        done = run_script("--results_dir", joined, "--join", *folders)
        assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
        assert list(joined.iterdir()) == []
    done = run_script("--results_dir", write_run(tmp_path / "old", [5]), "--join", a, b)
    assert done.returncode == 2 and "old has predictions_fold_5.csv of another run" in done.stderr
