"""One table out of many trainings: what each recipe gives over its seeds, and how many errors fewer than another.

    python table_of_runs.py ../runs/*                           # assets folders, or their results/
    python table_of_runs.py ../runs/* --reference ../runs/plain_s0
    python table_of_runs.py ../runs/* --together                # and the accuracy of a recipe's networks together

Runs whose settings differ in the seed alone are one row: accuracy of each fold (mean of the seeds), their mean with the
standard deviation over the seeds, and the share of the reference's errors that are gone. Rows are sorted by accuracy.
Together: the networks of a fold, one a seed, answer with the mean of their logits, as those of AudioViews do.
"""

import json
import re
import statistics
from pathlib import Path

import numpy as np

import config
import evaluate
import report
import utils
from utils import UserError


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="assets folders of trainings, or results/")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a run of the recipe whose errors are compared")
    parser.add_argument("--together", action="store_true", help="also what the mean of the seeds' logits gives")
    return parser.parse_args()


def results_folder(folder):
    """Return the folder of results.json: the one given, or results/ in it. UserError if neither has it."""
    folder = Path(folder)
    for results_dir in (folder, folder / config.RESULTS_DIR):
        if (results_dir / "results.json").is_file():
            return results_dir
    raise UserError(f"no results.json in {folder}: name folders in which python train.py has ended")


def read_run(folder):
    """Return (settings without the seed, seed, {fold: accuracy}) of a training. UserError if it has no results."""
    results_dir = results_folder(folder)
    results = utils.load_json(results_dir / "results.json")
    settings = dict(results.get("run", {}).get("settings", {}))
    if not settings:
        raise UserError(f"{results_dir} does not say with which settings: run.json of train.py is missing there")
    return settings, settings.pop("seed"), {row["fold"]: row["accuracy"] for row in results["per_fold"]}


def group_runs(folders):
    """Return [(settings, [folder], {seed: {fold: accuracy}})], a recipe each. UserError if they differ in the folds."""
    groups, folds = {}, None
    for folder in folders:
        settings, seed, accuracies = read_run(folder)
        folds = folds or accuracies.keys()
        if accuracies.keys() != folds:
            raise UserError(f"{folder} tests the folds {sorted(accuracies)} and {folders[0]} {sorted(folds)}")
        key = json.dumps(settings, sort_keys=True)
        _, names, seeds = groups.setdefault(key, (settings, [], {}))
        if seed in seeds:
            raise UserError(f"{folder} and {names[0]} are the same recipe with the same seed, {seed}")
        names.append(folder)
        seeds[seed] = accuracies
    return list(groups.values())


def differences(settings):
    """Return what a recipe has other than config.py, as text."""
    defaults = {name.lower(): value for name, value in vars(config).items()}
    parts = [f"{name} {value}" for name, value in settings.items() if name != "data" and value != defaults.get(name)]
    return ", ".join(parts) or "as in config.py"


def accuracy_together(folders):
    """Return the mean over folds of the accuracy that the mean of the runs' logits has. UserError if clips differ."""
    runs = [evaluate.read_predictions(results_folder(folder)) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if (run.class_names, run.names) != (runs[0].class_names, runs[0].names):
            raise UserError(f"{folder} tests other clips or classes than {folders[0]}")
    # A clip's log-probabilities are its logits less one number, which moves no decision.
    logits = sum(np.log(np.maximum(run.probabilities, np.finfo(float).tiny)) for run in runs)  # (clips, classes)
    right, folds = logits.argmax(axis=1) == runs[0].true, runs[0].folds
    return statistics.mean(float(right[folds == fold].mean()) for fold in np.unique(folds))


def make_table(groups, reference=None, together=False):
    """Return the Markdown table of groups, best first; reference: the folder of a run in one of them.

    together: a column of `accuracy_together` more.
    """
    rows, errors = [], None
    for settings, folders, seeds in groups:
        means = [statistics.mean(accuracies.values()) for accuracies in seeds.values()]
        mean = statistics.mean(means)
        if reference in folders:
            errors = 1 - mean
        rows.append((mean, settings, folders, seeds, means))
    if reference and errors is None:
        raise UserError(f"--reference {reference} is none of the runs: name it among them")
    folds = sorted(next(iter(groups[0][2].values())))
    header = ["runs", "seeds", *(f"fold {fold}" for fold in folds), "mean", "± seeds"]
    header += [*(["together"] if together else []), "errors", "other than config.py"]
    cells = []
    for mean, settings, folders, seeds, means in sorted(rows, key=lambda row: -row[0]):
        by_fold = [report.percent(statistics.mean(run[fold] for run in seeds.values())) for fold in folds]
        spread = f"{100 * statistics.stdev(means):.1f}" if len(means) > 1 else None
        fewer = f"{(1 - mean) / errors - 1:+.0%}" if errors else None
        name = (folders[0].parent if folders[0].name == config.RESULTS_DIR else folders[0]).name
        name = re.sub(r"_?s\d+$", "", name)
        joined = [report.percent(accuracy_together(folders))] if together else []
        cells.append([name, len(seeds), *by_fold, report.percent(mean), spread, *joined, fewer, differences(settings)])
    return report.table(header, cells, left=(0, len(header) - 1))


def main():
    args = parse_args()
    print(make_table(group_runs(args.runs), args.reference, args.together))


if __name__ == "__main__":
    utils.run(main)
