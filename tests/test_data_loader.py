"""Metadata table and processed files: what is stored comes back, and every fault is named."""

import csv
import dataclasses
import io
import json
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

import data_loader
import utils
from data_loader import AudioSettings
from utils import UserError

AUDIO = AudioSettings()

# --- The data set's table ----------------------------------------------------------------------------------------

ROWS = [
    ("100-0-0-0.wav", "100", "0.0", "4.0", "1", "1", "0", "air_conditioner"),
    ("100-0-0-1.wav", "100", "4.0", "8.0", "1", "1", "0", "air_conditioner"),
    ("200-3-0-0.wav", "200", "0.5", "1.5", "2", "10", "3", "dog_bark"),
    ("300-8-0-0.wav", "300", "0.0", "4.0", "1", "2", "8", "siren"),
]


def table(rows=ROWS, header=data_loader.CLIP_COLUMNS, line_end="\n"):
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([header, *rows])
    return text.getvalue().encode()


def changed(line, **values):
    """The table with other values in one line."""
    rows = [list(row) for row in ROWS]
    for column, value in values.items():
        rows[line - 2][data_loader.CLIP_COLUMNS.index(column)] = value
    return table(rows)


@pytest.mark.parametrize(
    "content",
    [
        table(),
        table(line_end="\r\n"),
        b"\xef\xbb\xbf" + table(),
        b"\xef\xbb\xbf" + table(line_end="\r\n"),
        table() + b"\n\n",
        table([(*row[::-1], "more") for row in ROWS], [*data_loader.CLIP_COLUMNS[::-1], "comment"]),
        changed(2, fold=" 1 "),
    ],
)
def test_table_is_read(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    clips = data_loader.read_clip_table(tmp_path / "a.csv")
    assert [clip["slice_file_name"] for clip in clips] == [row[0] for row in ROWS]
    assert [clip["fold"] for clip in clips] == [1, 1, 10, 2]
    assert [clip["classID"] for clip in clips] == [0, 0, 3, 8]
    assert [clip["class"] for clip in clips] == [row[7] for row in ROWS]
    assert data_loader.class_mapping(clips) == {0: "air_conditioner", 3: "dog_bark", 8: "siren"}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "lacks the column slice_file_name, fsID"),
        (table([], data_loader.CLIP_COLUMNS), "lists no clips"),
        (
            table([row[:-1] for row in ROWS], data_loader.CLIP_COLUMNS[:-1]),
            "lacks the column class: it must have slice",
        ),
        (table([row[:5] + row[6:] for row in ROWS], [*data_loader.CLIP_COLUMNS[:5], "Fold", "classID"]), "column fold"),
        (b"<!DOCTYPE html>\n", "lacks the column"),
        (changed(3, fold="0"), "line 3: fold 0 is outside 1 to 10"),
        (changed(4, fold="11"), "line 4: fold 11 is outside 1 to 10"),
        (changed(4, fold="-1"), "line 4: fold '-1' is not a whole number"),
        (changed(5, fold="two"), "line 5: fold 'two' is not a whole number"),
        (changed(5, fold="1.0"), "line 5: fold '1.0' is not a whole number"),
        (changed(5, fold="1_0"), "line 5: fold '1_0' is not a whole number"),
        (changed(5, fold=""), "line 5: fold '' is not a whole number"),
        (changed(5, classID="-3"), "line 5: classID '-3' is not a whole number"),
        (changed(5, classID="9" * 30), "line 5: classID '9+' is not a whole number"),
        (changed(3, **{"class": "siren"}), "line 3: classID 0 is 'siren', but 'air_conditioner' above"),
        (changed(5, **{"class": "dog_bark"}), r"one class name has several classIDs: .*8: 'dog_bark'"),
        (changed(5, **{"class": ""}), "line 5: '' is not a class name"),
        (changed(5, **{"class": "\x1b[2J"}), r"line 5: '\\x1b\[2J' is not a class name"),
        (changed(4, slice_file_name=ROWS[0][0]), "line 4: 100-0-0-0.wav is listed already on line 2"),
        (changed(2, slice_file_name="../../etc/passwd"), "line 2: '../../etc/passwd' is not a plain file name"),
        (changed(2, slice_file_name="/etc/passwd"), "line 2: '/etc/passwd' is not a plain file name"),
        (changed(2, slice_file_name="..\\a.wav"), "is not a plain file name"),
        (changed(2, slice_file_name=".."), "line 2: '..' is not a plain file name"),
        (changed(2, slice_file_name=""), "line 2: '' is not a plain file name"),
        (changed(2, slice_file_name="a\0.wav"), "line 2: 'a.x00.wav' is not a plain file name"),
        (changed(2, slice_file_name="a" * 300), "is not a plain file name"),
        (table([ROWS[0], ROWS[1][:-1]]), "line 3 has more or fewer columns than the first line"),
        (table([ROWS[0], ROWS[1][:3]]), "line 3 has more or fewer columns"),
        (table([ROWS[0], (*ROWS[1], "more")]), "line 3 has more or fewer columns"),
        (table().replace(b"200-3", b"\n\n200-3").replace(b",10,3", b",12,3"), "line 6: fold 12"),
        (table().decode().encode("utf-16"), "is not a table of comma-separated values in UTF-8"),
        (table() + b"\xff\xfe", "is not a table of comma-separated values in UTF-8"),
        (changed(2, fsID="x" * 200_000), "is not a table of comma-separated values.*field larger"),
    ],
)
def test_table_is_refused_with_line_and_reason(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        data_loader.read_clip_table(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(caught.value)


def test_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no metadata at .*a\.csv: run python download_data\.py"):
        data_loader.read_clip_table(tmp_path / "a.csv")


# --- Processed files ---------------------------------------------------------------------------------------------

SMALL = AudioSettings(8000, 0.2, 256, 128, 16, 2, 64, 8, 0.0, 4000.0)


def make(folder, left_out=()):
    (folder / "table.csv").write_bytes(table())
    clips = data_loader.read_clip_table(folder / "table.csv")
    (folder / "table.csv").unlink()
    features = np.random.default_rng(0).normal(-40, 20, (len(clips), *SMALL.shape)).astype(np.float16)
    data_loader.save_processed(folder, features, clips, SMALL, "UrbanSound8K", left_out)
    return features


def test_processed_files_round_trip(tmp_path):
    features = make(tmp_path, ["400-1-0-0.wav"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(data_loader.PROCESSED_FILES)
    data = data_loader.load_processed(tmp_path)
    assert np.array_equal(data.features, features) and data.features.dtype == np.float16
    assert (data.labels.tolist(), data.labels.dtype) == ([0, 0, 3, 8], np.int64)
    assert (data.folds.tolist(), data.folds.dtype) == ([1, 1, 10, 2], np.int64)
    assert data.class_names == {0: "air_conditioner", 3: "dog_bark", 8: "siren"}
    assert [tuple(map(str, clip.values())) for clip in data.clips] == ROWS
    assert data.audio == SMALL
    assert data.info["left_out"] == ["400-1-0-0.wav"]
    assert (data.info["clips"], data.info["source"]) == (4, "UrbanSound8K")
    plain = pickle.loads((tmp_path / "features.pkl").read_bytes())  # anybody's pickle reads them
    assert np.array_equal(plain, features)


@pytest.mark.parametrize("name", data_loader.PROCESSED_FILES)
def test_each_missing_file_is_named(tmp_path, name):
    make(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"lacks {name}: run python preprocess_data\.py"):
        data_loader.load_processed(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x05", bytes(500), b"<html></html>", b"cos\nsystem\n(S'true'\ntR."])
@pytest.mark.parametrize("name", data_loader.PROCESSED_FILES)
def test_each_damaged_file_is_named(tmp_path, name, content):
    make(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        data_loader.load_processed(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", data_loader.PROCESSED_FILES[:4])
def test_each_flipped_bit_is_noticed(tmp_path, name):
    make(tmp_path)
    whole = (tmp_path / name).read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(data)
        try:
            data = data_loader.load_processed(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
            continue
        assert plain_values(data) == plain_values_of(tmp_path, name, whole)  # a bit that means nothing


def plain_values(data):
    return data.features.tobytes(), data.labels.tolist(), data.folds.tolist(), data.class_names


def plain_values_of(folder, name, content):
    (folder / name).write_bytes(content)
    return plain_values(data_loader.load_processed(folder))


def save(folder, name, change):
    """Write one pickle of a set again with its value changed."""
    utils.save_pickle(folder / name, change(utils.load_pickle(folder / name)))


INCONSISTENT = {
    "another set's features": ("features.pkl", lambda features: features[::-1].copy()),
    "one clip fewer": ("features.pkl", lambda features: features[:-1]),
    "other mel bands": ("features.pkl", lambda features: features[:, :-1].copy()),
    "another type": ("features.pkl", lambda features: features.astype(np.float64)),
    "another byte order": ("features.pkl", lambda features: features.astype(">f2")),
    "a list": ("features.pkl", lambda features: features.tolist()),
    "labels in another order": ("labels.pkl", lambda labels: labels[::-1].copy()),
    "labels as numbers with a point": ("labels.pkl", lambda labels: labels.astype(float)),
    "a label outside the mapping": ("labels.pkl", lambda labels: labels + 1),
    "labels as text": ("labels.pkl", lambda labels: labels.astype("U5")),
    "one label fewer": ("labels.pkl", lambda labels: labels[1:]),
    "folds in another order": ("folds.pkl", lambda folds: np.sort(folds)),
    "folds as a list": ("folds.pkl", lambda folds: folds.tolist()),
    "another mapping": ("class_mapping.pkl", lambda names: {0: "siren", 3: "dog_bark", 8: "air_conditioner"}),
    "a mapping with one more": ("class_mapping.pkl", lambda names: {**names, 9: "street_music"}),
    "a mapping that is none": ("class_mapping.pkl", lambda names: list(names.values())),
}


@pytest.mark.parametrize("label", INCONSISTENT)
def test_files_that_differ_are_named(tmp_path, label):
    make(tmp_path)
    save(tmp_path, *INCONSISTENT[label])
    with pytest.raises(UserError, match=r"is not one complete set: run python preprocess_data\.py --overwrite"):
        data_loader.load_processed(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("audio", None),
        ("audio", {}),
        ("audio", {**dataclasses.asdict(SMALL), "hop_length": 0}),
        ("audio", {**dataclasses.asdict(SMALL), "sample_rate": "8000"}),
        ("audio", {**dataclasses.asdict(SMALL), "short_clips": "loop"}),
        ("audio", {**dataclasses.asdict(SMALL), "n_mels": 32}),
        ("audio", {**dataclasses.asdict(SMALL), "colour": "red"}),
        ("fingerprint", "0123456789abcdef"),
        ("fingerprint", None),
        ("left_out", None),
        ("source", 5),
    ],
)
def test_features_json_that_does_not_fit(tmp_path, key, value):
    make(tmp_path)
    path = tmp_path / "features.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"features\.json .*preprocess_data\.py --overwrite|not one complete set"):
        data_loader.load_processed(tmp_path)


def test_features_json_that_is_no_dictionary(tmp_path):
    make(tmp_path)
    (tmp_path / "features.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"features\.json is damaged: it must have audio, left_out, source"):
        data_loader.load_processed(tmp_path)


def test_saving_again_never_mixes_two_sets(tmp_path):
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    clips = data_loader.load_processed(tmp_path).clips
    (tmp_path / "folds.pkl").unlink()
    (tmp_path / "folds.pkl" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):  # half of the new set is written
        data_loader.save_processed(tmp_path, np.zeros((4, *SMALL.shape), "f2"), clips, SMALL, "x")
    shutil.rmtree(tmp_path / "folds.pkl")
    assert not (tmp_path / "features.json").exists()
    with pytest.raises(UserError, match=r"lacks folds\.pkl, .*features\.json: run"):
        data_loader.load_processed(tmp_path)
    make(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fingerprint_tells_data_apart():
    features, labels, folds = np.zeros((2, 3, 4), np.float16), [0, 1], [1, 2]
    prints = {
        data_loader.fingerprint(features, labels, folds),
        data_loader.fingerprint(features + 1, labels, folds),
        data_loader.fingerprint(features, [1, 0], folds),
        data_loader.fingerprint(features, labels, [2, 1]),
    }
    assert len(prints) == 4
    assert data_loader.fingerprint(np.asfortranarray(features), np.array(labels), np.array(folds, np.int32)) in prints


def test_other_audio_settings_are_named():
    data_loader.check_audio_settings(dataclasses.asdict(AUDIO))
    with pytest.raises(UserError, match=r"n_mels is 64 there and 128 in config\.py; top_db is None there and 80"):
        data_loader.check_audio_settings({**dataclasses.asdict(AUDIO), "n_mels": 64, "top_db": None})


def test_nothing_slow_is_imported():
    """The preprocessing workers import this file: neither torch nor pandas nor librosa comes with it."""
    code = "import sys, data_loader; print(*({'torch', 'pandas', 'librosa', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY).stdout == "\n"
