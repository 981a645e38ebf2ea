"""One table out of many trainings: what each recipe gives over its seeds, and how many errors fewer than another.

    python -m research.table_of_runs ../runs/*                           # assets folders, or their results/
    python -m research.table_of_runs ../runs/* --reference ../runs/plain_s0

Runs whose settings differ in the seed alone are one row: accuracy of each fold (mean of the seeds), their mean with the
standard deviation over the seeds, and the share of the reference's errors that are gone. Rows are sorted by accuracy.
"""

import json
import re
import statistics
from pathlib import Path

import config
import utils
from reports import tables
from utils import UserError


def read_run(folder):
    """Return (settings without the seed, seed, {fold: accuracy}) of a training. UserError if it has no results."""
    path = folder / "results.json"
    path = path if path.is_file() else folder / config.RESULTS_DIR / "results.json"
    if not path.is_file():
        raise UserError(f"no results.json in {folder}: name folders in which python train.py has ended")
    results = utils.load_json(path)
    try:
        settings = {**results["run"]["settings"]}
        accuracies = {int(row["fold"]): float(row["accuracy"]) for row in results["per_fold"]}
        if not accuracies or not all(0 <= accuracy <= 1 for accuracy in accuracies.values()):
            raise ValueError("accuracies that are no shares")
        return settings, int(settings.pop("seed")), accuracies
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks settings or accuracies: run python train.py again") from error


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
    """Return the settings of a recipe that differ from config.py, as text."""
    defaults = {name.lower(): value for name, value in vars(config).items()}
    parts = [f"{name} {value}" for name, value in settings.items() if value != defaults.get(name, value)]
    return ", ".join(parts) or "as in config.py"


def make_table(groups, reference=None):
    """Return the Markdown table of groups, best first; reference: the folder of a run in one of them."""
    means = [[statistics.mean(accuracies.values()) for accuracies in seeds.values()] for _, _, seeds in groups]
    errors = [1 - statistics.mean(each) for each in means]
    compared = next((error for error, group in zip(errors, groups, strict=True) if reference in group[1]), None)
    if reference and compared is None:
        raise UserError(f"--reference {reference} is none of the runs: name it among them")
    folds = sorted(next(iter(groups[0][2].values())))
    rows = []
    for index in sorted(range(len(groups)), key=errors.__getitem__):
        settings, folders, seeds = groups[index]
        name = (folders[0].parent if folders[0].name == config.RESULTS_DIR else folders[0]).name
        by_fold = [tables.percent(statistics.mean(run[fold] for run in seeds.values())) for fold in folds]
        spread = f"{100 * statistics.stdev(means[index]):.1f}" if len(seeds) > 1 else None
        change = f"{errors[index] / compared - 1:+.0%}" if compared else None
        mean = tables.percent(1 - errors[index])
        rows.append([re.sub(r"_?s\d+$", "", name), len(seeds), *by_fold, mean, spread, change, differences(settings)])
    header = ["runs", "seeds", *(f"fold {fold}" for fold in folds), "mean", "± seeds", "errors"]
    return tables.table([*header, "different from config.py"], rows, left=(0, len(header)))


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="assets folders of trainings, or results/")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a run of the recipe whose errors are compared")
    args = parser.parse_args()
    print(make_table(group_runs(args.runs), args.reference))


if __name__ == "__main__":
    utils.run(main)
