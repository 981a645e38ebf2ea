"""Data sets and their tables, folds, the processed files, splits.

preprocess_data.py writes the processed files and training reads them; nothing behind `read_dataset` knows the kinds of
data sets. To add a kind: a function here that returns its table. Nothing here imports torch.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from tqdm import tqdm

import config
import utils
from audio import AUDIO_SUFFIXES, AudioSettings, find_audio_files
from utils import UserError

# --- Data sets: one function for each kind, which returns one table ------------------------------------------------

CLIP_COLUMNS = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]  # UrbanSound8K's
NEEDED_COLUMNS = ["slice_file_name", "fold", "classID", "class"]
# Of clips.csv. A recording is a file of other data sets; a group is what has to be in one fold; start and end are s.
KNOWN_COLUMNS = [*CLIP_COLUMNS, "recording", "group"]
ESC50_SECONDS = 5  # s of each clip
MAX_NAME = 255  # bytes of a file name
MAX_COLUMNS = 1000  # of a table; pandas takes 2 kB for each
MAX_HEADER = 1 << 16  # bytes of a table's first line in which they are counted
MAX_SECONDS = 1e6  # s; of a time in a recording
PIECE_NUMBERS = re.compile(r"([ ._-]+\(?\d+\)?)+$|(?<=[^\W\d])\d+$")  # of dog-01, dog (3), dog12, 165645-4-1-0


def read_dataset(folder, group_by="pieces"):
    """Return (kind, clips) of a data set's folder: what it is, and a DataFrame with a row for each clip or recording.

    Columns: NEEDED_COLUMNS and `path`; of data sets that are not UrbanSound8K also recording and group, and start and
    end of the part that is meant (s, empty for all). group_by: "pieces" takes files that differ in a number at their
    end as one group, where the data set names none; "file" does not. UserError names what can't be right.
    """
    folder = Path(folder)
    if find_urbansound8k(folder)[0].is_file() or not folder.is_dir():
        return "UrbanSound8K", read_urbansound8k(folder)
    if (folder / "meta" / "esc50.csv").is_file():
        is_whole = config.CLIP_SECONDS >= ESC50_SECONDS
        kind = "ESC-50" if is_whole else f"ESC-50, the first {config.CLIP_SECONDS:g} s of each clip (CLIP_SECONDS)"
        return kind, read_esc50(folder)
    if (folder / "metadata.csv").is_file():
        kind, clips = "a table, metadata.csv", read_metadata_table(folder)
    else:
        kind, clips = "a folder for each class", read_class_folders(folder)
    check_classes(folder, clips)
    names = sorted(set(clips["class"]))
    clips["classID"] = clips["class"].map(names.index)
    if "group" not in clips:
        clips["group"] = clips["recording"] if group_by == "file" else clips["recording"].map(piece_group)
    if "fold" not in clips:
        clips["fold"] = assign_folds(clips, config.N_FOLDS)
    several = clips.groupby("group")["fold"].nunique()
    if len(several := several[several > 1]):
        raise UserError(f"{folder}: the group {several.index[0]!r} is in several folds: give its files one fold")
    return kind, clips


def find_urbansound8k(folder):
    """Return (path of UrbanSound8K.csv, folder of fold1, fold2, ...): the official layout, or Kaggle's flat one."""
    flat = folder / "UrbanSound8K.csv"
    return (flat, folder) if flat.is_file() else (folder / "metadata" / "UrbanSound8K.csv", folder / "audio")


def read_urbansound8k(folder):
    """Return UrbanSound8K's clips: its own folds, fsID and salience."""
    table, audio = find_urbansound8k(folder)
    clips = read_clip_table(table)
    clips["path"] = [
        audio / f"fold{fold}" / name for fold, name in zip(clips["fold"], clips["slice_file_name"], strict=True)
    ]
    return clips


def read_esc50(folder):
    """Return ESC-50's clips, with its own five folds (Piczak 2015): meta/esc50.csv and audio/."""
    path = folder / "meta" / "esc50.csv"
    columns = {"filename": "slice_file_name", "fold": "fold", "target": "classID", "category": "class"}
    clips = read_table(path, [*columns, "src_file"]).rename(columns=columns)
    clips["recording"] = clips["group"] = clips["src_file"]
    clips = check_clips(clips)
    clips["path"] = [folder / "audio" / name for name in clips["slice_file_name"]]
    return clips


