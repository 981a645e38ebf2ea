"""One table out of many trainings: what each recipe gives over its seeds, and how many errors fewer than another.

    python -m research.table_of_runs ../runs/*                           # assets folders, or their results/
    python -m research.table_of_runs ../runs/* --reference ../runs/plain_s0
    python -m research.table_of_runs ../runs/* --more                    # and what accuracy over clips leaves out

Runs whose settings differ in the seed alone are one row: accuracy of each fold (mean of the seeds), their mean with the
standard deviation over the seeds, and the share of the reference's errors that are gone. Rows are sorted by accuracy.
More are three columns: accuracy with every recording counted once; the negative log-likelihood of the true classes, at
the best temperature (lower is better); and the accuracy of a recipe's networks together: those of a fold, one a seed,
answer with the mean of their logits.
"""

import json
import re
import statistics
from pathlib import Path

import numpy as np

import config
import utils
from reports import metrics, tables
from utils import UserError


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="assets folders of trainings, or results/")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a run of the recipe whose errors are compared")
    parser.add_argument("--more", action="store_true", help="also recordings, likelihood, and the networks together")
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


def logits_of(predictions):
    """Return log-probabilities, (clips, classes): the logits less one number a clip, which changes nothing below."""
    return np.log(np.maximum(predictions.probabilities, np.finfo(float).tiny))


def likelihood(predictions):
    """Return the mean negative log-likelihood of the true classes, at the temperature that suits these clips best.

    What the probabilities are worth, however sure they sound: log(classes) is a guess, 0 is certainty that is right. To
    compare recipes that differ in few decisions, and for nothing else: the temperature has seen the test clips.
    """
    import torch  # takes a second, which a table without --more need not wait for
    from torch.nn.functional import cross_entropy

    import calibration

    logits, true = torch.from_numpy(logits_of(predictions)), torch.from_numpy(predictions.true)
    return cross_entropy(logits / calibration.fit_temperature(logits, true), true).item()


def accuracy_together(runs):
    """Return the mean over folds of the accuracy that the mean of the runs' logits has; runs: their Predictions."""
    right = sum(map(logits_of, runs)).argmax(axis=1) == runs[0].true
    return statistics.mean(float(right[runs[0].folds == fold].mean()) for fold in np.unique(runs[0].folds))


def more_of(folders):
    """Return the cells of --more of a recipe's runs. UserError if they test different clips."""
    runs = [metrics.read_predictions(results_folder(folder)) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if (run.class_names, run.names) != (runs[0].class_names, runs[0].names):
            raise UserError(f"{folder} tests other clips or classes than {folders[0]}")
    results = [utils.load_json(results_folder(folder) / "results.json") for folder in folders]
    recordings = [result["recordings"]["accuracy"] for result in results if result.get("recordings")]
    return [
        tables.percent(statistics.mean(recordings) if recordings else None),
        f"{statistics.mean(map(likelihood, runs)):.2f}",
        tables.percent(accuracy_together(runs)),
    ]


def make_table(groups, reference=None, more=False):
    """Return the Markdown table of groups, best first; reference: the folder of a run in one of them.

    more: the columns of `more_of`, too.
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
    header += [*(["recordings", "likelihood", "together"] if more else []), "errors", "other than config.py"]
    cells = []
    for mean, settings, folders, seeds, means in sorted(rows, key=lambda row: -row[0]):
        by_fold = [tables.percent(statistics.mean(run[fold] for run in seeds.values())) for fold in folds]
        spread = f"{100 * statistics.stdev(means):.1f}" if len(means) > 1 else None
        fewer = f"{(1 - mean) / errors - 1:+.0%}" if errors else None
        name = (folders[0].parent if folders[0].name == config.RESULTS_DIR else folders[0]).name
        name = re.sub(r"_?s\d+$", "", name)
        added = more_of(folders) if more else []
        cells.append([name, len(seeds), *by_fold, tables.percent(mean), spread, *added, fewer, differences(settings)])
    return tables.table(header, cells, left=(0, len(header) - 1))


def main():
    args = parse_args()
    print(make_table(group_runs(args.runs), args.reference, args.more))


if __name__ == "__main__":
    utils.run(main)
