"""The data set's table, the processed files, folds and splits.

preprocess_data.py writes the processed files and training reads them. Nothing here imports torch.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

import utils
from audio import AudioSettings
from utils import UserError

# --- The data set's table ----------------------------------------------------------------------------------------

CLIP_COLUMNS = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
MAX_FOLD = 10
MAX_NAME = 255  # bytes of a file name


def find_dataset(folder):
    """Return (path of UrbanSound8K.csv, folder of fold1, fold2, ...): the official layout, or Kaggle's flat one."""
    flat = folder / "UrbanSound8K.csv"
    return (flat, folder) if flat.is_file() else (folder / "metadata" / "UrbanSound8K.csv", folder / "audio")


def read_clip_table(path):
    """Return the rows of UrbanSound8K.csv (or clips.csv) as a DataFrame, in file order.

    fold and classID are int64, all other columns text as it stands in the file. UserError names the line (as an editor
    counts them) and what is wrong with it: a missing column, a fold outside 1 to 10, a classID with two names, a clip
    listed twice, a file name that leaves its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no metadata at {path}: run python download_data.py, or name the data set's folder")
    try:
        options = {"keep_default_na": False, "index_col": False, "skip_blank_lines": False}  # so that lines count
        with warnings.catch_warnings(action="error"):  # of a first row with more columns than the header
            clips = pd.read_csv(path, dtype=object, encoding="utf-8-sig", **options)
    except (ValueError, pd.errors.ParserWarning) as error:
        reason = utils.one_line(error)
        raise UserError(f"{path} is not a table of comma-separated values in UTF-8 ({reason}): get it again") from error
    if missing := [column for column in CLIP_COLUMNS if column not in clips]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}: it must have {', '.join(CLIP_COLUMNS)}")
    clips = clips[(clips != "").any(axis=1)]  # without blank lines
    if clips.empty:
        raise UserError(f"{path} lists no clips: get it again")
    for column in ("fold", "classID"):
        check_rows(path, clips[column], clips[column].str.fullmatch(r"\s*\d{1,9}\s*"), "is not a whole number")
        clips[column] = clips[column].astype(np.int64)
    check_rows(path, clips["fold"], clips["fold"].between(1, MAX_FOLD), f"is outside 1 to {MAX_FOLD}")
    names = clips["slice_file_name"]
    check_rows(path, names, names.map(is_file_name), "is not a plain file name")
    check_rows(path, names, ~names.duplicated(), "is listed already")
    check_rows(path, clips["class"], clips["class"].map(lambda name: bool(name) and name.isprintable()), "is no name")
    for key, column in (("classID", "class"), ("class", "classID")):
        first = clips.groupby(key)[column].transform("first")
        check_rows(path, clips[column], clips[column] == first, f"has a {key} that has a different {column} above")
    return clips.reset_index(drop=True)


def check_rows(path, column, is_right, fault):
    """Raise a UserError that names the first row of a column that is not right, with its line in the file."""
    if not is_right.all():
        row = is_right.index[~is_right.astype(bool)][0]  # 0 is the line below the header
        value = utils.one_line(column[row])
        raise UserError(f"{path}, line {row + 2}: {column.name} {value!r} {fault}: correct the table")


def is_file_name(name):
    """Return whether a text is the plain name of a file, which can't leave its folder."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f]", name) and len(name.encode()) <= MAX_NAME


def table_text(clips):
    """Return the content of clips.csv."""
    return clips[CLIP_COLUMNS].to_csv(index=False, lineterminator="\n")


def class_mapping(clips):
    """Return {classID: class name}, in the order of classID."""
    pairs = clips[["classID", "class"]].drop_duplicates().sort_values("classID")
    return {int(class_id): name for class_id, name in pairs.itertuples(index=False)}


def names_digest(clips, indices):
    """Return a short hash of the file names of the clips at `indices`, whatever their order."""
    names = sorted(clips["slice_file_name"].iloc[indices])
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()


# --- Processed files ---------------------------------------------------------------------------------------------

PROCESSED_FILES = ["features.pkl", "labels.pkl", "folds.pkl", "class_mapping.pkl", "clips.csv", "features.json"]
CHECKED_BYTES = 1 << 24  # of the features, in one part of their fingerprint


@dataclasses.dataclass
class Processed:
    """The processed data set: all that training needs, in the order of clips.csv."""

    features: np.ndarray  # (clips, n_mels, n_frames) log-mel in dB
    labels: np.ndarray  # (clips,) int64 classID
    folds: np.ndarray  # (clips,) int64, 1 to 10
    class_names: dict  # {classID: class name}
    clips: pd.DataFrame  # (clips, columns) of the metadata
    audio: AudioSettings
    info: dict  # features.json


def save_processed(folder, features, clips, audio, source, left_out=()):
    """Write the processed files, which replace those that are there.

    features: (clips, n_mels, n_frames); clips: DataFrame in the same order; source: name of the data set; left_out:
    names of clips that its metadata lists and the files lack.
    """
    with replacing(folder) as new:
        with features_writer(new, audio) as append:
            append(features)
        save_tables(new, clips, audio, source, left_out)


@contextlib.contextmanager
def replacing(folder):
    """Give a folder for new processed files. They replace those in `folder` if the block ends well, else they go.

    All are written before the first is renamed: a disk that fills leaves the old ones.
    """
    new = Path(folder) / "new"
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    install(new, folder)


