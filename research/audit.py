"""Can the numbers be trusted? Look for leaks in the processed data and in the results of a training.

    python -m research.audit                                  # everything in the assets folder
    python -m research.audit --processed_dir DATA --assets_dir ~/sweep/lr1e-3

Prints one line a finding, or 'nothing found' with what was looked at; exit status 1 if there is a finding. train.py
ends with the same checks:

- a clip's features that are in two folds: what is tested was trained on
- one cell of the spectrogram that tells the class: the label got into the features
- class names or numbers that differ between data, model and predictions
- a model whose training clips or normalisation include its test fold
- checkpoints that are damaged; models, predictions and histories that are missing or of a run before this one
- predictions of other clips than the fold's own, or that the model file does not reproduce
"""

import functools
import hashlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import checkpoint
import data_loader
import utils
from model import logits_of
from model_file import load_model, model_path
from reports import metrics
from utils import UserError

FEW_CLIPS = 1000  # with fewer, one of 22,000 cells may come near to the class by chance
LABEL_SHARE = 0.98  # of a cell's variance that the class explains; 0.39 in 2,148 real clips, 0.92 in the miniature
SHOWN = 8  # clips with the same features
REPRODUCED_CLIPS = 32  # clips a fold whose predictions are computed again
PROBABILITY_TOLERANCE = 1e-3  # between machines
STATISTICS_TOLERANCE = 1e-3  # dB


def duplicates_across_folds(data):
    """Return a finding if clips of different folds have the same features; it names the first of them."""
    digests = pd.Series([hashlib.blake2b(np.ascontiguousarray(clip)).digest() for clip in data.features])
    is_shared = data.clips.groupby(digests)["fold"].transform("nunique") > 1
    if not is_shared.any():
        return []
    first = data.clips[is_shared & (digests == digests[is_shared].iloc[0])].head(SHOWN)
    names = ", ".join(first["slice_file_name"] + " (fold " + first["fold"].astype(str) + ")")
    return [f"the same features are in several folds, {is_shared.sum()} clips in all, such as {names}"]


def cells_that_tell_the_class(data):
    """Return a finding if one cell of the features gives the class away.

    The measure is the correlation ratio of each cell (between-class share of its variance; R. A. Fisher, "Statistical
    Methods for Research Workers", 1925): near 1 means that the cell's value names the class.
    """
    mean = data.features.mean(axis=0, dtype=np.float64)  # (n_mels, n_frames)
    within, between = np.zeros_like(mean), np.zeros_like(mean)
    for label in np.unique(data.labels):  # one class at a time: no copy of all features
        clips = data.features[data.labels == label].astype(np.float32)
        class_mean = clips.mean(axis=0)
        within += ((clips - class_mean) ** 2).sum(axis=0)
        between += len(clips) * (class_mean - mean) ** 2
    share = between / np.maximum(within + between, 1e-6 * len(data.labels))  # a constant cell tells nothing
    band, frame = np.unravel_index(share.argmax(), share.shape)
    if share[band, frame] < (LABEL_SHARE if len(data.labels) >= FEW_CLIPS else 0.999):
        return []
    told = f"{share[band, frame]:.1%} of its variance is between classes"
    return [f"the label is in the features: mel band {band}, frame {frame} alone tells the class ({told})"]


def check_model(name, network, info, data, fold):
    """Return findings on a model: its class names, its training clips, its normalisation."""
    findings = []
    if dict(zip(info["class_ids"], info["class_names"], strict=True)) != data.class_names:
        findings.append(f"{name} has the classes {info['class_names']}, the data {list(data.class_names.values())}")
    folds = info.get("training_folds")
    if not isinstance(folds, list) or not all(type(number) is int for number in folds):
        return [*findings, f"{name} does not say on which folds it was trained"]
    if fold != utils.NO_FOLD and fold + 1 in folds:
        findings.append(f"{name} was trained on clips of the fold that tests it (the data set's fold {fold + 1})")
    training = np.flatnonzero(np.isin(data.folds, folds))
    if not len(training) or data_loader.names_digest(data.clips, training) != info.get("training_digest"):
        return [*findings, f"{name} was not trained on the clips of folds {utils.one_line(folds)}, as it says"]
    statistics = data_loader.band_statistics(data.features, training)
    for buffer, expected in zip(("band_mean", "band_std"), statistics, strict=True):
        off = float(np.abs(network.get_buffer(buffer).numpy() - expected).max())
        if not off <= STATISTICS_TOLERANCE:  # NaN is not
            findings.append(f"{name} is not normalised by its own training clips: {buffer} is up to {off:.3g} dB off")
    return findings


