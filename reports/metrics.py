"""The numbers of the report, from the predictions of the tested folds. evaluate.py reads, writes and prints them.

Written out in numpy, each with its formula. All shares are between 0 and 1. A value that does not exist (the recall of
a class without test clips, the spread of one fold) is None in the results and NaN inside arrays, never 0.
"""

import collections
import csv
import dataclasses
import re
from pathlib import Path

import numpy as np

import data_loader
import utils
from utils import UserError

CONFUSIONS_LISTED = 10
EXAMPLES_LISTED = 5  # clips named for each confusion
RECORDINGS_LISTED = 10  # of those with most errors
CONFIDENCE_BINS = 15  # of equal width, as in Guo et al. 2017
SHARES_ANSWERED = [share / 100 for share in range(100, 0, -5)]
OPTIMISTIC = "optimistic: epoch chosen on the test fold"
PREDICTIONS = re.compile(r"predictions_fold_(0|[1-9]\d*)\.csv")
SUM_TOLERANCE = 1e-3  # the probabilities of a clip must sum to 1 within this
# What run.json must be, where it has them.
RUN_KINDS = {"validation": str, "best_epochs": dict, "n_folds": int, "temperatures": dict}
KEYS_OF_FOLDS = ("best_epochs", "temperatures")  # of run.json: {fold: value}
HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]


@dataclasses.dataclass
class Predictions:
    """The test clips of all folds present, fold after fold, each in its file's order."""

    class_names: list
    names: list  # (clips,) file names
    folds: np.ndarray  # (clips,) 0-indexed
    true: np.ndarray  # (clips,) places in class_names
    probabilities: np.ndarray  # (clips, classes)
    clips: dict  # {file name: row of clips.csv}; empty if there is none, or if it lacks one of these clips

    @property
    def predicted(self):
        """The likeliest class of each clip, (clips,); the first of equals."""
        return self.probabilities.argmax(axis=1)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_predictions(results_dir, processed_dir=None):
    """Return the Predictions of every fold in a results folder, checked.

    processed_dir: the folder of clips.csv, which tells salience, and how many clips and folds there are in all.
    UserError names the file and line of what can't be right: probabilities that are none, a clip tested twice or in
    another fold than its own, classes that differ between the folds.
    """
    found = {path: PREDICTIONS.fullmatch(path.name) for path in Path(results_dir).glob("predictions_fold_*.csv")}
    paths = {int(match[1]): path for path, match in found.items() if match}
    if not paths:
        raise UserError(f"no predictions in {results_dir}: run python train.py first")
    files = {fold: read_prediction_file(path) for fold, path in sorted(paths.items())}
    first = min(files)
    class_names = files[first][0]
    tested = {}
    for fold, (classes, names, _, _) in files.items():
        if classes != class_names:
            raise UserError(
                f"{paths[fold]}, line 1: its classes {classes} are not those of {paths[first].name}, {class_names}: "
                "keep the folds of one run in a folder"
            )
        for line, name in enumerate(names, start=2):
            here = f"{paths[fold].name}, line {line}"
            if tested.setdefault(name, here) != here:
                raise UserError(
                    f"{paths[fold]}, line {line}: {name} is tested already in {tested[name]}; a clip counts once"
                )
    table = Path(processed_dir) / "clips.csv" if processed_dir else None
    clips = {}
    if table and table.is_file():
        clips = {clip["slice_file_name"]: clip for clip in data_loader.read_clip_table(table)}
        clips = clips if all(name in clips for name in tested) else {}
    columns = class_columns(class_names, clips)
    for fold, (_, names, class_ids, _) in files.items():
        for line, (name, class_id) in enumerate(zip(names, class_ids, strict=True), start=2):
            where = f"{paths[fold]}, line {line}"
            if class_id not in columns:
                raise UserError(f"{where}: {name} has classID {class_id}, which has no column: {sorted(columns)} have")
            clip = clips.get(name, {"classID": class_id, "fold": fold + 1})
            if (clip["classID"], clip["fold"]) != (class_id, fold + 1):
                raise UserError(
                    f"{where}: {name} has classID {class_id} and is tested in the data set's fold {fold + 1}, but "
                    f"{table} says classID {clip['classID']} and fold {clip['fold']}: these files don't belong together"
                )
    return Predictions(
        class_names=class_names,
        names=list(tested),
        folds=np.repeat(list(files), [len(file[1]) for file in files.values()]),
        true=np.array([columns[class_id] for file in files.values() for class_id in file[2]]),
        probabilities=np.concatenate([file[3] for file in files.values()]),
        clips=clips,
    )


