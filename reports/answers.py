"""What models say of one recording: the distribution, the timeline, and both as text, JSON, CSV and Audacity labels.

And whether the recording is a clip of the data set: an answer to a clip that the model has trained on is no test.
"""

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import re

import numpy as np

import config
import utils
from utils import UserError

BAR_WIDTH = 40  # characters of a probability of 1
POOLED_SHARE = 0.1  # of the windows, whose mean is the answer to a recording
COLUMNS = ["start", "end", "class", "confidence"]  # of a timeline; times in s
FORMULA = ("=", "+", "-", "@")  # text that begins so is a formula to a spreadsheet
SILENCE = "silence"  # in a timeline, where the samples do not change
CLIP_NAME = re.compile(r"\d+-\d+-\d+-\d+\.wav")  # of the data set: recording, classID, occurrence, slice


@dataclasses.dataclass
class Answer:
    """What models say of one recording, window by window."""

    class_names: list
    seconds: float
    starts: np.ndarray  # (windows,) s, rising
    ends: np.ndarray  # (windows,) s, rising
    windows: np.ndarray  # probabilities, (windows, classes); NaN where the samples do not change
    levels: np.ndarray  # RMS of each window's samples, (windows,)
    notes: list  # lines

    @functools.cached_property
    def overall(self):
        """The distribution of the whole recording, (classes,): the mean over the windows that say most.

        That is a tenth of them, those with the largest product of level and of confidence in one class. A mean over all
        drowns what is short, such as a car horn in a minute of street; research/RESULTS.md has both.
        """
        says = np.nan_to_num(self.windows.max(axis=1)) * self.levels  # (windows,)
        n = max(round(POOLED_SHARE * len(says)), 1)
        return np.nanmean(self.windows[np.argsort(-says, kind="stable")[:n]], axis=0)

    @functools.cached_property
    def best(self):
        """The index of the likeliest class."""
        return int(self.overall.argmax())

    @property
    def label(self):
        """The name of the likeliest class."""
        return self.class_names[self.best]

    @property
    def confidence(self):
        """The probability of the likeliest class."""
        return float(self.overall[self.best])

    @property
    def probabilities(self):
        """{class name: probability} of the whole recording, the likeliest first."""
        order = np.argsort(-self.overall, kind="stable")
        return {self.class_names[index]: float(self.overall[index]) for index in order}

    @functools.cached_property
    def parts(self):
        """(edges, distributions): the times at which windows begin or end, and the mean between two of them.

        edges: (parts + 1,) s; distributions: (parts, classes), of the windows that cover a part, NaN for silence.
        """
        edges = np.unique(np.concatenate([self.starts, self.ends]))
        rows = []
        for start, end in itertools.pairwise(edges):
            covering = slice(np.searchsorted(self.ends, end), np.searchsorted(self.starts, start, side="right"))
            heard = self.windows[covering]
            heard = heard[~np.isnan(heard[:, 0])]
            rows.append(heard.mean(axis=0) if len(heard) else np.full(len(self.class_names), np.nan))
        return edges, np.array(rows)

    @functools.cached_property
    def timeline(self):
        """[(start in s, end in s, class name, confidence)], parts of one class in a row merged.

        The confidence is the mean of the class's probability over that time.
        """
        edges, distributions = self.parts
        is_silent = np.isnan(distributions[:, 0])
        classes = np.where(is_silent, -1, np.nan_to_num(distributions).argmax(axis=1))
        starts = np.flatnonzero(np.diff(classes, prepend=-2))  # of the runs of one class
        rows = []
        for first, after in itertools.pairwise([*starts, len(classes)]):
            name, confidence = SILENCE, 1.0
            if classes[first] >= 0:
                name, lengths = self.class_names[classes[first]], np.diff(edges[first : after + 1])
                confidence = float(np.average(distributions[first:after, classes[first]], weights=lengths))
            rows.append((float(edges[first]), float(edges[after]), name, confidence))
        return rows


# --- For people --------------------------------------------------------------------------------------------------


def bar(probability):
    """Return a probability as a bar."""
    return "█" * round(float(probability) * BAR_WIDTH)


def print_distribution(class_names, probabilities, top_k=None):
    """Print every class, or the top_k likeliest, with its probability and a bar, the most likely first."""
    width = max(map(len, class_names))
    for index in np.argsort(-probabilities, kind="stable")[:top_k]:
        print(f"  {class_names[index]:<{width}}  {probabilities[index]:6.1%}  {bar(probabilities[index])}".rstrip())


