"""metrics.py: what a results folder holds is read and checked, and scored as scikit-learn and paper formulas do."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from result_files import CLASSES, CLIPS_A_FOLD, raw_predictions, read_rows, write_clips, write_rows, write_run
from sklearn import metrics as reference

from reports import metrics
from utils import UserError

# --- Reading -----------------------------------------------------------------------------------------------------


def cell(line, column, value):
    def change(rows):
        rows[line - 1][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cell(5, 2, "nan"), ["line 5", "probabilities"]),
        (cell(5, 2, "-0.2"), ["line 5", "sum 1"]),
        (cell(7, 2, "9" * 400), ["line 7", "sum 1"]),
        (cell(7, 2, "many"), ["line 7", "many"]),
        (cell(4, 1, "dog"), ["line 4", "'dog'", "whole number"]),
        (cell(4, 1, "3"), ["line 4", "'3'", "no column"]),
        (cell(4, 0, "a\nb.wav"), ["line 4", "'a b.wav'", "no file name"]),
        (cell(1, 0, "file"), ["lacks the column slice_file_name"]),
        (cell(1, 3, "siren"), ["column siren twice"]),
        (cell(1, 3, "\x1b[2J"), ["line 1", "each class"]),
        (cell(1, 3, "cat"), ["line 1", "cat", "the folds before"]),
        (cell(9, 0, "clip1_0.wav"), ["line 9", "clip1_0.wav", "twice"]),
        (lambda rows: rows[3].pop(), ["line 4", "probabilities"]),
        (lambda rows: rows[3].append("0"), ["line 4", "comma-separated"]),
        (lambda rows: rows.clear(), ["is not a table"]),
        (lambda rows: rows.__delitem__(slice(1, None)), ["no rows"]),
    ],
)
def test_predictions_that_can_not_be_right_are_refused_by_file_and_line(tmp_path, change, named):
    folder = write_run(tmp_path)
    path = folder / "predictions_fold_1.csv"
    rows = read_rows(path)
    change(rows)
    write_rows(path, rows)
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("error")
        metrics.read_predictions(folder)
    assert all(part in str(caught.value) for part in [str(path), *named]) and str(caught.value).isprintable()


def test_predictions_with_small_rounding_and_empty_last_lines_are_accepted(tmp_path):
    folder = write_run(tmp_path, folds=[0])
    path = folder / "predictions_fold_0.csv"
    rows = read_rows(path)
    rows[1][2:] = ["0.3335", "0.3335", "0.3335"]
    write_rows(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert metrics.read_results(folder)["clips"] == CLIPS_A_FOLD


def test_other_files_in_the_folder_are_not_read(tmp_path):
    folder = write_run(tmp_path, folds=[0])
    for name in ("predictions_fold_0 (copy).csv", "predictions_fold_1.csv.tmp", "predictions_fold_10.csv"):
        (folder / name).write_text("half a fi")
    assert metrics.read_results(folder)["folds_present"] == 1
    (folder / "predictions_fold_2.csv").mkdir()
    with pytest.raises(UserError, match=r"is not a table .*Is a directory"):
        metrics.read_results(folder)


@pytest.mark.parametrize(("column", "value", "named"), [("fold", "3", "fold '1'"), ("classID", "1", "classID '0'")])
def test_table_that_contradicts_the_predictions_is_refused(tmp_path, column, value, named):
    folder, data = write_run(tmp_path / "results"), write_clips(tmp_path / "data")
    rows = read_rows(data / "clips.csv")
    rows[1][rows[0].index(column)] = value
    rows[1][-1] = CLASSES[int(rows[1][-2])]
    write_rows(data / "clips.csv", rows)
    with pytest.raises(UserError, match=f"predictions_fold_0.csv, line 2: {named} is not the clip's in .*clips.csv"):
        metrics.read_predictions(folder, data)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("history_fold_0.csv", "epoch,train_loss\n1,2\n", "train_accuracy"),
        (
            "history_fold_0.csv",
            ",".join(metrics.HISTORY_COLUMNS) + "\n1,x,,,\n",
            "line 2: train_loss 'x' is not a number",
        ),
        ("run.json", "[]", "does not describe a run"),
        ("run.json", '{"best_epochs": [1, 2]}', "does not describe a run"),
        ("run.json", '{"best_epochs": {"0": "2"}}', "does not describe a run"),
        ("run.json", '{"temperatures": {"0": -1}}', "does not describe a run"),
        ("run.json", '{"validation": ["none"]}', "does not describe a run"),
        ("run.json", "{", "not JSON"),
        ("run.json", '{"settings": {"rate": 1e999}}', "does not describe a run"),
        ("run.json", '{"settings": {"name": "\\ud800"}}', "does not describe a run"),
    ],
)
def test_damaged_history_or_run_is_named(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=named) as caught:
        metrics.read_history(tmp_path, 0)
        metrics.read_run(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_history_that_is_not_there_is_none_and_an_empty_value_nan(tmp_path):
    folder = write_run(tmp_path, validation="none")
    assert metrics.read_history(folder, 7) is None
    history = metrics.read_history(folder, 0)
    assert history["epoch"].tolist() == [1, 2, 3] and history["validation_loss"].isna().all()
    (folder / "run.json").write_text('{"files": {"0": {"history": "the digest of another file"}}}')
    assert metrics.read_history(folder, 0) is None


# --- Results -----------------------------------------------------------------------------------------------------


def test_results_equal_scikit_learn(tmp_path):
    folder = write_run(tmp_path / "results")
    results = metrics.read_results(folder, write_clips(tmp_path / "data"))
    folds = [raw_predictions(folder, fold) for fold in range(3)]
    true, predicted = (np.concatenate([fold[part] for fold in folds]) for part in (0, 1))
    accuracies = [reference.accuracy_score(*fold) for fold in folds]
    assert [row["accuracy"] for row in results["per_fold"]] == pytest.approx(accuracies)
    macro = [reference.f1_score(*fold, average="macro") for fold in folds]
    assert [row["macro_f1"] for row in results["per_fold"]] == pytest.approx(macro)
    assert results["accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert results["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert results["accuracy_all_clips"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert results["confusion_matrix"] == reference.confusion_matrix(true, predicted).tolist()
    expected = reference.classification_report(true, predicted, target_names=CLASSES, output_dict=True)
    for name in CLASSES:
        assert results["per_class"][name]["f1"] == pytest.approx(expected[name]["f1-score"])
        assert results["per_class"][name]["clips"] == expected[name]["support"]
    background = np.tile(np.arange(CLIPS_A_FOLD) < 10, 3)
    assert results["background_accuracy"] == pytest.approx((true == predicted)[background].mean())
    recalls = np.array([reference.recall_score(*fold, average=None) for fold in folds])
    np.testing.assert_allclose([results["recall_per_fold"][name] for name in CLASSES], recalls.T)
    assert (results["folds_present"], results["folds_total"]) == (3, 10)
    assert (results["clips"], results["clips_total"]) == (90, 300)


def test_class_ids_of_the_table_decide_not_the_order_of_columns(tmp_path):
    folder, data = write_run(tmp_path / "results", folds=[0]), write_clips(tmp_path / "data")
    before = metrics.read_results(folder, data)
    for path in (folder / "predictions_fold_0.csv", data / "clips.csv"):
        rows = read_rows(path)
        column = rows[0].index("classID")
        for row in rows[1:]:
            row[column] = str({0: 2, 1: 5, 2: 9}[int(row[column])])
        write_rows(path, rows)
    assert metrics.read_results(folder, data) == before


@pytest.mark.parametrize("is_of_other_clips", [False, True])
def test_without_a_table_of_these_clips_no_salience_is_claimed(tmp_path, is_of_other_clips):
    folder = write_run(tmp_path / "results")
    data = write_clips(tmp_path / "data", folds=[0, 1])  # lacks the clips of fold 2
    results = metrics.read_results(folder, data if is_of_other_clips else tmp_path)
    assert results["clips_total"] is None and results["folds_total"] is None
    assert results["accuracy_recordings"] is None
    assert results["foreground_accuracy"] is None and results["background_accuracy"] is None


def test_scores_of_a_class_without_clips_are_missing_and_of_one_never_predicted_0():
    true = np.array([0, 0, 0, 1, 1, 3])  # class 2 has no clips
    predicted = np.array([0, 0, 2, 1, 1, 0])  # class 3 is never predicted
    scores = metrics.class_scores(true, predicted, list("abcd"))
    assert scores["precision"].tolist() == [pytest.approx(2 / 3), 1, 0, None]
    assert scores["recall"].tolist() == [pytest.approx(2 / 3), 1, None, 0]
    assert scores["f1"].tolist() == [pytest.approx(2 / 3), 1, None, 0]
    assert scores["clips"].tolist() == [3, 2, 0, 1]


def test_interval_is_student_t_cut_to_shares():
    std, (low, high) = metrics.spread([0.70, 0.75, 0.80])  # t(0.975, 2) = 4.302653, standard deviation 0.05
    half = 4.302653 * 0.05 / math.sqrt(3)
    assert (std, low, high) == (pytest.approx(0.05), pytest.approx(0.75 - half), pytest.approx(0.75 + half))
    assert metrics.spread([0.1, 0.9])[1] == [0.0, 1.0]
    assert metrics.spread([0.7]) == (None, None)


def make_predictions(class_names, true, predicted, recordings=None):
    """Predictions of one fold; the clips are named 0, 1, ..."""
    clips = recordings and pd.DataFrame({"fsID": recordings, "fold": 1, "salience": "1"})
    names, folds = list(range(len(true))), np.zeros(len(true), int)
    return metrics.Predictions(class_names, names, folds, np.array(true), np.eye(len(class_names))[predicted], clips)


def test_worst_confusions_are_the_most_frequent():
    predictions = make_predictions(["cat", "dog"], true=[1, 1, 0, 0, 0], predicted=[0, 1, 1, 1, 0])
    assert metrics.summarise(predictions, {})["worst_confusions"] == [
        {"true": "cat", "predicted": "dog", "clips": 2, "share": pytest.approx(2 / 3)},
        {"true": "dog", "predicted": "cat", "clips": 1, "share": 0.5},
    ]


def test_recordings_count_once():
    """Recording 7 has three clips, one right; 8 has one, right; 9 is two sounds, of which one is wrong."""
    predictions = make_predictions(["dog", "car", "gun"], [0, 0, 0, 1, 1, 2], [1, 1, 0, 1, 0, 2], list("777899"))
    assert metrics.summarise(predictions, {})["accuracy_recordings"] == 0.5


# --- Confidence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("confidence", "error"), [([0.99], 0.39), ([0.21], 0.39), ([1.0, 0.3], 0.5 * (0.3 - 0.2))])
def test_calibration_error_is_the_gap_between_confidence_and_accuracy(confidence, error):
    confidence = np.repeat(confidence, 100 // len(confidence))
    assert metrics.reliability(confidence, np.arange(100) < 60)["ece"] == pytest.approx(error)


def test_bins_take_the_edges_and_rounding_errors():
    values = metrics.reliability(np.array([0.0, 1 / 15, 1.0, 1.0005]), np.array([True, False, True, True]))
    assert [(row["from"], row["to"], row["clips"]) for row in values["bins"]] == [(0, 1 / 15, 2), (14 / 15, 1, 2)]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_temperature_after_the_softmax_is_the_same_as_before_it(temperature):
    logits = np.random.default_rng(0).normal(0, 3, (50, 10))
    expected = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.with_temperature(shares, temperature), expected, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(metrics.with_temperature(np.array([[0, 0.2, 0.8]]), 2)[0], [0, 1 / 3, 2 / 3])
