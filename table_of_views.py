"""What the views of AudioViews are worth: the test accuracy of each branch alone, of each pair, and of all three.

    python table_of_views.py ../runs/default_s*        # assets folders of trainings with --model AudioViews
    python table_of_views.py ../runs/default_s0 --processed_dir DATA

Every model in the folders tests the clips of its own fold again, in float32, with the branches' logits averaged over
each choice of them. Prints a row a choice: accuracy of each fold (mean of the folders), and the mean of the folds.
"""

import itertools
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import batches
import config
import data_loader
import utils
from model import VIEWS, AudioViews, find_model, folds_in, load_model
from reports import report
from utils import UserError

CLIPS_AT_ONCE = 64


@torch.inference_mode()
def branch_logits(network, info, features):
    """Return the logits of each branch, (3, clips, classes), of features (clips, rows, n_frames) in dB."""
    parts = []
    for start in range(0, len(features), CLIPS_AT_ONCE):
        clips = torch.from_numpy(features[start : start + CLIPS_AT_ONCE])
        parts.append(network.branch_logits(batches.normalise(clips, batches.statistics_of(info))))
    return torch.cat(parts, dim=1).numpy()


def choices():
    """Return the ways to choose one, two or all of the views, as tuples of their places."""
    places = range(len(VIEWS))
    return [choice for count in (1, 2, 3) for choice in itertools.combinations(places, count)]


def accuracies(path, data):
    """Return ({choice of views: accuracy}, fold) of a model file, on the clips of the 0-indexed fold that it tests."""
    network, info = load_model(path)
    if not isinstance(network, AudioViews):
        raise UserError(f"{path} is {info['model']}, which has no branches: name trainings with --model AudioViews")
    if not isinstance(info.get("fold"), int):
        raise UserError(f"{path} does not say which fold it tests: name models of this project's train.py")
    test = np.flatnonzero(data.folds == info["fold"] + 1)
    if not len(test):
        raise UserError(f"the processed files have no clips of fold {info['fold']}, which {path} tests")
    logits = branch_logits(network, info, data.features[test])  # (3, clips, classes)
    truth = data.labels[test]
    class_ids = np.array(info["class_ids"])
    found = {choice: class_ids[logits[list(choice)].mean(axis=0).argmax(axis=1)] for choice in choices()}
    return {choice: float((ids == truth).mean()) for choice, ids in found.items()}, info["fold"]


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR", help="assets folders of trainings, or their models/"
    )
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    args = parser.parse_args()
    utils.keep_freed_memory()
    data = data_loader.load_processed(utils.run_folders(args).processed)
    paths = []
    for folder in args.runs:
        models = folder / config.MODEL_DIR if (folder / config.MODEL_DIR).is_dir() else folder
        paths += [find_model(models, fold) for fold in folds_in(models)]
    if not paths:
        raise UserError(f"no models in {args.runs[0]}: name folders in which python train.py has ended")
    by_fold = {}
    for path in tqdm(paths, "models", disable=None, leave=False):
        values, fold = accuracies(path, data)
        by_fold.setdefault(fold, []).append(values)
    rows = []
    for choice in choices():
        means = [statistics.mean(values[choice] for values in by_fold[fold]) for fold in sorted(by_fold)]
        names = " + ".join(VIEWS[place] for place in choice)
        rows.append([names, *map(report.percent, means), report.percent(statistics.mean(means))])
    print(report.table(["views", *(f"fold {fold}" for fold in sorted(by_fold)), "mean"], rows))


if __name__ == "__main__":
    utils.run(main)