def check_predictions(name, predictions, network, info, data, fold):
    """Return findings on a fold's predictions, as `metrics.read_prediction_file` returns them.

    They must be of the fold's clips, with their classIDs, and what the model gives.
    """
    class_names, tested, class_ids, probabilities = predictions
    if class_names != info["class_names"]:
        return [f"{name} has the columns {class_names}, its model the classes {info['class_names']}"]
    names = data.clips["slice_file_name"]
    own = names[data.folds == fold + 1].tolist()
    if sorted(tested) != sorted(own):
        odd = sorted(set(tested) ^ set(own)) or ["one of them twice"]
        return [f"{name} does not test the clips of its fold once each: {len(odd)} differ, such as {odd[0]}"]
    indices = pd.Index(names).get_indexer(tested)  # (tested,)
    if len(wrong := np.flatnonzero(data.labels[indices] != class_ids)):
        return [f"{name} has a different classID than the data for {len(wrong)} clips: {tested[wrong[0]]}, ..."]
    sample = slice(None, None, max(len(tested) // REPRODUCED_CLIPS, 1))
    computed = logits_of(network, data.features[indices[sample]]).softmax(dim=1).numpy()  # (sample, classes)
    off = np.abs(computed - probabilities[sample]).max(axis=1)  # (sample,)
    if off.max() <= PROBABILITY_TOLERANCE:
        return []
    return [f"{name} is not what its model predicts: {tested[sample][int(off.argmax())]} is {off.max():.3f} off"]


def damaged_checkpoints(folder):
    """Return a finding for each file in a fold's checkpoints that can't be used."""
    readers = {folder / "best_model_this_fold.pt": checkpoint.read_pt}
    for epoch in checkpoint.checkpoint_epochs(folder):
        readers[folder / f"epoch_{epoch}.pt"] = functools.partial(checkpoint.load_checkpoint, epoch=epoch)
        readers[folder / f"epoch_{epoch}.safetensors"] = load_model
    findings = []
    for path in filter(Path.exists, readers):
        try:
            readers[path](path)
        except Exception as error:  # a damaged file makes torch.load raise anything
            findings.append(f"{path} is damaged ({utils.one_line(error, longest=80)}): remove it")
    return findings


def audit(paths, data=None):
    """Return (findings, what was looked at), both lists of lines, for a run's folders.

    paths: .processed, .checkpoints, .models, .results; data: what .processed holds, if that is loaded already.
    UserError if it can't be. A damaged checkpoint, model or prediction file is a finding.
    """
    data = data or data_loader.load_processed(paths.processed)
    findings = duplicates_across_folds(data) + cells_that_tell_the_class(data)
    looked_at = [f"{len(data.labels)} clips of {utils.one_line(data.info['source'])}"]
    files = metrics.read_run(paths.results).get("files", {})
    is_everything = model_path(paths.models, utils.NO_FOLD).is_file() or utils.NO_FOLD in files
    for fold in [*np.unique(data.folds - 1).tolist(), *([utils.NO_FOLD] if is_everything else [])]:
        findings += damaged_checkpoints(checkpoint.fold_dir(paths.checkpoints, fold))
        path = model_path(paths.models, fold)
        predictions = checkpoint.result_path(paths.results, "predictions", fold)
        for name, digest in checkpoint.file_digests(paths, fold).items():
            if files and digest != files.get(str(fold), {}).get(name):
                is_what = "is not of the run in run.json" if digest else "is missing"
                findings.append(
                    f"the {name} file of fold {fold} {is_what}: run python train.py, or remove what is left"
                )
        if not path.is_file():
            continue
        try:
            network, info = load_model(path)
            looked_at.append(path.name)
            findings += check_model(path.name, network, info, data, fold)
            if predictions.is_file():
                looked_at.append(predictions.name)
                tested = metrics.read_prediction_file(predictions)
                findings += check_predictions(predictions.name, tested, network, info, data, fold)
        except UserError as error:
            findings.append(str(error))
    return findings, looked_at


def report(paths, data=None):
    """Run the audit, print it, and return whether nothing was found."""
    try:
        findings, looked_at = audit(paths, data)
    except UserError as error:
        findings = [str(error)]
    for finding in findings:
        print(f"audit: {finding}", file=sys.stderr)
    if not findings:
        print(f"audit: nothing found in {looked_at[0]} and {len(looked_at) - 1} files of models and predictions")
    return not findings


def main():
    parser = utils.make_parser(__doc__)
    for flag, what in (("processed", "processed files"), ("model", "models"), ("results", "predictions")):
        parser.add_argument(f"--{flag}_dir", metavar="DIR", help=f"{what} (default: in the assets)")
    if not report(utils.run_folders(parser.parse_args())):
        sys.exit(1)


if __name__ == "__main__":
    utils.run(main)
