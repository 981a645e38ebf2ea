"""Can the numbers be trusted? Look for leaks in the processed data and in the results of a training.

    python -m research.audit                                  # everything in the assets folder
    python -m research.audit --processed_dir DATA --assets_dir ~/sweep/lr1e-3

Prints one line a finding, or 'nothing found' with what was looked at; exit status 1 if there is a finding. train.py
ends with the same checks:

- a clip's features that are in two folds: what is tested was trained on
- one cell of the spectrogram that tells the class: the label got into the features
- class names or numbers that differ between data, model and predictions
- a model whose training clips or normalisation include its test fold
- predictions of other clips than the fold's own, or that the model file does not reproduce
"""

import hashlib
import sys

import numpy as np

import checkpoint
import data_loader
import utils
from model import load_model, logits_of, model_path
from reports import metrics
from utils import UserError

LABEL_SHARE = 0.98  # of a cell's variance that the class explains; 0.39 in 2,148 real clips, 0.92 in the miniature
SHOWN = 8  # clips of a group, and groups: a data set that is one great copy would fill the screen many times
REPRODUCED_CLIPS = 32  # clips a fold whose predictions are computed again
PROBABILITY_TOLERANCE = 1e-3  # between machines
STATISTICS_TOLERANCE = 1e-3  # dB


# --- The data ----------------------------------------------------------------------------------------------------


def duplicates_across_folds(data):
    """Return a finding for each of the first groups of clips with the same features in more than one fold."""
    groups = {}
    for index, clip in enumerate(data.features):
        groups.setdefault(hashlib.blake2b(np.ascontiguousarray(clip), digest_size=16).digest(), []).append(index)
    findings = []
    for group in groups.values():
        if len({int(data.folds[index]) for index in group}) > 1:
            names = [f"{data.clips['slice_file_name'].iloc[index]} (fold {data.folds[index]})" for index in group]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            findings.append(f"the same features are in several folds: {', '.join(names[:SHOWN])}{more}")
    if len(findings) > SHOWN:
        findings[SHOWN:] = [f"the same features are in several folds: {len(findings) - SHOWN} more groups of clips"]
    return findings


def cells_that_tell_the_class(data):
    """Return a finding if one cell of the features gives the class away.

    The measure is the correlation ratio of each cell (between-class share of its variance; R. A. Fisher, "Statistical
    Methods for Research Workers", 1925): near 1 means that the cell's value names the class.
    """
    total = np.zeros(data.features.shape[1:])  # (n_mels, n_frames)
    squares, between = np.zeros_like(total), np.zeros_like(total)
    for label in np.unique(data.labels):
        members = np.flatnonzero(data.labels == label)
        class_total = np.zeros_like(total)
        for index in members:  # one clip at a time: no copy of the features in float64
            clip = data.features[index].astype(np.float64)
            class_total += clip
            squares += clip**2
        total += class_total
        between += class_total**2 / len(members)
    mean = total / len(data.labels)
    variance, between = squares / len(data.labels) - mean**2, between / len(data.labels) - mean**2
    share = np.divide(between, variance, out=np.zeros_like(total), where=variance > 1e-6)
    band, frame = np.unravel_index(share.argmax(), share.shape)
    if share[band, frame] < LABEL_SHARE:
        return []
    return [
        f"the label is in the features: mel band {band}, frame {frame} alone tells the class "
        f"({share[band, frame]:.1%} of its variance is between classes; {(share >= LABEL_SHARE).sum()} such cells)"
    ]


# --- A fold's model and predictions ------------------------------------------------------------------------------


