"""The numbers of the report: what the tested folds left in a results folder is read, checked and scored here.

All shares are between 0 and 1. A value that does not exist (the recall of a class without test clips, the spread of
one fold) is None in the results and NaN in arrays, never 0. A file that can't be right is a UserError that names the
file and the line: it may have been edited, cut off, or come from elsewhere.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

import data_loader
import utils
from utils import UserError

PREDICTIONS = re.compile(r"predictions_fold_(0|[1-9]\d{0,3})\.csv")
HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
VALIDATIONS = "next_fold", "none", "test_fold"
RUN_TYPES = {"source": str, "settings": dict, "best_epochs": dict, "temperatures": dict}  # of run.json, if present
MAX_NUMBER = 1e6  # of folds, epochs, a temperature
SUM_TOLERANCE = 1e-3  # the probabilities of a clip must sum to 1 within this

CONFUSIONS_LISTED = 10
EXAMPLES_LISTED = 5  # clips named for each confusion
RECORDINGS_LISTED = 10  # of those with most errors
CONFIDENCE_BINS = 15  # of equal width, as in Guo et al. 2017
SHARES_ANSWERED = [share / 100 for share in range(100, 0, -5)]
OPTIMISTIC = "optimistic: epoch chosen on the test fold"


@dataclasses.dataclass
class Predictions:
    """The test clips of all folds present, fold after fold, each in its file's order."""

    class_names: list
    names: list  # (clips,) file names
    folds: np.ndarray  # (clips,) 0-indexed
    true: np.ndarray  # (clips,) indices into class_names
    probabilities: np.ndarray  # (clips, classes)
    clips: pd.DataFrame | None  # all of clips.csv by file name; None if there is none, or if it lacks a tested clip

    @property
    def predicted(self):
        """The likeliest class of each clip, (clips,); the first of equals."""
        return self.probabilities.argmax(axis=1)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_results(results_dir, processed_dir=None):
    """Return the results of a folder of predictions, as results.json has them; nothing is written."""
    return summarise(read_predictions(results_dir, processed_dir), read_run(results_dir))


def read_predictions(results_dir, processed_dir=None):
    """Return the Predictions of every fold in a results folder, checked.

    processed_dir: the folder of clips.csv, which has salience and recordings, and all clips and folds there are.
    UserError names the file and line of what can't be right: values that are no probabilities, a clip tested twice or
    in a fold that is not its own, classes that differ between folds.
    """
    matches = {path: PREDICTIONS.fullmatch(path.name) for path in Path(results_dir).glob("predictions_fold_*.csv")}
    paths = {int(match[1]): path for path, match in matches.items() if match}
    if not paths:
        raise UserError(f"no predictions in {results_dir}: run python train.py first")
    class_names, tables, probabilities = None, [], []
    for fold, path in sorted(paths.items()):
        columns, names, class_ids, rows = read_prediction_file(path)
        class_names = class_names or columns
        if columns != class_names:
            raise UserError(f"{path}, line 1: its classes {columns} are not those of the folds before, {class_names}")
        lines = [f"{path}, line {line}" for line in range(2, len(names) + 2)]
        tables.append(pd.DataFrame({"clip": names, "classID": class_ids, "fold": fold}, index=lines))
        probabilities.append(rows)
    tested = pd.concat(tables)
    check_rows(tested["clip"], ~tested["clip"].duplicated(), "is tested twice: a clip counts once")
    clips = read_clips(processed_dir, tested)
    columns = class_columns(class_names, clips)
    check_rows(tested["classID"], tested["classID"].isin(columns), f"has no column: the columns are of {[*columns]}")
    return Predictions(
        class_names=class_names,
        names=tested["clip"].tolist(),
        folds=tested["fold"].to_numpy(),
        true=tested["classID"].map(columns).to_numpy(),
        probabilities=np.concatenate(probabilities),
        clips=clips,
    )


def read_clips(processed_dir, tested):
    """Return clips.csv by file name; None if there is none, or if it lacks a tested clip.

    tested: DataFrame of clip, classID and fold (0-indexed). UserError where they differ from those of clips.csv.
    """
    path = Path(processed_dir) / "clips.csv" if processed_dir else None
    if path is None or not path.is_file():
        return None
    clips = data_loader.read_clip_table(path).set_index("slice_file_name")
    if not tested["clip"].isin(clips.index).all():
        return None
    own = clips.loc[tested["clip"]]
    for column, values in (("classID", tested["classID"]), ("fold", tested["fold"] + 1)):
        is_own = values.to_numpy() == own[column].to_numpy()
        check_rows(values, is_own, f"is not the clip's in {path}: these files don't belong together")
    return clips


