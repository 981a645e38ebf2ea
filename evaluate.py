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

import csv
import re
import shutil
from pathlib import Path

import numpy as np

import config
import data_loader
import utils
from reports import metrics, plots, report
from utils import UserError

PREDICTIONS = re.compile(r"predictions_fold_(0|[1-9]\d*)\.csv")
SUM_TOLERANCE = 1e-3  # the probabilities of a clip must sum to 1 within this
# What run.json must be, where it has them.
RUN_KINDS = {"validation": str, "best_epochs": dict, "n_folds": int, "temperatures": dict}
KEYS_OF_FOLDS = ("best_epochs", "temperatures")  # of run.json: {fold: value}
HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]

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
    return metrics.Predictions(
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


# --- The report --------------------------------------------------------------------------------------------------


def read_results(results_dir, processed_dir=None):
    """Return the results of a folder of predictions, as results.json has them, and write nothing."""
    return metrics.summarise(read_predictions(results_dir, processed_dir), read_run(results_dir))


def write_report(results_dir, processed_dir=None):
    """Write results.json, report.md and the pictures into a results folder, print the folds, and return the results.

    results_dir, processed_dir: see `read_predictions`. UserError if the folder's files can't be right.
    """
    results_dir = Path(results_dir)
    results = read_results(results_dir, processed_dir)
    histories = {row["fold"]: read_history(results_dir, row["fold"]) for row in results["per_fold"]}
    histories = {fold: history for fold, history in histories.items() if history}
    results["files"] = ["results.json", "report.md", *draw_pictures(results_dir, results, histories)]
    with utils.atomic_write(results_dir / "report.md", "w") as file:
        file.write(report.report_text(results))
    utils.save_json(results_dir / "results.json", results)
    print(f"{report.folds_table(results)}\n\n{report.coverage(results)}: {report.summary_line(results)}")
    print("wrote " + " ".join(str(results_dir / name) for name in results["files"]))
    return results


def draw_pictures(folder, results, histories):
    """Draw the pictures into a folder and return their names; the curves only if there are histories."""
    plots.draw_confusion_matrix(folder / "confusion_matrix.png", results, report.titled("Confusion matrix", results))
    plots.draw_classes(folder / "per_class.png", results, report.titled("F1 and recall of each class", results))
    plots.draw_reliability(folder / "reliability.png", results, report.titled("Confidence", results))
    names = ["confusion_matrix.png", "per_class.png", "reliability.png"]
    if not histories:
        (folder / "curves.png").unlink(missing_ok=True)  # of an earlier run
        return names
    plots.draw_curves(folder / "curves.png", histories, results, report.titled("Training", results))
    return [*names, "curves.png"]


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
        paths = {path.name: path for path in folder.glob("predictions_fold_*.csv") if PREDICTIONS.fullmatch(path.name)}
        if not paths:
            raise UserError(f"no predictions in {folder}: name the results folder of a run, or its assets folder")
        for name in paths:
            if name in origins:
                raise UserError(f"{name} is in {origins[name]} and in {folder}: each fold counts once")
            origins[name] = folder
        run = read_run(folder)
        joined = joined or run
        first, other = recipe_of(joined), recipe_of(run)
        if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            raise UserError(f"{folder} was trained with another {', '.join(differing)} than {folders[0]}")
        for key in KEYS_OF_FOLDS:
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
    return {key: value for key, value in {**run, **run.get("settings", {})}.items() if key not in KEYS_OF_FOLDS}


# --- Two runs side by side -----------------------------------------------------------------------------------------


def compare(dir_a, dir_b, processed_dir=None):
    """Return (text, values) that set run B against run A, on the clips that both tested.

    UserError if no clip is in both, or a clip's class differs between them.
    """
    runs = [read_predictions(folder, processed_dir) for folder in (dir_a, dir_b)]
    results = [metrics.summarise(run, read_run(folder)) for run, folder in zip(runs, (dir_a, dir_b), strict=True)]
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
    return report.compare_text((dir_a, dir_b), results, values), values


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
        write_report(results_dir, processed_dir)


if __name__ == "__main__":
    utils.run(main)
