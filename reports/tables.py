"""The words and tables of the report and of the comparison, as Markdown that reads well in a terminal too.

They take the results as results.json has them, and compute nothing new. `write_report` writes all that a results folder
has for people: train.py ends with it, evaluate.py is its command.
"""

import functools
import re
import sys
from pathlib import Path

import utils
from reports import metrics, pictures

FOLD_COLUMNS = ("fold", "dataset_fold", "clips", "best_epoch")
MARKDOWN = re.compile(r"[\\`*<>|\[\]$&~]|\b_|_\b")  # an underscore in a word, as in dog_bark, is plain text
MAX_CELL = 500  # characters
PROTOCOLS = {
    "next_fold": "the fold after the test fold chose the epoch, the rest trained; the test fold was read once",
    "none": "all other folds trained, the last epoch counts; the test fold was read once",
    "test_fold": "the test fold itself chose the epoch, so these numbers are higher than the truth",
    None: "no run.json says how the epochs were chosen, so these numbers may be higher than the truth",
}


# --- The files ---------------------------------------------------------------------------------------------------


def write_report(results_dir, processed_dir=None):
    """Write results.json, report.md and the pictures into a results folder, print the folds, and return the results.

    results_dir, processed_dir: see `metrics.read_predictions`. UserError if the folder's files can't be right; a
    picture that can't be drawn is a warning, since no training should end with an error for a picture.
    """
    results_dir = Path(results_dir)
    results = metrics.read_results(results_dir, processed_dir)
    histories = {row["fold"]: metrics.read_history(results_dir, row["fold"]) for row in results["per_fold"]}
    histories = {fold: history for fold, history in histories.items() if history is not None}
    print(f"{titled('Folds', results)}\n\n{folds_table(results)}\n\n{coverage(results)}: {summary_line(results)}")
    results["files"] = ["results.json", "report.md"]
    save_report(results_dir, results)  # before the pictures: what stops them costs no numbers
    for name, draw, title in (
        ("confusion_matrix.png", pictures.draw_confusion_matrix, "Confusion matrix"),
        ("per_class.png", pictures.draw_classes, "F1 and recall of each class"),
        ("reliability.png", pictures.draw_reliability, "Confidence"),
        ("curves.png", functools.partial(pictures.draw_curves, histories=histories), "Training"),
    ):
        path = results_dir / name
        try:
            path.unlink(missing_ok=True)  # of an earlier run
            if histories or name != "curves.png":
                draw(path, results, titled(title, results))
                results["files"].append(name)
        except Exception as error:
            print(f"warning: {path} is not drawn: {utils.one_line(error)}", file=sys.stderr)
    save_report(results_dir, results)  # again, with the pictures that there are
    print("wrote " + " ".join(str(results_dir / name) for name in results["files"]))
    return results


def save_report(results_dir, results):
    """Write report.md and results.json; the report links the pictures in results["files"]."""
    with utils.atomic_write(results_dir / "report.md", "w") as file:
        file.write(report_text(results))
    utils.save_json(results_dir / "results.json", results)


# --- The words ---------------------------------------------------------------------------------------------------


def titled(title, results):
    """Return a title with what a reader must know of the numbers below it; every title goes through here."""
    return f"{title} ({results['note']})" if results["note"] else title


def percent(value, unit=" %", sign=""):
    """Return a share as percent; – where there is none."""
    return "–" if value is None else f"{100 * value:{sign}.1f}{unit}"


def escape(value):
    """Return untrusted text as Markdown that shows it as it is, in one line."""
    return MARKDOWN.sub(r"\\\g<0>", utils.one_line(value, MAX_CELL))