def read_metadata_table(folder):
    """Return the recordings that metadata.csv lists: file_name, and if there label, fold, group, start and end (s).

    Without labels, the first folder of file_name is the class.
    """
    path = folder / "metadata.csv"
    rows = read_table(path, ["file_name"], ignore_case=True).apply(lambda column: column.str.strip())
    names = rows["file_name"]
    check_rows(names, names.map(is_file_name), "is no path within the folder")
    folders = names.map(lambda name: name.split("/")[0] if "/" in name else "")
    labels = rows.get("label", folders)
    check_rows(names, labels != "", "has no label")
    is_odd = folders.isin(set(labels)) & (folders != labels)
    check_rows(names, ~is_odd, "is in the folder of a class that is not its label")
    clips = rows.reindex(columns=["start", "end"], fill_value="").assign(recording=names)
    start, end = (pd.to_numeric(clips[column], errors="coerce") for column in ("start", "end"))
    check_rows(clips["start"], start.between(0, MAX_SECONDS) | (clips["start"] == ""), "is no time in s")
    is_end = end.between(0, MAX_SECONDS) & (end > start.fillna(0))
    check_rows(clips["end"], is_end | (clips["end"] == ""), "is no time in s after the start")
    clips["class"], clips["path"] = labels, [folder / name for name in names]
    parts = names + ("@" + clips["start"]).where(clips["start"] != "", "")
    check_rows(parts, ~parts.duplicated(), "is listed already")
    clips["slice_file_name"] = parts
    if "group" in rows:
        clips["group"] = rows["group"].where(rows["group"] != "", names)
    if "fold" in rows:
        clips["fold"] = fold_numbers(rows["fold"])
    return clips.reset_index(drop=True)


def read_class_folders(folder):
    """Return the recordings in <folder>/<class>/, at any depth below."""
    rows = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"):
        files = find_audio_files(class_folder)
        if not files:
            raise UserError(
                f"{class_folder} holds no recording ({' '.join(sorted(AUDIO_SUFFIXES))}): fill or remove it"
            )
        rows += [(path.relative_to(folder).as_posix(), class_folder.name, path) for path in files]
    if not rows:
        raise UserError(
            f"{folder} is no data set: it needs metadata/UrbanSound8K.csv (python download_data.py fetches it), "
            "meta/esc50.csv, metadata.csv, or a folder of recordings for each class"
        )
    clips = pd.DataFrame(rows, columns=["slice_file_name", "class", "path"])
    return clips.assign(recording=clips["slice_file_name"], start="", end="")


def check_classes(folder, clips):
    """Raise a UserError for one class, a class in two spellings, or a class with one file."""
    for text in clips["class"].unique():
        if not is_class_name(text):
            raise UserError(f"{folder}: {utils.one_line(text)!r} is no name of a class: rename it")
    for text in clips["slice_file_name"]:
        if not text.isprintable() or not is_file_name(f"{text}@{MAX_SECONDS:.2f}"):  # as a clip of it is called
            raise UserError(f"{folder}: {utils.one_line(text)!r} is no name of a file here: rename it, or shorten it")
    files = clips.groupby("class")["recording"].nunique()
    if len(files) < 2:
        raise UserError(
            f"{folder} has one class, {files.index[0]!r}: a classifier needs two, such as a class background"
        )
    # An é is one character, or an e and an accent, as macOS writes it.
    spellings = pd.Series(files.index, files.index.str.normalize("NFKC").str.strip().str.casefold())
    if (twice := spellings.index.duplicated()).any():
        one, other = spellings[spellings.index[twice][0]].tolist()[:2]
        raise UserError(f"{folder} has the classes {one!r} and {other!r}: is it one class in two spellings? Rename one")
    if files.min() < 2:
        raise UserError(
            f"{folder}: the class {files.idxmin()!r} has one file: one tests what others trained, so add more"
        )


def piece_group(recording):
    """Return the group of a recording: its path without the numbers at its end; those of one stem may be its pieces."""
    path = PurePosixPath(recording)
    return str(path.with_name(PIECE_NUMBERS.sub("", path.stem) or path.stem))