def print_answer(name, answer, model_names, top_k=None):
    """Print an answer: class, confidence, notes, bars, and of several windows the timeline."""
    model = utils.one_line(model_names[0]) if len(model_names) == 1 else f"mean of {len(model_names)} models"
    many = len(answer.starts) > 1
    print(f"{utils.one_line(name)} ({answer.seconds:.2f} s), {model}")
    of_windows = f" (of {len(answer.starts)} windows)" if many else ""
    print(f"{answer.label}, confidence {answer.confidence:.1%}{of_windows}")
    for note in answer.notes:
        print(f"note: {note}")
    print_distribution(answer.class_names, answer.overall, top_k)
    if many:
        width = max(len(class_name) for class_name in [*answer.class_names, SILENCE])
        print("timeline:")
        for start, end, class_name, confidence in answer.timeline:
            print(f"  {clock(start)} - {clock(end)}  {class_name:<{width}}  {confidence:6.1%}")


def clock(seconds):
    """Return a time as h:mm:ss.s."""
    tenths = round(10 * seconds)
    return f"{tenths // 36_000}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


# --- For programs ------------------------------------------------------------------------------------------------


def as_json(name, answer, model_names, top_k=None):
    """Return an answer as one line of JSON. Times in s; probabilities of the top_k classes, the likeliest first.

    In ASCII, with other characters escaped, so that it is valid UTF-8 whatever the terminal's code page.
    """
    shares = list(answer.probabilities.items())[:top_k]
    value = {
        "file": name,
        "seconds": round(answer.seconds, 3),
        "models": model_names,
        "windows": len(answer.starts),
        "class": answer.label,
        "confidence": round(answer.confidence, 4),
        "probabilities": {class_name: round(share, 4) for class_name, share in shares},
        "timeline": [dict(zip(COLUMNS, rounded(part), strict=True)) for part in answer.timeline],
        "notes": answer.notes,
    }
    return json.dumps(value)


def rounded(part):
    """Return a part of a timeline with times of 1 ms and a confidence of four digits."""
    start, end, class_name, confidence = part
    return round(start, 3), round(end, 3), class_name, round(confidence, 4)


def save_csv(path, timelines):
    """Write timelines, {file: [(start, end, class, confidence)]}, as CSV, atomically."""
    with utils.atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *COLUMNS])
        for name, parts in timelines.items():
            name = name.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text
            name = f"./{name}" if name.startswith(FORMULA) else name
            for start, end, class_name, confidence in map(rounded, parts):
                cell = f"'{class_name}" if class_name.startswith(FORMULA) else class_name
                writer.writerow([name, start, end, cell, confidence])


def save_labels(path, parts):
    """Write a timeline as Audacity's label track (start, end in s and a text, by tabs), atomically."""
    with utils.atomic_write(path, "w") as file:
        for start, end, class_name, confidence in parts:
            print(f"{start:.6f}\t{end:.6f}\t{class_name} {confidence:.0%}", file=file)


# --- Clips of the data set ---------------------------------------------------------------------------------------


def known_clip_note(path, infos, assets_dir, processed_dir=None):
    """Return a line on what the models' answer to a recording is worth if that is a clip of the data set, else None.

    path: of the recording; a clip is known by its name. infos: metadata of the models that answer; processed_dir: the
    folder of clips.csv. A model has met the clip if its training folds have it, or if the clip's fold neither trained
    nor tested it: that one has chosen its epoch.
    """
    if not CLIP_NAME.fullmatch(path.name):
        return None
    fold = read_folds(utils.folder(processed_dir, assets_dir, config.PROCESSED_DIR) / "clips.csv").get(path.name)
    if fold is None:
        return None
    what = f"a clip of the data set's fold {fold}"
    if not all(isinstance(info.get("training_folds"), list) and "fold" in info for info in infos):
        return f"{what}; the model does not say on which folds it was trained"
    trained = [fold in info["training_folds"] for info in infos]
    if not any(trained) and all(info["fold"] == fold - 1 for info in infos):
        return f"{what}, which this model has not trained on"
    how = "this model trained on it" if any(trained) else "this model has chosen its epoch with it"
    if len(infos) > 1:
        how = f"{sum(trained)} of {len(infos)} models trained on it"
    return f"{what}: {how}, so the answer is too good; --fold_num {fold - 1} has never heard it"


@functools.cache  # one reading for a whole folder of clips
def read_folds(table):
    """Return {clip's file name: fold} of a clips.csv; nothing of one that is missing or damaged."""
    if not table.is_file():
        return {}
    import data_loader  # and with it pandas, which takes half a second

    with contextlib.suppress(UserError, OSError):
        return data_loader.read_clip_table(table).set_index("slice_file_name")["fold"].to_dict()
    return {}
