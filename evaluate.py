"""Stage 3b: turn the predictions of the tested folds into numbers, a report and pictures. train.py ends with it.

    python evaluate.py                                    # the results in the assets folder
    python evaluate.py --results_dir DIR                  # any folder of predictions, of some folds only, too
    python evaluate.py --compare DIR_A DIR_B              # two runs side by side, on the clips that both tested
    python evaluate.py --compare DIR_A DIR_B --output comparison.md

Reads predictions_fold_<k>.csv, and where they are there history_fold_<k>.csv and run.json of train.py, and clips.csv
of preprocess_data.py. Writes results.json, report.md, confusion_matrix.png, per_class.png, reliability.png and
curves.png beside them. Prints a table of the folds, and the accuracy with its spread.

Folds that were trained on several machines: copy their checkpoints beside each other and run train.py again.
"""

import numpy as np
import pandas as pd

import utils
from reports import metrics, tables
from utils import UserError


def compare(dir_a, dir_b, processed_dir=None):
    """Return (text, values) that compare run B with run A, on the clips that both tested.

    UserError if no clip is in both, or a clip's class differs between them.
    """
    runs = [metrics.read_predictions(folder, processed_dir) for folder in (dir_a, dir_b)]
    results = [
        metrics.summarise(run, metrics.read_run(folder)) for run, folder in zip(runs, (dir_a, dir_b), strict=True)
    ]
    if sorted(runs[0].class_names) != sorted(runs[1].class_names):
        raise UserError(f"{dir_a} and {dir_b} have different classes: {runs[0].class_names}, {runs[1].class_names}")
    a, b = (
        pd.DataFrame({"class": np.array(run.class_names)[run.true], "right": run.true == run.predicted}, run.names)
        for run in runs
    )
    both = a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b"))
    if both.empty:
        raise UserError(f"{dir_a} and {dir_b} have no test clip in common: compare runs that share a fold")
    if (is_odd := both["class_a"] != both["class_b"]).any():
        odd = both[is_odd].iloc[0]
        raise UserError(f"{odd.name} is {odd['class_a']} in {dir_a} and {odd['class_b']} in {dir_b}: test one again")
    values = {
        "clips": len(both),
        "accuracy_a": float(both["right_a"].mean()),
        "accuracy_b": float(both["right_b"].mean()),
    }
    values |= mcnemar(both["right_a"], both["right_b"])
    classes = [
        {"class": name, "clips": len(rows), "a": float(rows["right_a"].mean()), "b": float(rows["right_b"].mean())}
        for name, rows in both.groupby("class_a")
    ]
    values["classes"] = sorted(classes, key=lambda row: -abs(row["b"] - row["a"]))  # of equals, by name
    return tables.compare_text((dir_a, dir_b), results, values), values


def mcnemar(right_a, right_b):
    """Return {"only_a", "only_b", "p_value"} of McNemar's test: what matters is what one of two runs alone got right.

    right_a, right_b: (clips,) bools. p is that of an exact two-sided binomial test of only_a : only_b against 1/2.
    """
    from scipy import stats  # takes a second

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": p_value}


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--results_dir", metavar="DIR", help="predictions, and the report (default: results/ in the assets)")
    add("--processed_dir", metavar="DIR", help="folder of clips.csv (default: data/ in the assets)")
    add("--compare", nargs=2, type=utils.home_path, metavar=("A", "B"), help="two results folders to compare")
    add("--output", metavar="FILE", help="also write the comparison to this file")
    args = parser.parse_args()
    if args.output and not args.compare:
        parser.error("--output needs --compare; the report is written into the results folder")
    return args


def main():
    args = parse_args()
    paths = utils.run_folders(args)
    if args.processed_dir and not (paths.processed / "clips.csv").is_file():
        raise UserError(f"no clips.csv in {paths.processed}: run python preprocess_data.py, or omit --processed_dir")
    if not args.compare:
        tables.write_report(paths.results, paths.processed)
        return
    text, _ = compare(*args.compare, paths.processed)
    print(text, end="")
    if args.output:
        path = utils.output_path(args.output, "comparison.md")
        with utils.atomic_write(path, "w") as file:
            file.write(text)
        print(f"\nwrote {path}")


if __name__ == "__main__":
    utils.run(main)
