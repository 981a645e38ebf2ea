"""The numbers of the report: what the tested folds left in a results folder is read, checked and scored here.

All shares are between 0 and 1. A value that does not exist (the recall of a class without test clips, the spread of
one fold) is None in the results and NaN in arrays, never 0. A file that can't be right is a UserError that names the
file and the line: it may have been edited, cut off, or come from elsewhere.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd

import data_loader
import utils
from utils import UserError, file_digest

HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
VALIDATIONS = "next_fold", "none", "test_fold"
MAX_NUMBER = 1e6  # of folds, epochs, a temperature
SUM_TOLERANCE = 1e-3  # the probabilities of a clip must sum to 1 within this
CONFUSIONS_LISTED = 10
CONFIDENCE_BINS = 15  # of equal width, as in Guo et al. 2017
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
    left_out: list = dataclasses.field(default_factory=list)  # names of files that are of a different run than run.json

    @property
    def predicted(self):
        """The likeliest class of each clip, (clips,); the first of equals."""
        return self.probabilities.argmax(axis=1)


# --- Reading -----------------------------------------------------------------------------------------------------


def read_results(results_dir, processed_dir=None):
    """Return the results of a folder of predictions, as results.json has them; nothing is written."""
    return summarise(read_predictions(results_dir, processed_dir), read_run(results_dir))


def read_predictions(results_dir, processed_dir=None):
    """Return the Predictions of every fold in a results folder, checked. Files of a run before run.json's are left out.

    processed_dir: the folder of clips.csv, which has salience and recordings, and all clips and folds there are.
    UserError names the file and line of what can't be right: values that are no probabilities, a clip tested twice or
    in a fold that is not its own, classes that differ between folds.
    """
    paths = {fold: Path(results_dir) / f"predictions_fold_{fold}.csv" for fold in range(utils.MAX_FOLDS)}
    paths = {fold: path for fold, path in paths.items() if path.exists()}
    run = read_run(results_dir)
    own = run.get("files", {})
    left_out = [fold for fold in paths if own and file_digest(paths[fold]) != own.get(str(fold), {}).get("predictions")]
    left_out = [paths.pop(fold).name for fold in left_out]
    if not paths:
        what = f" of the run in run.json, but {', '.join(left_out)}" if left_out else ""
        raise UserError(f"no predictions{what} in {results_dir}: run python train.py first")
    class_names, tables, probabilities = None, [], []
    for fold, path in paths.items():
        columns, names, class_ids, rows = read_prediction_file(path)
        class_names = class_names or columns
        if columns != class_names:
            raise UserError(f"{path}, line 1: its classes {columns} are not those of the folds before, {class_names}")
        lines = [f"{path}, line {line}" for line in range(2, len(names) + 2)]
        tables.append(pd.DataFrame({"clip": names, "classID": class_ids, "fold": fold}, index=lines))
        probabilities.append(rows)
    tested = pd.concat(tables)
    data_loader.check_rows(tested["clip"], ~tested["clip"].duplicated(), "is tested twice: a clip counts once")
    clips = read_clips(processed_dir, tested)
    ids = run.get("class_ids", {}) if clips is None else clips.set_index("class")["classID"].to_dict()
    columns = {ids.get(name, column): column for column, name in enumerate(class_names)}
    data_loader.check_rows(
        tested["classID"], tested["classID"].isin(columns), f"has no column: the columns are of {[*columns]}"
    )
    return Predictions(
        class_names=class_names,
        names=tested["clip"].tolist(),
        folds=tested["fold"].to_numpy(),
        true=tested["classID"].map(columns).to_numpy(),
        probabilities=np.concatenate(probabilities),
        clips=clips,
        left_out=left_out,
    )


def read_clips(processed_dir, tested):
    """Return clips.csv by file name; None if there is none, or if it lacks a tested clip.

    tested: DataFrame of clip, classID and fold (0-indexed). UserError where they differ from those of clips.csv.
    """
    path = Path(processed_dir or "") / "clips.csv"
    if not processed_dir or not path.is_file():
        return None
    clips = data_loader.read_clip_table(path).set_index("slice_file_name")
    if not tested["clip"].isin(clips.index).all():
        return None
    own = clips.loc[tested["clip"]]
    for column, values in (("classID", tested["classID"]), ("fold", tested["fold"] + 1)):
        is_own = values.to_numpy() == own[column].to_numpy()
        data_loader.check_rows(values, is_own, f"is not the clip's in {path}: these files don't belong together")
    return clips


def read_prediction_file(path):
    """Return (class names, file names, classIDs, probabilities (clips, classes)) of one fold's file."""
    rows = data_loader.read_table(path, ["slice_file_name", "classID"])
    names, class_ids, texts = rows.pop("slice_file_name"), data_loader.whole_numbers(rows.pop("classID")), rows
    if texts.empty or not all(map(data_loader.is_class_name, texts)):
        found = utils.one_line(", ".join(texts))
        raise UserError(f"{path}, line 1: a column for each class must be there, with its name: {found}")
    data_loader.check_rows(names, names.map(str.isprintable), "is no file name")
    values = texts.apply(pd.to_numeric, errors="coerce").to_numpy(float)  # (clips, classes); NaN is no number
    sums = np.clip(values, -1, 2).sum(axis=1)  # clipped, so that none overflows
    is_distribution = (values >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE)
    shown = pd.Series(map(", ".join, texts.to_numpy()), rows.index, name="probabilities")
    data_loader.check_rows(shown, is_distribution, "must be numbers of at least 0 with the sum 1")
    return [*texts], names.tolist(), class_ids.tolist(), values


