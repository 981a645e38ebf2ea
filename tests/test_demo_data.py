"""The miniature: layout, formats, determinism and interruptions. 02_demo.sh trains on it."""

import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import demo_data
import download_data
from data_loader import read_clip_table
from utils import UserError


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_have_names_and_formats_of_the_real_data_set(miniature):
    clips, infos = read_clip_table(miniature / "metadata" / "UrbanSound8K.csv"), []
    assert len(clips) == len(list(miniature.glob("audio/*/*"))) == 60
    for row in clips.itertuples():
        info = soundfile.info(miniature / f"audio/fold{row.fold}" / row.slice_file_name)
        block = 2100 / info.samplerate if "ADPCM" in info.subtype else 0.001  # s; ADPCM files end on a whole block
        assert 0 <= info.duration - (float(row.end) - float(row.start)) + 0.0005 <= block
        samples, _ = soundfile.read(info.name, always_2d=True)  # (n, channels)
        assert 0.1 < np.abs(samples).max() <= 1
        assert info.channels == 1 or not np.array_equal(samples[:, 0], samples[:, 1])
        infos.append(info)
    assert {info.samplerate for info in infos} == {8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000}
    assert len({info.subtype for info in infos}) == 7
    assert {info.format for info in infos} == {"WAV", "WAVEX"} and {info.channels for info in infos} == {1, 2}


def test_plan_gives_no_class_away_by_format_or_length():
    clips = demo_data.plan_miniature()
    assert len(clips) == clips["slice_file_name"].nunique() == 300
    assert clips.groupby("fsID")[["fold", "classID"]].nunique().max().max() == 1
    assert (clips.groupby("classID")["fsID"].agg(lambda ids: (ids % len(demo_data.FORMATS)).nunique()) >= 9).all()
    is_short = clips["end"] - clips["start"] < demo_data.SECONDS
    assert is_short.groupby(clips["classID"]).sum().between(3, 6).all()


def test_make_miniature_writes_the_same_bytes_again_only_where_needed(tmp_path):
    assert demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    before = contents(tmp_path)
    assert not demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    next(tmp_path.glob("audio/fold1/*-3-*.wav")).write_bytes(b"")
    time.sleep(1.1)  # a time stamp in a file would differ
    assert demo_data.make_miniature(tmp_path, folds=2, clips_per_class=1)
    assert contents(tmp_path) == before
    for folds in (1, 3):  # clips of another, or a table of another
        with pytest.raises(UserError, match="does not belong to this miniature"):
            demo_data.make_miniature(tmp_path, folds=folds, clips_per_class=1)
    assert contents(tmp_path) == before


def test_killed_demo_never_looks_complete(tmp_path, monkeypatch, capsys):
    arguments = [REPOSITORY / "download_data.py", "--demo", "--data_dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, *arguments])
    while process.poll() is None and len(list(tmp_path.glob("audio/fold1/*.wav"))) < 5:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert demo_data.holds_miniature(tmp_path) and not (tmp_path / "metadata" / "UrbanSound8K.csv").exists()
    monkeypatch.setattr("sys.argv", arguments)
    for word in ("made", "complete"):
        download_data.main()
        assert f"{word}: 300 synthetic" in capsys.readouterr().out


def test_demo_on_full_disk_is_one_line(scripts, tmp_path):
    (tmp_path / "audio" / "fold1").mkdir(parents=True)
    (tmp_path / "audio" / "fold1" / "900001-0-0-0.wav").symlink_to("/dev/full")
    done = scripts.run("download_data", "--demo", "--data_dir", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device: make room" in done.stderr