def class_columns(class_names, clips):
    """Return {classID: column} of the probabilities: as clips.csv numbers the classes, else in order from 0."""
    ids = {} if clips is None else dict(zip(clips["class"], clips["classID"].tolist(), strict=True))
    has_all = all(name in ids for name in class_names)
    return {ids[name] if has_all else column: column for column, name in enumerate(class_names)}


def read_prediction_file(path):
    """Return (class names, file names, classIDs, probabilities (clips, classes)) of one fold's file."""
    header, rows = read_csv(path)
    is_unique = len(set(header)) == len(header) and all(name and name.isprintable() for name in header)
    if header[:2] != ["slice_file_name", "classID"] or len(header) < 3 or not is_unique:
        raise UserError(
            f"{path}, line 1: the columns are {utils.one_line(', '.join(header))}; they must be slice_file_name, "
            "classID and one for each class, each once"
        )
    if rows.empty:
        raise UserError(f"{path} has no clips: remove it, or test the fold again")
    names, class_ids, texts = rows["slice_file_name"], rows["classID"], rows.iloc[:, 2:]
    check_rows(names, names.map(str.isprintable), "is no file name")
    check_rows(class_ids, class_ids.str.fullmatch(r"\d{1,9}"), "is not a whole number")
    values = texts.apply(pd.to_numeric, errors="coerce").to_numpy(float)  # (clips, classes); NaN is no number
    sums = np.clip(values, -1, 2).sum(axis=1)  # clipped, so that none overflows
    is_distribution = (values >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE)
    shown = pd.Series(map(", ".join, texts.to_numpy()), rows.index, name="probabilities")
    check_rows(shown, is_distribution, "must be numbers of at least 0 with the sum 1")
    return header[2:], names.tolist(), class_ids.astype(int).tolist(), values


def read_history(results_dir, fold):
    """Return {column: (epochs,) floats} of a fold's history; NaN where a value is empty. None if there is no file."""
    path = Path(results_dir) / f"history_fold_{fold}.csv"
    if not path.is_file():
        return None
    header, rows = read_csv(path)
    if missing := [column for column in HISTORY_COLUMNS if header.count(column) != 1]:
        raise UserError(f"{path}, line 1: it must have the column {', '.join(missing)}, once")
    values = {column: pd.to_numeric(rows[column], errors="coerce") for column in HISTORY_COLUMNS}
    for column, numbers in values.items():
        check_rows(rows[column], numbers.notna() | rows[column].isin(["", "nan"]), "is not a number")
    return {column: numbers.to_numpy(float) for column, numbers in values.items()}


def read_csv(path):
    """Return (header, rows) of a CSV file: a list of str, and a DataFrame of str whose index is "<path>, line <n>"."""
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, nothing in it, more values in a line than in the first
        raise UserError(f"{path} is not a CSV file ({utils.one_line(error)}): test the fold again") from error
    header, rows = table.iloc[0].tolist(), table.iloc[1:]
    return header, rows.set_axis(header, axis=1).set_axis([f"{path}, line {row + 1}" for row in rows.index])


def check_rows(column, is_right, fault):
    """Raise a UserError that names the first value of a column that is not right; its index says where it stands."""
    if not np.all(is_right):
        row = int(np.argmin(is_right))
        value = utils.one_line(column.iloc[row])
        raise UserError(f"{column.index[row]}: {column.name} {value!r} {fault}; correct it, or test the fold again")