def table(header, rows, left=(0,)):
    """Return a Markdown table, its columns aligned: those in `left` to the left, others to the right. None is –.

    Cells are plain text: Markdown in them is escaped, since much of it comes from files.
    """
    cells = [["–" if cell is None else escape(cell) for cell in row] for row in (header, *rows)]
    columns = []
    for index, column in enumerate(zip(*cells, strict=True)):
        width = max(3, *map(len, column))
        rule = "-" * width if index in left else "-" * (width - 1) + ":"
        column = [cell.ljust(width) if index in left else cell.rjust(width) for cell in column]
        columns.append([column[0], rule, *column[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def folds_table(results):
    header = ["fold", "data set fold", "clips", "best epoch", "accuracy", "macro F1"]
    rows = [
        [*map(fold.get, FOLD_COLUMNS), percent(fold["accuracy"]), percent(fold["macro_f1"])]
        for fold in results["per_fold"]
    ]
    return table(header, rows)


def summary_line(results):
    """Return the result in a line: accuracy, its spread over folds, macro F1, the protocol."""
    mean, std, interval = (results[f"accuracy_{name}"] for name in ("mean", "std", "interval_95"))
    rest = f"macro F1 {percent(results['macro_f1'])}, protocol {results['protocol'] or 'not recorded'}"
    if std is None:
        return titled(f"accuracy {percent(mean)} (one fold, so no spread), {rest}", results)
    low, high = (percent(limit, unit="") for limit in interval)
    spread = f"mean ± standard deviation of {results['folds_present']} folds; 95 % interval {low} to {high}"
    return titled(f"accuracy {percent(mean)} ± {percent(std, unit='')} ({spread}), {rest}", results)


def coverage(results):
    """Return what part of the data set at hand the results speak for: "3 of 10 folds, 2,148 of 8,732 clips"."""
    parts = []
    for what, present in (("folds", results["folds_present"]), ("clips", results["clips"])):
        total = results[f"{what}_total"]
        parts.append(f"{present:,} of {total:,} {what}" if total else f"{present:,} {what}")
    left_out = results["left_out"]
    return ", ".join(parts) + (f" (left out, as of a different run: {', '.join(left_out)})" if left_out else "")


def report_text(results):
    """Return report.md, with the pictures in results["files"]."""

    def picture(name, text):
        return f"![{text}]({name})" if name in results["files"] else ""

    shares = {"foreground": results["foreground_accuracy"], "background": results["background_accuracy"]}
    shares["with every recording counted once, by the mean of its clips,"] = results["accuracy_recordings"]
    others = "".join(f"; {what} {percent(share)}" for what, share in shares.items() if share is not None)
    sections = {
        "Folds": [
            folds_table(results),
            "The 95 % interval is Student's t, which takes the folds as independent. They share training clips, so it "
            "is a little too narrow.",
        ],
        "Classes": [classes_table(results), picture("per_class.png", "F1 and recall of each class")],
        "Confusion matrix": [picture("confusion_matrix.png", "Confusion matrix"), confusions_table(results)],
        "Confidence": [confidence_text(results), picture("reliability.png", "Accuracy against confidence")],
        "Training": [picture("curves.png", "Accuracy and loss of every epoch")],
        "Run": [run_table(results["run"]) if results["run"] else ""],
    }
    source = escape(results["run"].get("source", ""))
    parts = [
        f"# {titled(f'Results on {source}' if source else 'Results', results)}",
        f"**{summary_line(results)}**",
        f"They speak for {coverage(results)} of the data set at hand; only a mean over all folds of the whole data set "
        f"compares with published results. Protocol: {PROTOCOLS[results['protocol']]}. Over all clips together: "
        f"accuracy {percent(results['accuracy_all_clips'])}, macro F1 {percent(results['macro_f1'])}{others}.",
    ]
    for title, body in sections.items():
        if any(body):
            parts += [f"## {titled(title, results)}", *filter(None, body)]
    return "\n\n".join(parts) + "\n"


def classes_table(results):
    rows = [
        [name, scores["clips"], *(percent(scores[score]) for score in ("precision", "recall", "f1"))]
        for name, scores in results["per_class"].items()
    ]
    return table(["class", "clips", "precision", "recall", "F1"], rows)


def confusions_table(results):
    if not results["worst_confusions"]:
        return "Every clip was classified right."
    rows = [[row["true"], row["predicted"], row["clips"], percent(row["share"])] for row in results["worst_confusions"]]
    return table(["true", "taken for", "clips", "of the class"], rows, left=(0, 1))


def confidence_text(results):
    """Return in words what the temperature has done to the calibration error."""
    before, after = results["confidence"]["before"], results["confidence"]["after"]
    text = f"Expected calibration error (ECE, 15 bins): {percent(before['ece'])} as the network gives it"
    if after is None:
        return f"{text}. Not every fold here has a temperature, which needs validation clips that did not test."
    temperatures = [results["run"]["temperatures"][str(row["fold"])] for row in results["per_fold"]]
    return (
        f"{text}, {percent(after['ece'])} with each fold's temperature ({min(temperatures):.2f} to "
        f"{max(temperatures):.2f}), fitted on its validation clips and never on test clips."
    )


def run_table(run):
    described = {name: value for name, value in run.items() if not isinstance(value, dict)}
    return table(["setting", "value"], {**described, **run.get("settings", {})}.items(), left=(0, 1))


def compare_text(folders, results, values):
    """Return the comparison of runs A and B as Markdown; values: see `evaluate.compare`."""
    noted = next((result for result in results if result["note"]), results[0])
    chance = "chance alone hardly explains that" if values["p_value"] < 0.05 else "chance alone may explain that"

    def row(name, clips, a, b):
        return [name, clips, percent(a), percent(b), percent(b - a, unit="", sign="+")]

    sections = [
        f"# {titled('Comparison', noted)}",
        "\n".join(
            f"- {letter}: {escape(folder)}, {coverage(result)}: {summary_line(result)}"
            for letter, folder, result in zip("AB", folders, results, strict=True)
        ),
        table(
            ["tested by both", "clips", "A", "B", "B - A, points"],
            [row("accuracy", values["clips"], values["accuracy_a"], values["accuracy_b"])],
        ),
        f"McNemar's test: A alone is right on {values['only_a']} clips, B alone on {values['only_b']}; p = "
        f"{values['p_value']:.2g} (exact, two-sided): {chance}. Clips cut from one recording are alike, so this p is "
        "too small; and another seed alone moves a run, too.",
        f"## {titled('Recall of each class, the most moved first', noted)}",
        table(["class", "clips", "A", "B", "B - A, points"], [row(*moved.values()) for moved in values["classes"]]),
    ]
    return "\n\n".join(sections) + "\n"
