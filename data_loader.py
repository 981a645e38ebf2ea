"""The processed files of the data set, which preprocess_data.py writes and training reads, and the data set's table.

Nothing here imports torch or scipy: the preprocessing workers import this file, too.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import os
import re
import zlib
from pathlib import Path

import numpy as np

import utils
from audio_settings import AudioSettings
from utils import UserError

# --- The data set's table ----------------------------------------------------------------------------------------

CLIP_COLUMNS = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]


def read_clip_table(path):
    """Return the rows of UrbanSound8K.csv (or clips.csv) as dicts of strings, in file order, with fold and classID int.

    UserError names the row (as an editor counts lines) and what is wrong with it: a missing column, a fold outside
    1 to 10, a classID with two names, a clip listed twice, a file name that leaves its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no metadata at {path}: run python download_data.py, or name the data set's folder")
    clips, names, lines = [], {}, {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in CLIP_COLUMNS if column not in (reader.fieldnames or [])]:
                raise UserError(f"{path} lacks the column {', '.join(missing)}: it must have {', '.join(CLIP_COLUMNS)}")
            for clip in reader:
                where = f"{path}, line {reader.line_num}"
                _check_row(clip, where)
                name, class_id = clip["slice_file_name"], clip["classID"]
                if name in lines:
                    raise UserError(f"{where}: {name} is listed already on line {lines[name]}")
                if names.setdefault(class_id, clip["class"]) != clip["class"]:
                    raise UserError(f"{where}: classID {class_id} is {clip['class']!r}, but {names[class_id]!r} above")
                lines[name] = reader.line_num
                clips.append(clip)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of comma-separated values in UTF-8 ({error}): get it again") from error
    if len(set(names.values())) != len(names):
        raise UserError(f"{path}: one class name has several classIDs: {dict(sorted(names.items()))}")
    if not clips:
        raise UserError(f"{path} lists no clips")
    return clips


def _check_row(clip, where):
    """Make fold and classID of one row int. UserError for what is wrong with the row by itself."""
    if None in clip or None in clip.values():  # csv's sign for columns too many or too few
        raise UserError(f"{where} has more or fewer columns than the first line")
    for column in ("fold", "classID"):
        if not re.fullmatch(r"\s*\d{1,9}\s*", clip[column]):
            raise UserError(f"{where}: {column} {clip[column]!r} is not a whole number")
        clip[column] = int(clip[column])
    if not 1 <= clip["fold"] <= 10:
        raise UserError(f"{where}: fold {clip['fold']} is outside 1 to 10")
    name = clip["slice_file_name"]
    if name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", name) or len(name.encode()) > 255:
        raise UserError(f"{where}: {name[:300]!r} is not a plain file name")
    if not clip["class"] or not clip["class"].isprintable():
        raise UserError(f"{where}: {clip['class']!r} is not a class name")


# --- Processed files ---------------------------------------------------------------------------------------------

PROCESSED_FILES = ["features.pkl", "labels.pkl", "folds.pkl", "class_mapping.pkl", "clips.csv", "features.json"]


CHECKED_BYTES = 1 << 24  # of the data, a thread at a time


@dataclasses.dataclass
class Processed:
    """The processed data set: everything that training needs, in the order of clips.csv."""

    features: np.ndarray  # (clips, rows, n_frames) log-mel in dB
    labels: np.ndarray  # (clips,) int64 classID
    folds: np.ndarray  # (clips,) int64, 1 to 10
    class_names: dict  # {classID: class name}
    clips: list  # metadata rows
    audio: AudioSettings
    info: dict  # features.json


def save_processed(folder, features, clips, audio, source, left_out=()):
    """Write the processed files of a data set. features.json goes first out and last in: it marks a complete set.

    features: (clips, rows, n_frames); clips: metadata rows in the same order, as from `read_clip_table`; source: name
    of the data set; left_out: names of clips that its metadata lists and the files lack.
    """
    with features_writer(folder, audio) as append:
        append(features)
    save_tables(folder, clips, audio, source, left_out)


@contextlib.contextmanager
def features_writer(folder, audio):
    """Write a folder's features.pkl as the clips come: gives a function that appends features (n, rows, n_frames).

    If the block fails, the folder stays as it was. If it ends well, `save_tables` must follow.
    """
    folder = Path(folder)
    with utils.array_writer(folder / "features.pkl", audio.shape, audio.feature_dtype) as append:
        yield append
        (folder / "features.json").unlink(missing_ok=True)


