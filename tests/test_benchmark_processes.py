"""benchmark_processes.py measures what it says. Its figures are not asserted."""

import sys
from pathlib import Path

import numpy as np
import pytest

import data_loader
from benchmarks import benchmark_processes
from utils import UserError

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads memory from /proc")

# Holds 200 MB in a process that it starts, long enough to be looked at.
HOLD = "import time; held = b'x' * 200_000_000; time.sleep(1)"
START = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}]); print('done')"


def test_memory_of_a_command_counts_what_it_starts():
    seconds, text, own, _ = benchmark_processes.measure([sys.executable, "-c", START])
    assert text == "done\n" and seconds > 1
    assert 200e6 < own < 300e6
    with pytest.raises(UserError, match=r"ended with 1: [\s\S]*NameError"):
        benchmark_processes.measure([sys.executable, "-c", "nothing"])


def test_synthetic_data_are_whole_sets(tmp_path):
    benchmark_processes.write_features(tmp_path / "data", 25)
    data = data_loader.load_processed(tmp_path / "data")
    assert len(np.unique(data.folds)) == 10 and len(data.labels) == 25
    benchmark_processes.write_data_set(tmp_path / "set", 130)
    clips = data_loader.read_clip_table(tmp_path / "set" / "metadata" / "UrbanSound8K.csv")
    assert len(clips) == 130
    assert all(
        (tmp_path / "set" / "audio" / f"fold{clip['fold']}" / clip["slice_file_name"]).is_file() for clip in clips
    )


def test_a_stage_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_processes.py", "--stage", "memory", "--clips", "40"])
    benchmark_processes.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["preprocess 40 clips", "train on 40 clips"]