def read_prediction_file(path):
    """Return (class names, file names, classIDs, probabilities (clips, classes)) of one fold's file."""
    header, *rows = read_csv(path)
    if header[:2] != ["slice_file_name", "classID"] or len(header) < 3 or len(set(header)) < len(header):
        raise UserError(
            f"{path}, line 1: the columns are {', '.join(header) or 'none'}; they must be slice_file_name, classID and "
            "one a class, each once"
        )
    if not rows:
        raise UserError(f"{path} has no clips: remove it, or test the fold again")
    class_ids, probabilities = [], np.empty((len(rows), len(header) - 2))
    for index, row in enumerate(rows):
        where = f"{path}, line {index + 2}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} values under {len(header)} columns: the file is cut off or damaged")
        try:
            class_ids.append(int(row[1]))
            probabilities[index] = [float(value) for value in row[2:]]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if not (probabilities[index] >= 0).all() or not abs(probabilities[index].sum() - 1) <= SUM_TOLERANCE:
            raise UserError(
                f"{where}: the probabilities {', '.join(row[2:])} must be numbers of at least 0 with the sum 1"
            )
    return header[2:], [row[0] for row in rows], class_ids, probabilities


def read_csv(path):
    """Return the rows of a CSV file as lists of strings, without empty lines at its end; at least one row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file ({error}): make it again") from error
    while rows and not rows[-1]:
        rows.pop()
    return rows or [[]]


def class_columns(class_names, clips):
    """Return {classID: column} of the probabilities: as clips.csv numbers the classes, else in order from 0."""
    ids = {clip["class"]: clip["classID"] for clip in clips.values()}
    in_table = all(name in ids for name in class_names)
    return {ids[name] if in_table else column: column for column, name in enumerate(class_names)}


def read_history(results_dir, fold):
    """Return {column: (epochs,) floats} of a fold's history; NaN where a value is empty. None if there is no file."""
    path = Path(results_dir) / f"history_fold_{fold}.csv"
    if not path.is_file():
        return None
    header, *rows = read_csv(path)
    if missing := [column for column in HISTORY_COLUMNS if column not in header]:
        raise UserError(f"{path}, line 1: lacks the column {', '.join(missing)}")
    values = np.empty((len(rows), len(header)))
    for index, row in enumerate(rows):
        try:
            values[index] = [float(value or "nan") for value in row]
        except ValueError as error:
            raise UserError(f"{path}, line {index + 2}: {error}") from error
    return {column: values[:, header.index(column)] for column in HISTORY_COLUMNS}


