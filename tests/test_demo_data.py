"""The miniature: layout, formats, determinism, interruptions, and that its classes are easy."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import demo_data
from utils import UserError

SCRIPT = Path(demo_data.__file__).with_name("download_data.py")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(folder):
    """Return the rows of the table, each with its file's path."""
    with open(folder / "metadata" / "UrbanSound8K.csv", newline="") as file:
        return [(row, folder / f"audio/fold{row['fold']}" / row["slice_file_name"]) for row in csv.DictReader(file)]


def test_files_have_names_and_formats_of_the_real_data_set(miniature):
    rows = rows_of(miniature)
    assert {path for _, path in rows} == set(miniature.glob("audio/*/*")) and len(rows) == 60
    infos = []
    for row, path in rows:
        assert path.name.split("-")[:2] == [row["fsID"], row["classID"]]
        assert row["class"] == demo_data.CLASS_NAMES[int(row["classID"])]
        info = soundfile.info(path)
        block = 2100 / info.samplerate if "ADPCM" in info.subtype else 0.001  # s; ADPCM files end on a whole block
        assert 0 <= info.duration - (float(row["end"]) - float(row["start"])) + 0.0005 <= block
        samples, _ = soundfile.read(path, always_2d=True)  # (n, channels)
        assert 0.1 < np.abs(samples).max() <= 1
        assert info.channels == 1 or not np.array_equal(samples[:, 0], samples[:, 1])
        infos.append(info)
    assert {info.samplerate for info in infos} == {8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000}
    subtypes = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "IMA_ADPCM", "MS_ADPCM"}
    assert {info.subtype for info in infos} == subtypes
    assert {info.format for info in infos} == {"WAV", "WAVEX"} and {info.channels for info in infos} == {1, 2}


def test_plan_gives_no_class_away_by_format_or_length():
    rows = demo_data.plan_miniature()
    assert len(rows) == len({row["slice_file_name"] for row in rows}) == 300
    assert len({(row["fold"], row["classID"]) for row in rows}) == 100
    assert len({row["fsID"] for row in rows}) == len({(row["fsID"], row["fold"]) for row in rows}) == 200
    for class_id in range(10):
        own = [row for row in rows if row["classID"] == class_id]
        assert len({row["fsID"] % len(demo_data.FORMATS) for row in own}) >= 9
        assert 3 <= sum(row["end"] - row["start"] < 4 for row in own) <= 6


def test_classes_are_easy_across_folds(miniature):
    """The nearest class by mean and std of a coarse spectrum, fold 3 held out: far weaker than a network."""
    features, labels, is_test = [], [], []
    for row, path in rows_of(miniature):
        samples, rate = soundfile.read(path, always_2d=True)
        samples = np.pad(soxr.resample(samples.mean(axis=1), rate, 8000), (0, 256))
        frames = np.lib.stride_tricks.sliding_window_view(samples, 256)[::128] * np.hanning(256)  # (frames, 256)
        power = np.square(np.abs(np.fft.rfft(frames)))  # (frames, 129)
        edges = np.unique(np.geomspace(1, 110, 25).astype(int))
        bands = np.log10(np.add.reduceat(power, edges, axis=1) + 1e-6)  # (frames, bands)
        bands -= bands.max()
        features.append(np.concatenate([bands.mean(axis=0), bands.std(axis=0)]))
        labels.append(int(row["classID"]))
        is_test.append(row["fold"] == "3")
    features, labels, is_test = map(np.array, (features, labels, is_test))
    centres = np.array([features[~is_test & (labels == k)].mean(axis=0) for k in range(10)])  # (10, 2 · bands)
    nearest = ((features[is_test][:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[is_test]).mean() > 0.8


def test_make_miniature_writes_the_same_bytes_again_only_where_needed(tmp_path):
    assert demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    before = contents(tmp_path)
    assert not demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    next(tmp_path.glob("audio/fold1/*-3-*.wav")).write_bytes(b"")
    time.sleep(1.1)  # a time stamp in a file would differ
    assert demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    assert contents(tmp_path) == before
    for folds, words in ((1, "other clips, such as 9000"), (3, r"UrbanSound8K\.csv lists other clips")):
        with pytest.raises(UserError, match=words):
            demo_data.make_miniature(tmp_path, folds=folds, clips_per_class=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_demo_never_looks_complete(run_script, tmp_path, stop, status):
    process = subprocess.Popen([sys.executable, SCRIPT, "--demo", "--data_dir", tmp_path], stderr=subprocess.PIPE)
    while process.poll() is None and len(list(tmp_path.glob("audio/fold1/*.wav"))) < 5:
        time.sleep(0.01)
    os.kill(process.pid, stop)
    _, errors = process.communicate()
    assert process.returncode == status and b"Traceback" not in errors
    assert demo_data.holds_miniature(tmp_path) and not (tmp_path / "metadata" / "UrbanSound8K.csv").exists()
    for word in ("made", "complete"):
        assert f"{word}: 300 synthetic" in run_script("download_data.py", "--demo", "--data_dir", tmp_path).stdout


def test_demo_on_full_disk_is_one_line(run_script, tmp_path):
    path = tmp_path / "audio" / "fold1" / demo_data.plan_miniature()[0]["slice_file_name"]
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    done = run_script("download_data.py", "--demo", "--data_dir", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device: make room" in done.stderr