def assign_folds(clips, n_folds):
    """Return folds from 1 to n_folds, (clips,): groups stay together, classes are spread evenly. The same everywhere.

    UserError for a class in one group, which would be tested by a network that has never heard it.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    if not 2 <= n_folds <= utils.MAX_FOLDS:
        raise UserError(f"N_FOLDS is {n_folds} in config.py: it must be from 2 to {utils.MAX_FOLDS}")
    groups = clips.groupby("class")["group"].nunique()
    remedy = "add recordings, name groups in metadata.csv, or use --group_by file if the files are independent"
    if groups.min() < 2:
        raise UserError(f"the files of class {groups.idxmin()!r} are one group, which is in one fold: {remedy}")
    if groups.max() < n_folds:
        raise UserError(
            f"no class has as many groups as there are folds, {n_folds}: lower N_FOLDS (config.py), or {remedy}"
        )
    if groups.min() < n_folds:
        few = ", ".join(groups[groups < n_folds].index)
        print(f"note: {few}: fewer groups than the {n_folds} folds, so some folds do not test them; {remedy}")
    print(f"making {n_folds} folds of {len(clips)} recordings in {clips['group'].nunique()} groups", flush=True)
    folds = np.zeros(len(clips), np.int64)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings(action="ignore"):  # of classes with few clips
        for fold, (_, test) in enumerate(splitter.split(clips, clips["classID"], clips["group"]), start=1):
            folds[test] = fold
    return folds


# --- The same sound twice ------------------------------------------------------------------------------------------

SAME_SOUND = 0.96  # correlation of two clips: in 2,148 real clips no two of different recordings come above 0.951
COARSE = 4  # mel bands, and frames, whose mean is one cell of what is compared
COMPARED_ROWS = 2048  # clips that are compared with all others at a time: bounds the memory


def find_same_sounds(features, clips):
    """Return [(clip, clip of a different group)], file names: clips whose sound is the same, exactly or nearly.

    features: (clips, n_mels, n_frames) in dB. Such as one recording exported twice: where the two are in different
    folds, what is tested has been trained on.
    """
    coarse = np.stack([coarse_shape(clip) for clip in features])  # (clips, cells)
    groups, names = clips["group"].to_numpy(), clips["slice_file_name"].to_numpy()
    found = []
    for start in tqdm(range(0, len(coarse), COMPARED_ROWS), "comparing", unit="block", disable=None, leave=False):
        similarity = coarse[start : start + COMPARED_ROWS] @ coarse[start:].T  # (rows, clips from `start` on)
        for row, column in np.argwhere(np.triu(similarity > SAME_SOUND, k=1)) + start:
            if groups[row] != groups[column]:
                found.append((names[row], names[column]))
    return found


def coarse_shape(clip):
    """Return how a clip's log-mel changes over time, (cells,): means of COARSE x COARSE cells, with length 1.

    Less each band's mean, since steady sounds of one kind have much the same spectrum, and never the same changes.
    """
    n_mels, n_frames = (size // COARSE * COARSE for size in clip.shape)
    cells = clip[:n_mels, :n_frames].astype(np.float32).reshape(n_mels // COARSE, COARSE, -1, COARSE).mean(axis=(1, 3))
    cells = (cells - cells.mean(axis=1, keepdims=True)).ravel()  # (n_mels / 4, n_frames / 4) -> (cells,)
    return cells / max(np.linalg.norm(cells), 1e-6)


# --- Tables ------------------------------------------------------------------------------------------------------


def read_table(path, columns, ignore_case=False):
    """Return a CSV file's rows as a DataFrame of text, without blank lines; its index says where each row stands.

    ignore_case: take names of columns in small letters. UserError if it is no table, or lacks one of `columns`.
    """
    try:
        with open(path, "rb") as file:
            header = file.readline(MAX_HEADER)
        if len(header) == MAX_HEADER or header.count(b",") > MAX_COLUMNS:
            raise ValueError(f"its first line has over {MAX_COLUMNS} columns or {MAX_HEADER} bytes")
        options = {"keep_default_na": False, "skip_blank_lines": False}  # so that lines count
        rows = pd.read_csv(path, header=None, dtype=object, encoding="utf-8-sig", **options)
    except (OSError, ValueError) as error:  # such as not UTF-8, nothing in it, more values in a line than in the first
        reason = utils.one_line(error)
        raise UserError(f"{path} is not a table of comma-separated values in UTF-8 ({reason}): get it again") from error
    header = [name.lower() if ignore_case else name for name in rows.iloc[0].str.strip()]
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}: it must have {', '.join(columns)}")
    if twice := [column for column in header if column and header.count(column) > 1]:
        raise UserError(f"{path} has the column {utils.one_line(twice[0])} twice: remove one")
    rows = rows.set_axis(header, axis=1).set_axis([f"{path}, line {row + 1}" for row in rows.index]).iloc[1:]
    rows = rows[(rows != "").any(axis=1)].copy()
    if rows.empty:
        raise UserError(f"{path} has no rows: get it again")
    return rows


def read_clip_table(path):
    """Return the rows of UrbanSound8K.csv or clips.csv as a DataFrame of those of KNOWN_COLUMNS that it has."""
    if not Path(path).is_file():
        raise UserError(f"no metadata at {path}: run python download_data.py, or name the data set's folder")
    return check_clips(read_table(path, NEEDED_COLUMNS))


def check_clips(clips):
    """Return a table's clips, in file order: fold and classID are int64, all other columns text as in the file.

    UserError names the line (as an editor counts them) and what is wrong with it: a fold outside 1 to 10, a classID
    with two names, a clip listed twice, a file name that leaves its folder.
    """
    clips = known_columns(clips).copy()
    clips["fold"] = fold_numbers(clips["fold"])
    clips["classID"] = whole_numbers(clips["classID"])
    names = clips["slice_file_name"]
    check_rows(names, names.map(is_file_name), "is no path within the folder")
    check_rows(names, ~names.duplicated(), "is listed already")
    check_rows(clips["class"], clips["class"].map(is_class_name), "is no name of a class")
    for key, column in (("classID", "class"), ("class", "classID")):
        first = clips.groupby(key)[column].transform("first")
        check_rows(clips[column], clips[column] == first, f"has a {key} that has a different {column} above")
    return clips.reset_index(drop=True)


def known_columns(clips):
    """Return those of KNOWN_COLUMNS that a table has, in their order."""
    return clips[[column for column in KNOWN_COLUMNS if column in clips]]


def whole_numbers(column):
    """Return a column of text as int64. UserError names the line of what is none."""
    check_rows(column, column.str.fullmatch(r"\s*\d{1,9}\s*"), "is not a whole number")
    return column.astype(np.int64)


def fold_numbers(column):
    """Return a column of folds, 1 to MAX_FOLDS, as int64. UserError names the line of what is none."""
    folds = whole_numbers(column)
    check_rows(folds, folds.between(1, utils.MAX_FOLDS), f"is outside 1 to {utils.MAX_FOLDS}")
    return folds


def check_rows(column, is_right, fault):
    """Raise a UserError that names the first value of a column that is not right; its index says where it stands."""
    if not np.all(is_right):
        row = int(np.argmin(is_right))
        raise UserError(f"{column.index[row]}: {column.name} {utils.one_line(column.iloc[row])!r} {fault}: correct it")


def is_class_name(name):
    """Return whether a text can name a class: also as a column of the predictions, beside those of clip and classID."""
    return name.isprintable() and len(name) <= MAX_NAME and name not in ("", "slice_file_name", "classID")


def is_file_name(name):
    """Return whether a text is a file's path within a folder, which can't leave it."""
    parts = name.split("/")
    is_plain = not re.search(r"[\\\x00-\x1f\x7f-\x9f]", name) and not {"", ".", ".."} & set(parts)
    return is_plain and all(len(part.encode(errors="replace")) <= MAX_NAME for part in parts)


def table_text(clips):
    """Return the content of clips.csv."""
    return known_columns(clips).to_csv(index=False, lineterminator="\n")


def listing_digest(clips):
    """Return a short hash of a data set's table, by which preprocessing knows what it has done already."""
    return utils.digest(table_text(clips).encode(errors="replace"))