def save_tables(folder, clips, audio, source, left_out):
    """Write the processed files beside a new features.pkl; the arguments are `save_processed`'s."""
    folder = Path(folder)
    features = load_features(folder)
    labels, folds = (np.array([clip[column] for clip in clips], np.int64) for column in ("classID", "fold"))
    utils.save_pickle(folder / "labels.pkl", labels)
    utils.save_pickle(folder / "folds.pkl", folds)
    utils.save_pickle(folder / "class_mapping.pkl", class_mapping(clips))
    with utils.atomic_write(folder / "clips.csv", "w") as file:
        writer = csv.DictWriter(file, CLIP_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(clips)
    info = {
        "clips": len(clips),
        "shape": list(features.shape),
        "audio": dataclasses.asdict(audio),
        "source": source,
        "left_out": list(left_out),
        "fingerprint": fingerprint(features, labels, folds),
    }
    utils.save_json(folder / "features.json", info)


def load_features(folder):
    """Return the features in a folder: in memory as far as they are used, and once for all processes of a machine."""
    return utils.load_pickle(Path(folder) / "features.pkl", memory_map=True)


def class_mapping(clips):
    """Return {classID: class name}, in the order of classID, as the metadata's rows have it."""
    return dict(sorted({clip["classID"]: clip["class"] for clip in clips}.items()))


def count_clips(clips):
    """Return (the folds present, {class name: its clips in each of them}), in the order of fold and classID."""
    folds = sorted({clip["fold"] for clip in clips})
    counts = collections.Counter((clip["class"], clip["fold"]) for clip in clips)
    return folds, {name: [counts[name, fold] for fold in folds] for name in class_mapping(clips).values()}


def fingerprint(features, labels, folds):
    """Return a short hash of the data, so that a resumed training notices other data under the same path.

    A hash of the CRC-32 of its parts: it finds damage and other data, not forgery. Threads share the parts, so that
    checking takes half the time of reading.
    """
    parts = []
    for array in (features, np.asarray(labels, np.int64), np.asarray(folds, np.int64)):
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parts += [content[start : start + CHECKED_BYTES] for start in range(0, content.size, CHECKED_BYTES)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checksums = list(pool.map(zlib.crc32, parts))  # which lets other threads run meanwhile
    return hashlib.blake2b(repr(checksums).encode(), digest_size=8).hexdigest()


def load_processed(folder):
    """Return the Processed data set in a folder. UserError says what is missing, damaged or at odds, and the remedy."""
    folder = Path(folder)
    missing = [name for name in PROCESSED_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: run python preprocess_data.py (or fix --processed_dir)")
    info = read_info(folder)
    features = load_features(folder)
    labels, folds, names = (utils.load_pickle(folder / name) for name in PROCESSED_FILES[1:4])
    clips = read_clip_table(folder / "clips.csv")
    remedy = f"{folder} is not one complete set: run python preprocess_data.py --overwrite"
    try:
        audio = AudioSettings(**info["audio"])
    except (TypeError, UserError) as error:
        raise UserError(f"{folder / 'features.json'} has audio settings that can't be: {error}. {remedy}") from error
    for name, array, dtype in (
        ("features.pkl", features, audio.feature_dtype),
        ("labels.pkl", labels, "int64"),
        ("folds.pkl", folds, "int64"),
    ):
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            raise UserError(f"{folder / name} does not hold an array of {dtype}. {remedy}")
    if (
        features.shape != (len(clips), *audio.shape)
        or [clip["classID"] for clip in clips] != labels.tolist()
        or [clip["fold"] for clip in clips] != folds.tolist()
        or class_mapping(clips) != names
    ):
        raise UserError(f"{remedy} (features, labels, folds, class_mapping and clips.csv differ)")
    if fingerprint(features, labels, folds) != info.get("fingerprint"):
        raise UserError(f"{remedy} (features.pkl has other values than features.json says)")
    return Processed(features, labels, folds, class_mapping(clips), clips, audio, info)


def read_info(folder):
    """Return the dict in a folder's features.json. UserError if it is not one."""
    path = folder / "features.json"
    info = utils.load_json(path)
    kinds = {"audio": dict, "left_out": list, "source": str}
    if not isinstance(info, dict) or any(type(info.get(key)) is not kind for key, kind in kinds.items()):
        raise UserError(
            f"{path} is damaged: it must have {', '.join(kinds)}. Run python preprocess_data.py --overwrite"
        )
    return info


def check_audio_settings(audio):
    """Raise a UserError that names each setting in which `audio`, a dict of features.json, is not config.py's."""
    wanted = dataclasses.asdict(AudioSettings())
    differences = [
        f"{name} is {audio.get(name)!r} there and {value!r} in config.py"
        for name, value in wanted.items()
        if audio.get(name) != value
    ]
    if differences:
        raise UserError(
            f"the processed files have other audio settings: {'; '.join(differences)}. "
            "Run python preprocess_data.py --overwrite, or set config.py back"
        )
