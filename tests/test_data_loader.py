"""Metadata table, processed files, folds: what is stored comes back, and every fault is named."""

import csv
import dataclasses
import io
import json
import pickle
import random

import numpy as np
import pandas as pd
import pytest

import data_loader
import utils
from audio import AudioSettings
from utils import UserError

# --- The data set's table ----------------------------------------------------------------------------------------

ROWS = [
    ("100-0-0-0.wav", "100", "0.0", "4.0", "1", "1", "0", "air_conditioner"),
    ("100-0-0-1.wav", "100", "4.0", "8.0", "1", "1", "0", "air_conditioner"),
    ("200-3-0-0.wav", "200", "0.5", "1.5", "2", "10", "3", "dog_bark"),
    ("300-8-0-0.wav", "300", "0.0", "4.0", "1", "2", "8", "siren"),
]
CLIPS = pd.DataFrame(ROWS, columns=data_loader.CLIP_COLUMNS).astype({"fold": int, "classID": int})


def table(rows=ROWS, header=data_loader.CLIP_COLUMNS, line_end="\n"):
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([header, *rows])
    return text.getvalue().encode()


def changed(line, column, value):
    """Return the table with a different value in one line."""
    rows = [list(row) for row in ROWS]
    rows[line - 2][data_loader.CLIP_COLUMNS.index(column)] = value
    return table(rows)


@pytest.mark.parametrize(
    "content",
    [
        table(),
        b"\xef\xbb\xbf" + table(line_end="\r\n"),
        table().replace(b"\n", b"\n\n") + b"\n\n",
        table([(*row[::-1], "more") for row in ROWS], [*data_loader.CLIP_COLUMNS[::-1], "comment"]),
        changed(2, "fold", " 1 "),
    ],
)
def test_table_is_read_as_it_stands(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    clips = data_loader.read_clip_table(tmp_path / "a.csv")
    assert clips[data_loader.CLIP_COLUMNS].values.tolist() == CLIPS.values.tolist()
    assert (clips["fold"].dtype, clips["classID"].dtype, list(clips.index)) == (np.int64, np.int64, [0, 1, 2, 3])
    assert data_loader.class_mapping(clips) == {0: "air_conditioner", 3: "dog_bark", 8: "siren"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a table of comma-separated values in UTF-8"),
        (table().decode().encode("utf-16"), "is not a table of comma-separated values in UTF-8"),
        (table([ROWS[0], (*ROWS[1], "more")]), "is not a table .* line 3, saw 9"),
        (table([(*ROWS[0], "more"), *ROWS[1:]]), "is not a table .* line 2, saw 9"),
        (b"<!DOCTYPE html>\n", "lacks the column slice_file_name, fold"),
        (table([]), "has no rows"),
        (table([ROWS[0], ROWS[1][:3]]), "line 3: fold '' is not a whole number"),
        (changed(4, "fold", "11"), "line 4: fold '11' is outside 1 to 10"),
        (changed(5, "fold", "1_0"), "line 5: fold '1_0' is not a whole number"),
        (changed(5, "classID", "9" * 30), "line 5: classID '9+' is not a whole number"),
        (table().replace(b"200-3", b"\n\n200-3").replace(b",10,3", b",12,3"), "line 6: fold '12'"),
        (changed(3, "class", "siren"), "line 3: class 'siren' has a classID that has a different class above"),
        (changed(5, "class", "dog_bark"), "line 5: classID '8' has a class that has a different classID above"),
        (changed(5, "class", "\x1b[2J"), r"line 5: class '\?\[2J' is no name"),
        (
            changed(5, "class", "classID"),
            "line 5: class 'classID' is no name of a class",
        ),  # a column of the predictions
        (b"a" + b"," * 2000, "over 1000 columns"),
        (table().replace(b"fsID", b"fold"), "has the column fold twice"),
        (b"a" * 70_000 + b"\n1\n", "over .* 65536 bytes"),
        (changed(4, "slice_file_name", ROWS[0][0]), "line 4: slice_file_name '100-0-0-0.wav' is listed already"),
        (changed(2, "slice_file_name", "../../etc/passwd"), "'../../etc/passwd' is no path within the folder"),
        (changed(2, "slice_file_name", "a\0.wav"), r"line 2: slice_file_name 'a\?.wav' is no path within the folder"),
        (changed(2, "slice_file_name", "a\x9b31m.wav"), r"'a\?31m.wav' is no path within the folder"),
    ],
)
def test_table_with_a_fault_is_refused_with_line_and_reason(tmp_path, content, reason):
    with pytest.raises(UserError, match=r"no metadata at .*a\.csv: run python download_data\.py"):
        data_loader.read_clip_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        data_loader.read_clip_table(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(caught.value) and "\n" not in str(caught.value)


# --- Processed files ---------------------------------------------------------------------------------------------

AUDIO = AudioSettings()


FEATURES = np.random.default_rng(0).normal(-40, 20, (len(CLIPS), *AUDIO.shape)).astype(np.float16)


@pytest.fixture
def folder(tmp_path):
    """A folder with processed files of four clips."""
    data_loader.save_processed(tmp_path, FEATURES, CLIPS, AUDIO, "UrbanSound8K", ["400-1-0-0.wav"])
    return tmp_path


def test_processed_files_come_back_as_saved(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(data_loader.PROCESSED_FILES)
    data = data_loader.load_processed(folder)
    assert np.array_equal(data.features, FEATURES) and data.features.dtype == np.float16
    assert (data.labels.tolist(), data.labels.dtype) == ([0, 0, 3, 8], np.int64)
    assert (data.folds.tolist(), data.folds.dtype) == ([1, 1, 10, 2], np.int64)
    assert data.class_names == {0: "air_conditioner", 3: "dog_bark", 8: "siren"}
    assert data.clips.values.tolist() == CLIPS.values.tolist()
    assert data.audio == AUDIO
    assert (data.info["clips"], data.info["source"], data.info["left_out"]) == (4, "UrbanSound8K", ["400-1-0-0.wav"])
    assert np.array_equal(pickle.loads((folder / "features.pkl").read_bytes()), FEATURES)  # with any pickle


@pytest.mark.parametrize("name", data_loader.PROCESSED_FILES)
def test_missing_or_damaged_file_is_named(folder, name):
    whole = (folder / name).read_bytes()
    for content in (b"", bytes(500), b"<html></html>", b"cos\nsystem\n(S'true'\ntR.", whole[: len(whole) // 2]):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            data_loader.load_processed(folder)
        assert str(folder / name) in str(caught.value) or "is not one complete set" in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"lacks {name}: run python preprocess_data\.py"):
        data_loader.load_processed(folder)


@pytest.mark.parametrize("name", data_loader.PROCESSED_FILES[:5])
def test_flipped_bit_is_noticed_or_means_nothing(folder, name):
    whole, rng, refused = (folder / name).read_bytes(), random.Random(0), 0
    for _ in range(40):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(content)
        try:
            data = data_loader.load_processed(folder)
        except UserError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            assert np.array_equal(data.features, FEATURES)
            assert (data.labels.tolist(), data.folds.tolist()) == ([0, 0, 3, 8], [1, 1, 10, 2])
    assert refused > 10


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features.pkl", lambda features: features[::-1].copy()),
        ("features.pkl", lambda features: features.astype(np.float64)),
        ("features.pkl", lambda features: features[0, 0].tolist()),
        ("labels.pkl", lambda labels: labels[::-1].copy()),
        ("labels.pkl", lambda labels: "labels"),
        ("folds.pkl", lambda folds: np.sort(folds)),
        ("class_mapping.pkl", lambda names: {**names, 3: "siren"}),
        ("class_mapping.pkl", lambda names: np.array(list(names))),
    ],
)
def test_files_of_different_sets_are_refused(folder, name, change):
    utils.save_pickle(folder / name, change(utils.load_pickle(folder / name)))
    with pytest.raises(UserError, match=r"is not one complete set: run python preprocess_data\.py --overwrite"):
        data_loader.load_processed(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"audio": None}, r"features\.json is damaged: it must have audio, left_out, source"),
        ({"source": "\ud800"}, r"features\.json is damaged"),
        ({"fingerprint": "0123456789abcdef"}, r"the fingerprint in features\.json do not fit"),
        ({"audio": {**dataclasses.asdict(AUDIO), "n_mels": 32}}, r"n_mels is 32 there and 128 in config\.py"),
        ({"audio": {**dataclasses.asdict(AUDIO), "colour": "red"}}, "colour is red there and None in config"),
        ({"audio": {**dataclasses.asdict(AUDIO), "fine_frames": 2}}, "of an earlier version: r"),
    ],
)
def test_features_json_that_does_not_fit_says_what_to_run(folder, change, named):
    info = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(UserError, match=named) as caught:
        data_loader.load_processed(folder)
    assert "un python preprocess_data.py --overwrite" in str(caught.value)