def class_mapping(clips):
    """Return {classID: class name}, in the order of classID."""
    pairs = clips[["classID", "class"]].drop_duplicates().sort_values("classID")
    return {int(class_id): name for class_id, name in pairs.itertuples(index=False)}


def names_digest(clips, indices):
    """Return a short hash of the file names of the clips at `indices`, whatever their order."""
    names = sorted(clips["slice_file_name"].iloc[indices])
    return utils.digest("\n".join(names).encode())


# --- Processed files ---------------------------------------------------------------------------------------------

NEW_FILES = ".new_processed_files"  # folder of files that are not whole yet; it is removed, so no name of a user's
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
    new = Path(folder) / NEW_FILES
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


def save_tables(folder, clips, audio, source, left_out, listing=None):
    """Write the other processed files beside a new features.pkl; the arguments are those of `save_processed`.

    listing: `listing_digest` of the recordings that the clips were cut from.
    """
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
        "source": utils.one_line(source),
        "left_out": list(left_out),
        "fingerprint": fingerprint(features, labels, folds),
        "listing": listing,
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
    return utils.digest(repr(checksums).encode())


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
    is_right = isinstance(info, dict) and all(type(info.get(key)) is kind for key, kind in kinds.items())
    if not is_right or not info["source"].isprintable():
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
        f"{utils.one_line(name)} is {utils.one_line(audio.get(name))} there and {expected.get(name)!r} in config.py"
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