def read_run(results_dir):
    """Return what run.json says of the run, {} if it is not there."""
    path = Path(results_dir) / "run.json"
    run = utils.load_json(path) if path.is_file() else {}
    if not isinstance(run, dict) or any(not isinstance(run.get(key, kind()), kind) for key, kind in RUN_KINDS.items()):
        raise UserError(f"{path} does not describe a run: run python train.py again, or remove it")
    for fold, value in run.get("temperatures", {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e3:
            raise UserError(f"{path}: the temperature of fold {fold} is {str(value)[:80]!r}: run python train.py again")
    return run


# --- Metrics -----------------------------------------------------------------------------------------------------


def confusion_matrix(true, predicted, n_classes):
    """Return the (n_classes, n_classes) counts of clips: rows true, columns predicted."""
    return np.bincount(true * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_scores(confusion):
    """Return (precision, recall, F1) of each class, (classes,) floats; NaN where the class gives no value.

    With TP clips of the class found, FP others taken for it and FN of its own missed:
        precision = TP / (TP + FP)    recall = TP / (TP + FN)    F1 = 2 TP / (2 TP + FP + FN)
    A class without test clips has no recall and no F1; one that was never predicted has no precision, and F1 = 0.
    """
    hits, clips, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = ratio(2 * hits, clips + taken)
    return ratio(hits, taken), ratio(hits, clips), np.where(clips > 0, f1, np.nan)


def ratio(part, whole):
    """Return part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def macro_f1(confusion):
    """Return the mean F1 of the classes that have test clips: each class counts alike, however many its clips."""
    f1 = class_scores(confusion)[2]
    return float(f1[~np.isnan(f1)].mean())


def sample_std(values):
    """Return the sample standard deviation, sqrt(sum((x - mean)^2) / (n - 1)); None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval_95(values):
    """Return [low, high] of the 95 % interval of the mean, mean ± t(0.975, n - 1) std / sqrt(n), cut to 0 ... 1.

    None for fewer than two values. Folds share training clips, so that the true interval is a little wider.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # Student's t quantile; scipy.stats has it too, and takes a second to import

    half = stdtrit(len(values) - 1, 0.975) * sample_std(values) / np.sqrt(len(values))
    return [max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))]


def paired_test(right_a, right_b):
    """Compare two runs on the same clips by McNemar's test: only the clips that one of the two alone got right count.

    right_a, right_b: (clips,) bools. If the runs were equally good, each such clip would be A's or B's with 1/2:
        p = P(a split at least as uneven as only_a : only_b), binomial, exact and two-sided
    Returns {"clips", "accuracy_a", "accuracy_b", "only_a", "only_b", "p_value"}.
    """
    from scipy import stats

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return {
        "clips": len(right_a),
        "accuracy_a": float(right_a.mean()),
        "accuracy_b": float(right_b.mean()),
        "only_a": only_a,
        "only_b": only_b,
        "p_value": float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }


# --- Confidence ----------------------------------------------------------------------------------------------------


def with_temperature(probabilities, temperature):
    """Return softmax(log(p) / T) of probabilities (clips, classes), which is p^(1/T) made to sum to 1."""
    powers = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def reliability(confidence, correct):
    """Return {"ece", "bins"}: how far confidence is from the share of right answers.

    confidence: (clips,) probability of the predicted class; correct: (clips,) bools. With the clips in bins of equal
    width of confidence, the expected calibration error (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities
    Using Bayesian Binning"; 15 bins as Guo et al. 2017, arXiv:1706.04599) is
        ECE = sum over bins of clips in bin / clips * |accuracy of bin - mean confidence of bin|
    """
    place = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(int) - 1, 0, CONFIDENCE_BINS - 1)  # (clips,)
    bins = []
    for number in range(CONFIDENCE_BINS):
        here = place == number
        bins.append(
            {
                "from": number / CONFIDENCE_BINS,
                "to": (number + 1) / CONFIDENCE_BINS,
                "clips": int(here.sum()),
                "confidence": mean_or_none(confidence[here]),
                "accuracy": mean_or_none(correct[here]),
            }
        )
    gaps = [row["clips"] * abs(row["accuracy"] - row["confidence"]) for row in bins if row["clips"]]
    return {"ece": float(sum(gaps) / len(correct)), "bins": bins}


def selective_accuracy(confidence, correct):
    """Return the accuracy over the surest clips for each of SHARES_ANSWERED: what leaving out the unsure is worth.

    confidence: (clips,); correct: (clips,) bools. Selective classification: Geifman and El-Yaniv 2017,
    arXiv:1705.08500.
    """
    order = np.argsort(-confidence, kind="stable")
    rows = []
    for share in SHARES_ANSWERED:
        answered = order[: max(round(share * len(order)), 1)]
        rows.append(
            {
                "share": share,
                "clips": len(answered),
                "accuracy": float(correct[answered].mean()),
                "least_confidence": float(confidence[answered[-1]]),
            }
        )
    return rows


# --- From predictions to results -----------------------------------------------------------------------------------


def summarise(predictions, run):
    """Return the results, as results.json has them: plain values, None where there is none. run: see `read_run`."""
    names, n_classes = predictions.class_names, len(predictions.class_names)
    correct = predictions.true == predictions.predicted
    folds = sorted(set(predictions.folds.tolist()))
    confusions = {}
    for fold in folds:
        here = predictions.folds == fold
        confusions[fold] = confusion_matrix(predictions.true[here], predictions.predicted[here], n_classes)
    total = sum(confusions.values())
    accuracies = [float(np.trace(confusion) / confusion.sum()) for confusion in confusions.values()]
    salience = np.array([predictions.clips.get(name, {}).get("salience") for name in predictions.names])
    protocol = run.get("validation")
    per_fold = [
        {
            "fold": fold,
            "dataset_fold": fold + 1,
            "clips": int(confusions[fold].sum()),
            "accuracy": accuracy,
            "best_epoch": run.get("best_epochs", {}).get(str(fold)),
            "macro_f1": macro_f1(confusions[fold]),
        }
        for fold, accuracy in zip(folds, accuracies, strict=True)
    ]
    all_folds = {clip["fold"] for clip in predictions.clips.values()}
    return {
        "protocol": protocol,
        "optimistic": None if protocol is None else protocol == "test_fold",
        "note": OPTIMISTIC if protocol == "test_fold" else None,
        "folds_present": len(folds),
        "folds_total": len(all_folds) or run.get("n_folds"),
        "clips": len(correct),
        "clips_total": len(predictions.clips) or None,
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_std": sample_std(accuracies),
        "accuracy_interval_95": interval_95(accuracies),
        "accuracy_all_clips": float(correct.mean()),
        "macro_f1": macro_f1(total),
        "foreground_accuracy": mean_or_none(correct[salience == "1"]),
        "foreground_clips": int((salience == "1").sum()),
        "background_accuracy": mean_or_none(correct[salience == "2"]),
        "background_clips": int((salience == "2").sum()),
        "per_fold": per_fold,
        "per_class": summarise_classes(names, total),
        "agreement": summarise_agreement(names, confusions),
        "confidence": summarise_confidence(predictions, run.get("temperatures", {})),
        "class_names": names,
        "confusion_matrix": total.tolist(),
        "worst_confusions": worst_confusions(predictions, total),
        "recordings": summarise_recordings(predictions),
        "run": run,
    }


def mean_or_none(values):
    return float(values.mean()) if len(values) else None


def number(value):
    """Return a number as JSON can hold it: None for NaN."""
    return None if np.isnan(value) else float(value)


def summarise_classes(names, confusion):
    """Return {class: {"precision", "recall", "f1", "clips"}} over all test clips."""
    scores = zip(names, *class_scores(confusion), confusion.sum(axis=1).tolist(), strict=True)
    return {
        name: {"precision": number(precision), "recall": number(recall), "f1": number(f1), "clips": clips}
        for name, precision, recall, f1, clips in scores
    }


def summarise_agreement(names, confusions):
    """Return how far the folds agree: each class's recall and F1 in every fold, its spread, the most varied class."""
    _, recall, f1 = (np.array(scores) for scores in zip(*map(class_scores, confusions.values()), strict=True))
    classes = {}
    for column, name in enumerate(names):
        present = recall[~np.isnan(recall[:, column]), column]
        classes[name] = {
            "recall": [number(value) for value in recall[:, column]],  # in the order of per_fold
            "f1": [number(value) for value in f1[:, column]],
            "recall_std": sample_std(present),
        }
    spreads = {name: scores["recall_std"] for name, scores in classes.items() if scores["recall_std"] is not None}
    return {
        "most_varied_class": max(filter(spreads.get, spreads), key=spreads.get, default=None),  # None if none varies
        "mean_recall_std": float(np.mean(list(spreads.values()))) if spreads else None,
        "per_class": classes,
    }


def summarise_confidence(predictions, temperatures):
    """Return what the confidence is worth before and after the folds' temperatures, {"per_fold", "before", "after"}.

    temperatures: {str(fold): temperature}. "after" is None unless every fold has one: the two are of the same clips.
    """
    correct = predictions.true == predictions.predicted  # a temperature moves no clip to another class
    before = predictions.probabilities.max(axis=1)  # (clips,)
    after = before.copy()
    per_fold = []
    for fold in sorted(set(predictions.folds.tolist())):
        here, temperature = predictions.folds == fold, temperatures.get(str(fold))
        row = {"fold": fold, "temperature": temperature, "ece_after": None}
        row["ece_before"] = reliability(before[here], correct[here])["ece"]
        if temperature is not None:
            after[here] = with_temperature(predictions.probabilities[here], temperature).max(axis=1)
            row["ece_after"] = reliability(after[here], correct[here])["ece"]
        per_fold.append(row)
    parts = {
        name: {**reliability(confidence, correct), "answered": selective_accuracy(confidence, correct)}
        for name, confidence in (("before", before), ("after", after))
    }
    if any(row["temperature"] is None for row in per_fold):
        parts["after"] = None
    return {"per_fold": per_fold, **parts}


def worst_confusions(predictions, confusion):
    """Return the largest cells off the diagonal, with the clips that the network was surest of, and wrong."""
    names, predicted = predictions.class_names, predictions.predicted
    wrong = collections.defaultdict(list)
    for clip in np.flatnonzero(predictions.true != predicted):
        confidence = float(predictions.probabilities[clip, predicted[clip]])
        pair = int(predictions.true[clip]), int(predicted[clip])
        wrong[pair].append((-confidence, predictions.names[clip]))
    worst = sorted(wrong, key=lambda pair: (-len(wrong[pair]), pair))[:CONFUSIONS_LISTED]
    return [
        {
            "true": names[true],
            "predicted": names[guess],
            "clips": len(wrong[true, guess]),
            "share": len(wrong[true, guess]) / int(confusion[true].sum()),  # of the true class's clips
            "examples": [name for _, name in sorted(wrong[true, guess])[:EXAMPLES_LISTED]],
        }
        for true, guess in worst
    ]


def summarise_recordings(predictions):
    """Return {"count", "accuracy", "most_errors"} of the recordings (fsID) that the clips were cut from.

    Clips of one recording are alike, and tend to be right or wrong together: "accuracy" is the mean over recordings of
    the share of their clips that are right. None where there is no clips.csv.
    """
    if not predictions.clips:
        return None
    places = collections.defaultdict(list)
    for place, name in enumerate(predictions.names):
        places[predictions.clips[name]["fsID"], int(predictions.true[place])].append(place)
    rows = []
    for (recording, true), clips in places.items():
        predicted = predictions.predicted[clips]
        wrong = collections.Counter(predictions.class_names[guess] for guess in predicted[predicted != true])
        rows.append(
            {
                "recording": recording,
                "class": predictions.class_names[true],
                "clips": len(clips),
                "wrong": wrong.total(),
                "taken_for": min(wrong, key=lambda name: (-wrong[name], name), default=None),
            }
        )
    worst = sorted(rows, key=lambda row: (-row["wrong"], row["recording"], row["class"]))[:RECORDINGS_LISTED]
    return {
        "count": len(rows),
        "accuracy": float(np.mean([1 - row["wrong"] / row["clips"] for row in rows])),
        "most_errors": [row for row in worst if row["wrong"]],
    }
