"""Stage 3b: turn the predictions of the tested folds into numbers, a report and pictures. train.py ends with it.

    python evaluate.py                                    # the results in the assets folder
    python evaluate.py --results_dir DIR                  # any folder of predictions, also of some folds only
    python evaluate.py --join RUN_A RUN_B --results_dir DIR      # first gather the folds of runs elsewhere
    python evaluate.py --compare DIR_A DIR_B              # two runs side by side, on the clips that both tested
    python evaluate.py --compare DIR_A DIR_B --output comparison.md

Reads predictions_fold_<k>.csv, and where they are there history_fold_<k>.csv and run.json of train.py, and clips.csv
of preprocess_data.py. Writes results.json, report.md, confusion_matrix.png, per_class.png, reliability.png and
curves.png beside them. Prints a table of the folds, and the accuracy with its spread.
"""

import shutil
from pathlib import Path

import numpy as np

import config
import utils
from reports import metrics, tables
from utils import UserError

# --- Folds that were trained apart -----------------------------------------------------------------------------------


def join_results(folders, results_dir):
    """Copy predictions and histories of runs of one recipe, each of other folds, into one folder with one run.json.

    folders: results folders, or the assets folders that have one. UserError if two have the same fold, or other
    settings.
    """
    folders = [folder / config.RESULTS_DIR if (folder / config.RESULTS_DIR).is_dir() else folder for folder in folders]
    results_dir.mkdir(parents=True, exist_ok=True)
    origins, joined = {}, None
    for folder in folders:
        paths = {
            path.name: path
            for path in folder.glob("predictions_fold_*.csv")
            if metrics.PREDICTIONS.fullmatch(path.name)
        }
        if not paths:
            raise UserError(f"no predictions in {folder}: name the results folder of a run, or its assets folder")
        for name in paths:
            if name in origins:
                raise UserError(f"{name} is in {origins[name]} and in {folder}: each fold counts once")
            origins[name] = folder
        run = metrics.read_run(folder)
        joined = joined or run
        first, other = recipe_of(joined), recipe_of(run)
        if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            raise UserError(f"{folder} was trained with another {', '.join(differing)} than {folders[0]}")
        for key in metrics.KEYS_OF_FOLDS:
            joined[key] = dict(sorted({**joined.get(key, {}), **run.get(key, {})}.items()))
    strangers = {path.name for path in results_dir.glob("predictions_fold_*.csv")} - set(origins)
    if strangers:
        raise UserError(f"{results_dir} has {', '.join(sorted(strangers))} of another run: name an empty folder")
    for name, folder in origins.items():
        for path in (folder / name, folder / name.replace("predictions", "history")):
            if path.is_file() and path.parent.resolve() != results_dir.resolve():
                shutil.copyfile(path, results_dir / path.name)
    utils.save_json(results_dir / "run.json", joined)


def recipe_of(run):
    """Return what run.json says that is the same for all folds of a run, in one dict."""
    return {key: value for key, value in {**run, **run.get("settings", {})}.items() if key not in metrics.KEYS_OF_FOLDS}


# --- Two runs side by side -----------------------------------------------------------------------------------------


def compare(dir_a, dir_b, processed_dir=None):
    """Return (text, values) that set run B against run A, on the clips that both tested.

    UserError if no clip is in both, or a clip's class differs between them.
    """
    runs = [metrics.read_predictions(folder, processed_dir) for folder in (dir_a, dir_b)]
    results = [
        metrics.summarise(run, metrics.read_run(folder)) for run, folder in zip(runs, (dir_a, dir_b), strict=True)
    ]
    if sorted(runs[0].class_names) != sorted(runs[1].class_names):
        raise UserError(f"{dir_a} and {dir_b} have other classes: {runs[0].class_names}, {runs[1].class_names}")
    answers = [
        {
            name: (run.class_names[true], true == predicted)
            for name, true, predicted in zip(run.names, run.true, run.predicted, strict=True)
        }
        for run in runs
    ]
    common = [name for name in answers[0] if name in answers[1]]
    if not common:
        raise UserError(f"{dir_a} and {dir_b} have no test clip in common")
    for name in common:
        if answers[0][name][0] != answers[1][name][0]:
            raise UserError(f"{name} is {answers[0][name][0]} in {dir_a} and {answers[1][name][0]} in {dir_b}")
    classes = np.array([answers[0][name][0] for name in common])
    right = np.array([[answer[name][1] for name in common] for answer in answers])  # (2, clips)
    values = metrics.paired_test(right[0], right[1])
    moved = []
    for name in runs[0].class_names:
        before, after = (metrics.mean_or_none(row[classes == name]) for row in right)
        if before is not None:
            moved.append({"class": name, "clips": int((classes == name).sum()), "a": before, "b": after})
    values["classes"] = sorted(moved, key=lambda row: (-abs(row["b"] - row["a"]), row["class"]))
    return tables.compare_text((dir_a, dir_b), results, values), values


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument(
        "--results_dir", metavar="DIR", help="predictions, and the report (default: results/ in the assets)"
    )
    parser.add_argument("--processed_dir", metavar="DIR", help="folder of clips.csv (default: data/ in the assets)")
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="DIR", help="first copy the folds of these runs into --results_dir"
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results folders to set side by side")
    parser.add_argument("--output", metavar="FILE", help="also write the comparison to this file")
    args = parser.parse_args()
    if args.join and args.compare:
        parser.error("--join makes a report of one run, --compare is of two: one after the other")
    if args.output and not args.compare:
        parser.error("--output goes with --compare; the report goes into the results folder")
    return args


def main():
    args = parse_args()
    processed_dir = utils.folder(args.processed_dir, args.assets_dir, config.PROCESSED_DIR)
    if args.processed_dir and not (processed_dir / "clips.csv").is_file():
        raise UserError(f"no clips.csv in {processed_dir}: run python preprocess_data.py, or leave --processed_dir out")
    if args.compare:
        text, _ = compare(*args.compare, processed_dir)
        print(text, end="")
        if args.output:
            with utils.atomic_write(args.output, "w") as file:
                file.write(text)
            print(f"\nwrote {args.output}")
    else:
        results_dir = utils.folder(args.results_dir, args.assets_dir, config.RESULTS_DIR)
        if args.join:
            join_results(args.join, results_dir)
        tables.write_report(results_dir, processed_dir)


if __name__ == "__main__":
    utils.run(main)