def read_history(results_dir, fold):
    """Return a fold's history as a DataFrame of HISTORY_COLUMNS; NaN where a value is empty.

    None if there is no file, or if it is not the one that the run in run.json wrote. UserError if a column is missing,
    or a value is not a number.
    """
    path = Path(results_dir) / f"history_fold_{fold}.csv"
    own = read_run(results_dir).get("files", {}).get(str(fold), {}).get("history")
    if not path.is_file() or (own and file_digest(path) != own):
        return None
    texts = data_loader.read_table(path, HISTORY_COLUMNS)[HISTORY_COLUMNS]
    history = texts.apply(pd.to_numeric, errors="coerce")
    for name in HISTORY_COLUMNS:
        data_loader.check_rows(texts[name], history[name].notna() | (texts[name] == ""), "is not a number")
    return history.reset_index(drop=True)


def read_run(results_dir):
    """Return the dict of run.json, {} if there is none. UserError if a value can't be right."""
    path = Path(results_dir) / "run.json"
    run = utils.load_json(path) if path.is_file() else {}
    try:
        json.dumps(run, allow_nan=False, ensure_ascii=False).encode()  # as results.json will hold it
        numbers = [run.get("n_folds", 1), *run.get("best_epochs", {}).values(), *run.get("temperatures", {}).values()]
        is_run = (
            run.get("validation", "none") in VALIDATIONS
            and isinstance(run.get("settings", {}), dict)
            and all(type(number) in (int, float) and 0 < number <= MAX_NUMBER for number in numbers)
            and all(type(class_id) is int for class_id in run.get("class_ids", {}).values())
            and all(isinstance(digests, dict) for digests in run.get("files", {}).values())
        )
    except (AttributeError, ValueError, RecursionError):
        is_run = False
    if not is_run:
        raise UserError(f"{path} does not describe a run: run python train.py again, or remove the file")
    return run


# --- Scores ------------------------------------------------------------------------------------------------------
# scikit-learn and scipy.stats are imported where they are used: they take a second.


