"""benchmark.py compares like with like. Its timings are not asserted."""

import json

import numpy as np
import pytest
import soundfile

import demo_data
from benchmarks import benchmark, timing


def test_the_reference_computes_the_same_features(miniature):
    path = max(miniature.rglob("*.wav"), key=lambda path: soundfile.info(path).duration)  # nothing to pad or repeat
    ours, reason = benchmark.our_clip(path)
    assert reason is None
    ours = ours.astype(np.float32)
    usual, fine = benchmark.usual_clip(path)
    assert np.abs(usual - ours[:128]).max() < 0.1  # dB; float16
    assert np.abs(fine[:, ::2] - ours[128:160]).max() < 0.1
    assert np.abs(fine[:, 1::2] - ours[160:, :172]).max() < 0.1  # ours has one frame more, of the silence that follows


def test_epochs_of_train_py_are_timed(tmp_path, capsys):
    (row,) = benchmark.benchmark_overhead(tmp_path, n_clips=32)
    assert row["ours"] > 0 and row["theirs"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert (tmp_path / "checkpoints" / "fold_0" / f"epoch_{timing.TURNS + 1}.pt").is_file()
    assert capsys.readouterr().out == ""


def test_one_stage_as_json_and_as_a_table(run_script, tmp_path):
    for number in range(2):
        demo_data.write_clip(tmp_path / f"{number}.wav", np.full((800, 2), 0.1), 44_100, "PCM_16")
    done = run_script("benchmarks/benchmark.py", "--stage", "preprocess", "--clips", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "torch" in result["machine"]
    assert [row["stage"] for row in result["rows"]] == ["preprocess"] * 2
    row = result["rows"][0]
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    line = timing.format_row(row)
    assert line.startswith("| preprocess a clip") and line.count("|") == 7


def test_a_folder_without_clips_is_named(run_script, tmp_path):
    done = run_script("benchmarks/benchmark.py", "--stage", "preprocess", "--clips", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and "--clips" in done.stderr
