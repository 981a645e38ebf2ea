"""The miniature: layout, formats, determinism, interruptions, and that its classes can be told apart."""

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

import audio_reader
import data_loader
import demo_data
import front_end
from utils import UserError

SCRIPT = Path(demo_data.__file__).with_name("download_data.py")


def rows_of(folder):
    with open(folder / "metadata" / "UrbanSound8K.csv", newline="") as file:
        return list(csv.DictReader(file))


def path_of(folder, row):
    return folder / "audio" / f"fold{row['fold']}" / row["slice_file_name"]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_and_names_are_the_data_sets(miniature):
    rows = rows_of(miniature)
    assert tuple(rows[0]) == demo_data.METADATA_COLUMNS
    assert len(rows) == len({row["slice_file_name"] for row in rows}) == 60
    for row in rows:
        fsid, class_id, *_ = row["slice_file_name"].removesuffix(".wav").split("-")
        assert (fsid, class_id) == (row["fsID"], row["classID"])
        assert row["class"] == demo_data.CLASS_NAMES[int(class_id)]
        assert row["salience"] in ("1", "2")
        assert 0.05 <= float(row["end"]) - float(row["start"]) <= 4
    assert {path_of(miniature, row) for row in rows} == set(miniature.glob("audio/*/*"))


def test_classes_and_folds_are_balanced_and_no_recording_is_in_two():
    clips = demo_data.plan_miniature()
    assert len(clips) == 300
    assert {(clip.fold, clip.class_id) for clip in clips} == {(f, c) for f in range(1, 11) for c in range(10)}
    folds, formats, short = {}, {}, {}
    for clip in clips:
        folds.setdefault(clip.row[1], set()).add(clip.fold)
        formats.setdefault(clip.class_id, set()).add(clip.file_format)
        short[clip.class_id] = short.get(clip.class_id, 0) + (clip.seconds < 4)
    assert len(folds) == 200 and all(len(where) == 1 for where in folds.values())
    assert all(len(kinds) >= 9 for kinds in formats.values())  # no class can be told by its file format
    assert all(3 <= n <= 6 for n in short.values())  # nor by its length
    assert min(clip.seconds for clip in clips) == 0.05


def test_files_have_the_formats_of_the_real_set(miniature):
    infos = [soundfile.info(path_of(miniature, row)) for row in rows_of(miniature)]
    assert {info.samplerate for info in infos} == {8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000}
    assert {info.channels for info in infos} == {1, 2}
    subtypes = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "IMA_ADPCM", "MS_ADPCM"}
    assert {info.subtype for info in infos} == subtypes
    assert {info.format for info in infos} == {"WAV", "WAVEX"}
    for row, info in zip(rows_of(miniature), infos, strict=True):
        block = 2100 / info.samplerate if "ADPCM" in info.subtype else 0.001  # s; ADPCM files end on a whole block
        assert 0 <= info.duration - (float(row["end"]) - float(row["start"])) + 0.0005 <= block


def test_every_clip_is_audible_and_unclipped(miniature):
    for row in rows_of(miniature):
        samples, _ = soundfile.read(path_of(miniature, row), always_2d=True)
        assert np.isfinite(samples).all()
        assert 0.1 < np.abs(samples).max() <= 1
        assert samples.shape[1] == 1 or not np.array_equal(samples[:, 0], samples[:, 1])


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_data.make_miniature(tmp_path / name, folds=2, clips_per_class=1, seed=seed)
        time.sleep(1.1 if name == "a" else 0)  # a time stamp in a file would differ
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a if name.endswith(".wav"))


def test_classes_can_be_told_apart_across_folds(miniature):
    """The nearest class by mean and spread of the mel bands, fold 3 held out: a far weaker judge than a network."""
    audio = data_loader.AudioSettings()
    rows = rows_of(miniature)
    features = []
    for row in rows:
        samples = audio_reader.read_audio(path_of(miniature, row), audio.sample_rate)
        mel = front_end.log_mel(front_end.fit_clip(samples, audio), audio)[:64]  # bands below 3.2 kHz
        mel = mel - mel.max()
        features.append(np.concatenate([mel.mean(axis=1), mel.std(axis=1)]))
    features, labels = np.array(features), np.array([int(row["classID"]) for row in rows])
    is_test = np.array([row["fold"] == "3" for row in rows])
    centres = np.array([features[~is_test & (labels == k)].mean(axis=0) for k in range(10)])
    nearest = ((features[is_test][:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[is_test]).mean() > 0.8


def test_complete_miniature_is_left_alone_and_a_damaged_one_mended(tmp_path):
    assert demo_data.make_miniature(tmp_path, folds=1, clips_per_class=1)
    before = contents(tmp_path)
    clip = next(tmp_path.glob("audio/fold1/*-3-*.wav"))
    stamp = clip.stat().st_mtime_ns
    assert not demo_data.make_miniature(tmp_path, folds=1, clips_per_class=1)
    assert clip.stat().st_mtime_ns == stamp
    clip.write_bytes(b"")
    assert demo_data.make_miniature(tmp_path, folds=1, clips_per_class=1)
    assert contents(tmp_path) == before
    assert demo_data.make_miniature(tmp_path, folds=1, clips_per_class=1, force=True)


def test_other_clips_are_refused_and_named(tmp_path):
    demo_data.make_miniature(tmp_path, folds=1, clips_per_class=2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="other clips"):
        demo_data.make_miniature(tmp_path, folds=1, clips_per_class=1)
    with pytest.raises(UserError, match=r"UrbanSound8K\.csv lists other clips"):
        demo_data.make_miniature(tmp_path, folds=2, clips_per_class=2)
    assert contents(tmp_path) == before
    stranger = tmp_path / "real" / "audio" / "fold1" / "101415-3-0-2.wav"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"101415-3-0-2\.wav"):
        demo_data.make_miniature(tmp_path / "real")
    assert contents(tmp_path / "real") == {"audio/fold1/101415-3-0-2.wav": b"RIFF"}


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_demo_that_is_stopped_never_looks_complete(tmp_path, stop, status):
    command = [sys.executable, SCRIPT, "--demo", "--assets_dir", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(tmp_path.glob("data/UrbanSound8K/audio/fold1/*.wav"))) < 5:
        time.sleep(0.01)
    os.kill(process.pid, stop)
    _, errors = process.communicate()
    assert process.returncode == status and "Traceback" not in errors
    assert demo_data.holds_miniature(tmp_path / "data" / "UrbanSound8K")
    assert not (tmp_path / "data" / "UrbanSound8K" / "metadata").exists()


def test_demo_makes_300_clips_and_says_so_again(run_script, tmp_path):
    folder = tmp_path / "data" / "UrbanSound8K"
    for word in ("made", "complete"):
        done = run_script("download_data.py", "--demo", "--assets_dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{word}: 300 synthetic clips in {folder}" in done.stdout
    assert len(rows_of(folder)) == len(list(folder.glob("audio/fold*/*.wav"))) == 300