def class_scores(true, predicted, class_names):
    """Return a DataFrame of precision, recall, f1 and clips, a row a class; None where a class gives no value.

    true, predicted: (clips,) indices of classes. A class without test clips has no recall and no F1; one that was never
    predicted has no precision, and F1 = 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    values = precision_recall_fscore_support(true, predicted, labels=range(len(class_names)), zero_division=np.nan)
    scores = pd.DataFrame(dict(zip(("precision", "recall", "f1", "clips"), values, strict=True)), class_names)
    scores.loc[scores["clips"] == 0, "f1"] = np.nan
    return scores.astype(object).where(scores.notna(), None)


def spread(values):
    """Return (std, [low, high]): the sample std (n - 1), and the 95 % interval of the mean, cut to 0 ... 1.

    The interval is mean ± t(0.975, n - 1) std / sqrt(n). Both are None for fewer than two values.
    """
    if len(values) < 2:
        return None, None
    from scipy import stats

    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    return std, [max(0.0, mean - half), min(1.0, mean + half)]


def with_temperature(probabilities, temperature):
    """Return softmax(log(p) / T) of probabilities (clips, classes), which is p^(1/T) made to sum to 1.

    temperature: T > 0, one or (clips, 1).
    """
    powers = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def reliability(confidence, correct):
    """Return {"ece", "bins"}: how far confidence is from the share of right answers; bins without clips are left out.

    confidence: (clips,) probability of the predicted class; correct: (clips,) bools. With the clips in bins of equal
    width of confidence, the expected calibration error (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities
    Using Bayesian Binning"; 15 bins as Guo et al. 2017, arXiv:1706.04599) is
        ECE = sum over bins of clips in bin / clips * |accuracy of bin - mean confidence of bin|
    """
    bin_of = np.clip(np.ceil(confidence * CONFIDENCE_BINS) - 1, 0, CONFIDENCE_BINS - 1)  # (clips,)
    clips = pd.DataFrame({"bin": bin_of.astype(int), "confidence": confidence, "accuracy": correct})
    bins = clips.groupby("bin").mean()  # those that have clips
    bins["clips"] = clips["bin"].value_counts()
    bins["from"], bins["to"] = bins.index / CONFIDENCE_BINS, (bins.index + 1) / CONFIDENCE_BINS
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return {"ece": float((bins["clips"] * gaps).sum() / len(clips)), "bins": bins.to_dict("records")}


# --- From predictions to results -----------------------------------------------------------------------------------


def summarise(predictions, run):
    """Return the results, as results.json has them: plain values, None where there is none. run: see `read_run`."""
    from sklearn.metrics import confusion_matrix

    names, true, predicted = predictions.class_names, predictions.true, predictions.predicted
    correct = true == predicted
    scores, per_fold, recalls = class_scores(true, predicted, names), [], []
    for fold in np.unique(predictions.folds).tolist():
        here = predictions.folds == fold
        fold_scores = class_scores(true[here], predicted[here], names)
        recalls.append(fold_scores["recall"])
        per_fold.append(
            {
                "fold": fold,
                "dataset_fold": fold + 1,
                "clips": int(here.sum()),
                "accuracy": float(correct[here].mean()),
                "best_epoch": run.get("best_epochs", {}).get(str(fold)),
                "macro_f1": float(fold_scores["f1"].dropna().mean()),
            }
        )
    accuracies = [row["accuracy"] for row in per_fold]
    confusions = confusion_matrix(true, predicted, labels=range(len(names)))  # (classes, classes), rows are true
    std, interval = spread(accuracies)
    clips, protocol = predictions.clips, run.get("validation")
    has_salience = clips is not None and "salience" in clips
    salience = clips.loc[predictions.names, "salience"].to_numpy(str) if has_salience else np.full(len(true), "")
    by_salience = pd.Series(correct).groupby(salience).mean().to_dict()
    return {
        "protocol": protocol,
        "optimistic": None if protocol is None else protocol == "test_fold",
        "note": OPTIMISTIC if protocol == "test_fold" else None,
        "folds_present": len(per_fold),
        "folds_total": run.get("n_folds") if clips is None else int(clips["fold"].nunique()),
        "clips": len(true),
        "clips_total": None if clips is None else len(clips),
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_std": std,
        "accuracy_interval_95": interval,
        "accuracy_all_clips": float(correct.mean()),
        "accuracy_recordings": recording_accuracy(predictions),
        "macro_f1": float(scores["f1"].dropna().mean()),
        "foreground_accuracy": by_salience.get("1"),
        "background_accuracy": by_salience.get("2"),
        "per_fold": per_fold,
        "per_class": scores.to_dict("index"),
        "recall_per_fold": pd.concat(recalls, axis=1).T.to_dict("list"),  # of each class, in the order of per_fold
        "confidence": summarise_confidence(predictions, run.get("temperatures", {})),
        "class_names": names,
        "confusion_matrix": confusions.tolist(),
        "worst_confusions": most_frequent_confusions(confusions, names),
        "left_out": predictions.left_out,
        "run": run,
    }


def summarise_confidence(predictions, temperatures):
    """Return the reliability "before" and "after" the folds' temperatures, {str(fold): temperature}.

    "after" is None unless every fold has one: the two are of the same clips.
    """
    correct = predictions.true == predictions.predicted  # a temperature moves no clip to another class
    own = [temperatures.get(str(fold)) for fold in predictions.folds]
    values = {"before": reliability(predictions.probabilities.max(axis=1), correct), "after": None}
    if None not in own:
        after = with_temperature(predictions.probabilities, np.array(own)[:, None])  # (clips, classes)
        values["after"] = reliability(after.max(axis=1), correct)
    return values


def most_frequent_confusions(counts, class_names):
    """Return the most frequent confusions as dicts of true, predicted, clips, and share of the true class's clips.

    counts: confusion matrix, (classes, classes), rows are true.
    """
    table = pd.DataFrame(counts, pd.Index(class_names, name="true"), pd.Index(class_names, name="predicted"))
    cells = table.stack().rename("clips").reset_index()
    cells["share"] = cells["clips"] / cells["true"].map(table.sum(axis=1))
    wrong = cells[(cells["true"] != cells["predicted"]) & (cells["clips"] > 0)]
    return wrong.nlargest(CONFUSIONS_LISTED, "clips").to_dict("records")


def recording_accuracy(predictions):
    """Return the accuracy with every recording counted once, by the mean of its clips' distributions; None if unknown.

    A recording is a file, or what UrbanSound8K's clip was cut from (fsID). Its clips are alike.
    """
    known = () if predictions.clips is None else predictions.clips.columns
    column = next((name for name in ("recording", "fsID") if name in known), None)
    if column is None:
        return None
    recordings = [predictions.clips.loc[predictions.names, column].to_numpy(str), predictions.true]
    means = pd.DataFrame(predictions.probabilities).groupby(recordings).mean()  # (recordings, classes)
    return float((means.to_numpy().argmax(axis=1) == means.index.get_level_values(1)).mean())