def install(new, folder):
    """Move processed files from one folder to another. What a kill cuts short, another call finishes.

    features.json comes last: where `new` has it, the set is whole.
    """
    if (new / "features.json").is_file():
        for name in PROCESSED_FILES:
            if (new / name).is_file():
                os.replace(new / name, Path(folder) / name)
        shutil.rmtree(new)


def features_writer(folder, audio):
    """Write a folder's features.pkl clip by clip: a context with a function that appends (n, n_mels, n_frames)."""
    return utils.array_writer(folder / "features.pkl", audio.shape, audio.feature_dtype)


def save_tables(folder, clips, audio, source, left_out):
    """Write the other processed files beside a new features.pkl; the arguments are those of `save_processed`."""
    features = utils.load_pickle(folder / "features.pkl", memory_map=True)
    labels, folds = (clips[column].to_numpy(np.int64) for column in ("classID", "fold"))
    utils.save_pickle(folder / "labels.pkl", labels)
    utils.save_pickle(folder / "folds.pkl", folds)
    utils.save_pickle(folder / "class_mapping.pkl", class_mapping(clips))
    with utils.atomic_write(folder / "clips.csv", "w") as file:
        file.write(table_text(clips))
    info = {
        "clips": len(clips),
        "shape": list(features.shape),
        "audio": dataclasses.asdict(audio),
        "source": source,
        "left_out": list(left_out),
        "fingerprint": fingerprint(features, labels, folds),
    }
    utils.save_json(folder / "features.json", info)


def fingerprint(features, labels, folds):
    """Return a short hash of the data, so that a resumed training notices different data under the same path.

    A hash of the CRC-32 of its parts: it finds damage and different data, not forgery.
    """
    checksums = []
    for array in (features, labels, folds):
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, content.size, CHECKED_BYTES):
            checksums.append(zlib.crc32(content[start : start + CHECKED_BYTES]))
    return hashlib.blake2b(repr(checksums).encode(), digest_size=8).hexdigest()


def load_processed(folder):
    """Return the Processed data set in a folder. UserError says what is missing, damaged or differs, and the remedy."""
    folder = Path(folder)
    if missing := [name for name in PROCESSED_FILES if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: run python preprocess_data.py (or fix --processed_dir)")
    info = read_info(folder)
    check_audio_settings(info["audio"])
    audio = AudioSettings()
    # Mapped: read as they are used, and once for all processes of a machine.
    features = utils.load_pickle(folder / "features.pkl", memory_map=True)
    clips = read_clip_table(folder / "clips.csv")
    labels, folds = (clips[column].to_numpy(np.int64) for column in ("classID", "fold"))
    tables = {"labels.pkl": labels, "folds.pkl": folds, "class_mapping.pkl": class_mapping(clips)}
    if (
        getattr(features, "dtype", None) != audio.feature_dtype
        or features.shape != (len(clips), *audio.shape)
        or not all(np.array_equal(utils.load_pickle(folder / name), table) for name, table in tables.items())
        or fingerprint(features, labels, folds) != info.get("fingerprint")
    ):
        raise UserError(
            f"{folder} is not one complete set: run python preprocess_data.py --overwrite (features, labels, "
            "folds, class_mapping, clips.csv and the fingerprint in features.json do not fit together)"
        )
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
    if "fine_frames" in audio:
        raise UserError("the processed files are of an earlier version: run python preprocess_data.py --overwrite")
    expected = dataclasses.asdict(AudioSettings())
    differences = [
        f"{name} is {utils.one_line(audio.get(name))} there and {expected.get(name)!r} in config.py"
        for name in {**expected, **audio}
        if audio.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"the processed files have different audio settings: {'; '.join(differences[:4])}. "
            "Run python preprocess_data.py --overwrite, or set config.py back"
        )


# --- Folds -------------------------------------------------------------------------------------------------------


def split(folds, test_fold, validation):
    """Return the clip indices (training, validation, test) for one test fold.

    folds: (clips,) the data set's fold of each clip; test_fold: one of them; validation: a value of VALIDATION, which
    config.py explains; "none" gives no validation indices. UserError if no clip is left to train on or to test.
    """
    present = sorted(set(folds.tolist()))
    if test_fold not in present:
        raise UserError(f"fold {test_fold - 1} has no clips; the folds present are {[fold - 1 for fold in present]}")
    test = folds == test_fold
    if validation == "next_fold":
        held_out = folds == present[(present.index(test_fold) + 1) % len(present)]
    else:
        held_out = test if validation == "test_fold" else np.zeros_like(test)
    training = ~test & ~held_out
    if not training.any():
        needed = 3 if validation == "next_fold" else 2
        remedy = "add folds" if len(present) < 2 else "add folds, or take --validation none"
        raise UserError(f"validation {validation!r} needs at least {needed} folds, not {len(present)}: {remedy}")
    return tuple(np.flatnonzero(mask) for mask in (training, held_out, test))


def band_statistics(features, indices):
    """Return (mean, std) of each mel band over the clips at `indices`, both (n_mels,) float32, in dB.

    One clip at a time in float64, so that no copy of the features is made. A network normalises with them; they come
    from training clips alone.
    """
    total = np.zeros(features.shape[1])
    squares = np.zeros(features.shape[1])
    for index in indices:
        clip = features[index].astype(np.float64)  # (n_mels, n_frames)
        total += clip.sum(axis=1)
        squares += (clip**2).sum(axis=1)
    count = len(indices) * features.shape[2]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)  # a constant band stays finite