def check_model(name, network, info, data, fold):
    """Return findings on a model: its class names, its training clips, its normalisation."""
    findings = []
    if dict(zip(info["class_ids"], info["class_names"], strict=True)) != data.class_names:
        findings.append(f"{name} has the classes {info['class_names']}, the data {list(data.class_names.values())}")
    training_folds = info.get("training_folds")
    if not isinstance(training_folds, list) or not all(type(number) is int for number in training_folds):
        return [*findings, f"{name} does not say on which folds it was trained"]
    if fold + 1 in training_folds:
        findings.append(f"{name} was trained on clips of the fold that tests it (the data set's fold {fold + 1})")
    training = np.flatnonzero(np.isin(data.folds, training_folds))
    if not len(training) or data_loader.names_digest(data.clips, training) != info.get("training_digest"):
        return [*findings, f"{name} was not trained on the clips of folds {utils.one_line(training_folds)}, as it says"]
    statistics = data_loader.band_statistics(data.features, training)
    for statistic, expected in zip(("band_mean", "band_std"), statistics, strict=True):
        difference = float(np.abs(network.get_buffer(statistic).numpy() - expected).max())
        if not difference <= STATISTICS_TOLERANCE:
            findings.append(
                f"{name} is not normalised by its own training clips: {statistic} is up to {difference:.3g} dB off"
            )
    return findings


def check_predictions(path, network, info, data, fold):
    """Return findings on a fold's predictions: its clips, their classIDs, and whether the model gives them."""
    class_names, tested, class_ids, probabilities = metrics.read_prediction_file(path)
    if class_names != info["class_names"]:
        return [f"{path.name} has the columns {class_names}, its model the classes {info['class_names']}"]
    names = data.clips["slice_file_name"]
    own = names[data.folds == fold + 1].tolist()
    if sorted(tested) != sorted(own):
        odd = sorted(set(tested) ^ set(own)) or ["one of them twice"]
        return [f"{path.name} does not test the clips of its fold once each: {len(odd)} differ, such as {odd[0]}"]
    index_of = dict(zip(names, range(len(names)), strict=True))
    indices = np.array([index_of[name] for name in tested])
    wrong = np.flatnonzero(data.labels[indices] != class_ids)
    findings = []
    if len(wrong):
        findings.append(
            f"{path.name} has a different classID than the data for {len(wrong)} clips, such as {tested[wrong[0]]}"
        )
    sample = slice(None, None, max(len(tested) // REPRODUCED_CLIPS, 1))
    computed = logits_of(network, data.features[indices[sample]]).softmax(dim=1).numpy()  # (sample, classes)
    difference = np.abs(computed - probabilities[sample]).max(axis=1)  # (sample,)
    if not difference.max() <= PROBABILITY_TOLERANCE:
        worst = tested[sample][int(difference.argmax())]
        findings.append(f"{path.name} is not what its model predicts: {worst} is {difference.max():.3f} off")
    return findings


# --- Everything --------------------------------------------------------------------------------------------------


def audit(paths, data=None):
    """Return (findings, what was looked at), both lists of lines, for a run's folders.

    paths: .processed, .models, .results; data: what .processed holds, if that is loaded already. UserError if the
    processed files are not there or contradict each other. A damaged model or prediction file is a finding.
    """
    data = data or data_loader.load_processed(paths.processed)
    findings = duplicates_across_folds(data) + cells_that_tell_the_class(data)
    looked_at = [f"{len(data.labels)} clips"]
    for fold in np.unique(data.folds - 1).tolist():
        path = model_path(paths.models, fold)
        predictions = checkpoint.result_path(paths.results, "predictions", fold)
        if not path.is_file():
            continue
        try:
            network, info = load_model(path)
            looked_at.append(path.name)
            findings += check_model(path.name, network, info, data, fold)
            if predictions.is_file():
                looked_at.append(predictions.name)
                findings += check_predictions(predictions, network, info, data, fold)
        except UserError as error:
            findings.append(str(error))
    return findings, looked_at


def report(paths, data=None):
    """Run the audit, print it, and return whether nothing was found."""
    try:
        findings, looked_at = audit(paths, data)
    except UserError as error:
        findings, looked_at = [str(error)], []
    for finding in findings:
        print(f"audit: {finding}", file=sys.stderr)
    if not findings:
        print(f"audit: nothing found in {looked_at[0]} and {len(looked_at) - 1} files of models and predictions")
    return not findings


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    parser.add_argument("--model_dir", metavar="DIR", help="models (default: models/ in the assets)")
    parser.add_argument("--results_dir", metavar="DIR", help="predictions (default: results/ in the assets)")
    if not report(utils.run_folders(parser.parse_args())):
        sys.exit(1)


if __name__ == "__main__":
    utils.run(main)
