"""What train.py leaves in results/, and clips.csv, of a run that never was: for the tests of what reads them."""

import csv
import json

import numpy as np

CLASSES = ["siren", "dog_bark", "drilling"]
CLIPS_A_FOLD = 30


def class_of(clip, missing):
    return clip % 3 if clip % 3 != missing else (missing + 1) % 3


def write_run(folder, folds=(0, 1, 2), validation="next_fold", seed=0, missing=None, **run):
    """Write the results of a run: 30 clips a fold, right in two of three cases; class `missing` has none."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for fold in folds:
        rows = [["slice_file_name", "classID", *CLASSES]]
        for clip in range(CLIPS_A_FOLD):
            true = class_of(clip, missing)
            logits = rng.normal(0, 1, 3) + 1.5 * (np.arange(3) == true)
            shares = np.exp(logits) / np.exp(logits).sum()
            rows.append([f"clip{fold}_{clip}.wav", true, *(f"{share:.6f}" for share in shares)])
        write_rows(folder / f"predictions_fold_{fold}.csv", rows)
        columns = ["epoch", "learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
        empty = validation == "none"
        epochs = [[e, 0.01, 2 / e, 1 - 0.5 / e, "" if empty else 2.5 / e, "" if empty else 0.4] for e in (1, 2, 3)]
        write_rows(folder / f"history_fold_{fold}.csv", [columns, *epochs])
    run = {"validation": validation, "model": "AudioCNN", "best_epochs": {str(fold): 2 for fold in folds}, **run}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def write_clips(folder, folds=range(10), missing=None):
    """Write clips.csv for the same clips; every third is in the background."""
    columns = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
    rows = []
    for fold in folds:
        for clip in range(CLIPS_A_FOLD):
            true = class_of(clip, missing)
            salience = 2 if clip < 10 else 1
            rows.append([f"clip{fold}_{clip}.wav", clip, 0, 4, salience, fold + 1, true, CLASSES[true]])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "clips.csv", [columns, *rows])
    return folder


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def raw_predictions(folder, fold):
    """Return (true, predicted) as plain columns, read without the project's code."""
    rows = read_rows(folder / f"predictions_fold_{fold}.csv")[1:]
    return [int(row[1]) for row in rows], [int(np.argmax([float(value) for value in row[2:]])) for row in rows]