# --- Folds -------------------------------------------------------------------------------------------------------


def clips_of(folds, chosen):
    return [index for index, fold in enumerate(folds) if fold in chosen]


@pytest.mark.parametrize("present", [range(1, 11), [2, 5, 9], [1, 2, 10]])
@pytest.mark.parametrize("validation", ["next_fold", "none", "test_fold"])
def test_split_of_every_fold(present, validation):
    present = list(present)
    folds = np.random.default_rng(0).permutation(np.repeat(present, 4))
    for fold, following in zip(present, [*present[1:], present[0]], strict=True):
        held_out = {"next_fold": [following], "none": [], "test_fold": [fold]}[validation]
        training, validating, test = data_loader.split(folds, fold, validation)
        assert test.tolist() == clips_of(folds, [fold])
        assert validating.tolist() == clips_of(folds, held_out)
        assert training.tolist() == clips_of(folds, set(present) - {fold, *held_out})


@pytest.mark.parametrize(("present", "validation"), [([4, 7], "next_fold"), ([4], "none"), ([4], "test_fold")])
def test_too_few_folds_are_refused(present, validation):
    with pytest.raises(UserError, match=f"validation '{validation}' needs at least . folds, not {len(present)}"):
        data_loader.split(np.repeat(present, 5), 4, validation)
    numbers = [fold - 1 for fold in present]  # a fold is named as on the command line
    with pytest.raises(UserError, match=rf"fold 8 has no clips; the folds present are \[{str(numbers)[1:-1]}\]"):
        data_loader.split(np.repeat(present, 5), 9, validation)


def test_band_statistics_are_of_the_named_clips_alone():
    features = np.random.default_rng(0).normal(-40, 12, (30, 16, 20)).astype(np.float16)
    features[:, 5] = -80
    training = np.arange(0, 30, 3)
    chosen = features[training].astype(np.float64)
    features[np.setdiff1d(np.arange(30), training)] = np.nan
    mean, std = data_loader.band_statistics(features, training)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, chosen.mean(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, np.maximum(chosen.std(axis=(0, 2)), 1e-3), rtol=1e-5)  # a constant band is finite