def read_run(results_dir):
    """Return the dict of run.json, {} if there is none. UserError for a value that can't be right."""
    path = Path(results_dir) / "run.json"
    run = utils.load_json(path) if path.is_file() else {}
    remedy = "run python train.py again, or remove the file"
    try:
        json.dumps(run, indent=2, allow_nan=False, ensure_ascii=False).encode()  # as results.json will hold it
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a value that JSON can't hold ({utils.one_line(error)}): {remedy}") from error
    if not isinstance(run, dict) or any(not isinstance(run.get(key, kind()), kind) for key, kind in RUN_TYPES.items()):
        raise UserError(f"{path} does not describe a run: {remedy}")
    if run.get("validation", "none") not in VALIDATIONS:
        raise UserError(f"{path}: validation is {utils.one_line(run['validation'])!r}, none of {VALIDATIONS}: {remedy}")
    numbers = {"n_folds": run.get("n_folds", 1)}
    for key in ("best_epochs", "temperatures"):
        numbers |= {f"{key} of fold {fold}": value for fold, value in run.get(key, {}).items()}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:
            name, value = utils.one_line(name), utils.one_line(value)
            raise UserError(f"{path}: {name} is {value!r}, not a number above 0 and up to {MAX_NUMBER:g}: {remedy}")
    return run


# --- Scores ------------------------------------------------------------------------------------------------------
# scikit-learn and scipy.stats are imported where they are used: they take a second.


def class_scores(true, predicted, n_classes):
    """Return (precision, recall, F1, clips) of each class, (n_classes,) each; NaN where a class gives no value.

    A class without test clips has no recall and no F1; one that was never predicted has no precision, and F1 = 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, clips = precision_recall_fscore_support(
        true, predicted, labels=range(n_classes), zero_division=np.nan
    )
    return precision, recall, np.where(clips > 0, f1, np.nan), clips


def macro_f1(true, predicted):
    """Return the mean F1 of the classes that have test clips: each class counts alike."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, labels=np.unique(true), average="macro"))


def sample_std(values):
    """Return the sample standard deviation (n - 1); None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval_95(values):
    """Return [low, high] of the 95 % interval of the mean, mean ± t(0.975, n - 1) std / sqrt(n), cut to 0 ... 1.

    None for fewer than two values. Folds share training clips, so that the true interval is a little wider.
    """
    if len(values) < 2:
        return None
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * sample_std(values) / np.sqrt(len(values))
    return [max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))]


def paired_test(right_a, right_b):
    """Compare two runs on the same clips by McNemar's test: only the clips that one of the two alone got right count.

    right_a, right_b: (clips,) bools. Returns {"clips", "accuracy_a", "accuracy_b", "only_a", "only_b", "p_value"}; p is
    that of an exact two-sided binomial test of only_a : only_b against 1/2.
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
    bin_of = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(int) - 1, 0, CONFIDENCE_BINS - 1)  # (clips,)
    bins = [
        {
            "from": index / CONFIDENCE_BINS,
            "to": (index + 1) / CONFIDENCE_BINS,
            "clips": int((bin_of == index).sum()),
            "confidence": mean_or_none(confidence[bin_of == index]),
            "accuracy": mean_or_none(correct[bin_of == index]),
        }
        for index in range(CONFIDENCE_BINS)
    ]
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
    from sklearn.metrics import confusion_matrix

    names, true, predicted = predictions.class_names, predictions.true, predictions.predicted
    correct = true == predicted
    per_fold, fold_scores = [], []
    for fold in np.unique(predictions.folds).tolist():
        here = predictions.folds == fold
        fold_scores.append(class_scores(true[here], predicted[here], len(names)))
        per_fold.append(
            {
                "fold": fold,
                "dataset_fold": fold + 1,
                "clips": int(here.sum()),
                "accuracy": float(correct[here].mean()),
                "best_epoch": run.get("best_epochs", {}).get(str(fold)),
                "macro_f1": macro_f1(true[here], predicted[here]),
            }
        )
    accuracies = [row["accuracy"] for row in per_fold]
    clips, protocol = predictions.clips, run.get("validation")
    salience = np.full(len(true), "") if clips is None else clips.loc[predictions.names, "salience"].to_numpy(str)
    confusion = confusion_matrix(true, predicted, labels=range(len(names)))  # rows true, columns predicted
    return {
        "protocol": protocol,
        "optimistic": None if protocol is None else protocol == "test_fold",
        "note": OPTIMISTIC if protocol == "test_fold" else None,
        "folds_present": len(per_fold),
        "folds_total": run.get("n_folds") if clips is None else int(clips["fold"].nunique()),
        "clips": len(true),
        "clips_total": None if clips is None else len(clips),
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_std": sample_std(accuracies),
        "accuracy_interval_95": interval_95(accuracies),
        "accuracy_all_clips": float(correct.mean()),
        "macro_f1": macro_f1(true, predicted),
        "foreground_accuracy": mean_or_none(correct[salience == "1"]),
        "foreground_clips": int((salience == "1").sum()),
        "background_accuracy": mean_or_none(correct[salience == "2"]),
        "background_clips": int((salience == "2").sum()),
        "per_fold": per_fold,
        "per_class": summarise_classes(names, class_scores(true, predicted, len(names))),
        "agreement": summarise_agreement(names, fold_scores),
        "confidence": summarise_confidence(predictions, run.get("temperatures", {})),
        "class_names": names,
        "confusion_matrix": confusion.tolist(),
        "worst_confusions": worst_confusions(predictions, confusion),
        "recordings": summarise_recordings(predictions),
        "run": run,
    }


def mean_or_none(values):
    return float(values.mean()) if len(values) else None


def number(value):
    """Return a number as JSON can hold it: None for NaN."""
    return None if np.isnan(value) else float(value)


def summarise_classes(names, scores):
    """Return {class: {"precision", "recall", "f1", "clips"}} over all test clips; scores: see `class_scores`."""
    return {
        name: {"precision": number(precision), "recall": number(recall), "f1": number(f1), "clips": int(clips)}
        for name, precision, recall, f1, clips in zip(names, *scores, strict=True)
    }


def summarise_agreement(names, fold_scores):
    """Return how far the folds agree: each class's recall and F1 in every fold, its spread, the most varied class.

    fold_scores: what `class_scores` returns, of each fold.
    """
    _, recall, f1, _ = (np.array(scores) for scores in zip(*fold_scores, strict=True))  # (folds, classes)
    classes = {}
    for column, name in enumerate(names):
        classes[name] = {
            "recall": [number(value) for value in recall[:, column]],  # in the order of per_fold
            "f1": [number(value) for value in f1[:, column]],
            "recall_std": sample_std(recall[~np.isnan(recall[:, column]), column]),
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
    for fold in np.unique(predictions.folds).tolist():
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
    """Return the most frequent confusions as dicts, each with the clips that were mistaken most confidently."""
    names = predictions.class_names
    clips = pd.DataFrame({"true": predictions.true, "predicted": predictions.predicted, "name": predictions.names})
    clips["confidence"] = predictions.probabilities.max(axis=1)
    wrong = clips[clips["true"] != clips["predicted"]].sort_values(["confidence", "name"], ascending=[False, True])
    groups = sorted(wrong.groupby(["true", "predicted"]), key=lambda group: (-len(group[1]), group[0]))
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "clips": len(rows),
            "share": len(rows) / int(confusion[true].sum()),  # of the true class's clips
            "examples": rows["name"].head(EXAMPLES_LISTED).tolist(),
        }
        for (true, predicted), rows in groups[:CONFUSIONS_LISTED]
    ]


def summarise_recordings(predictions):
    """Return {"count", "accuracy", "most_errors"} of the recordings (fsID) that the clips were cut from.

    Clips of one recording are alike, and tend to be right or wrong together: "accuracy" is the mean over recordings of
    the share of their clips that are right. None where there is no clips.csv.
    """
    if predictions.clips is None:
        return None
    names = np.array(predictions.class_names)
    clips = pd.DataFrame({"class": names[predictions.true], "predicted": names[predictions.predicted]})
    clips["recording"] = predictions.clips.loc[predictions.names, "fsID"].astype(str).to_numpy()
    clips["wrong"] = clips["class"] != clips["predicted"]
    recordings = clips.groupby(["recording", "class"])["wrong"].agg(["size", "sum"]).reset_index()
    worst = recordings[recordings["sum"] > 0].sort_values(["sum", "recording", "class"], ascending=[False, True, True])
    wrong = clips[clips["wrong"]].set_index(["recording", "class"])["predicted"]
    return {
        "count": len(recordings),
        "accuracy": float((1 - recordings["sum"] / recordings["size"]).mean()),
        "most_errors": [
            {
                "recording": row["recording"],
                "class": row["class"],
                "clips": row["size"],
                "wrong": row["sum"],
                "taken_for": wrong.loc[[(row["recording"], row["class"])]].mode()[0],  # the first of equals by name
            }
            for row in worst.head(RECORDINGS_LISTED).to_dict("records")
        ],
    }
