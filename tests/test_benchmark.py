"""benchmark.py compares like with like. Its timings are not asserted."""

import json

import numpy as np
import pytest
import soundfile
import torch

import benchmark
import demo_data


def test_the_plain_network_is_the_same_function():
    plain, ours = benchmark.new_networks()
    features, _ = benchmark.random_examples(4)
    assert torch.allclose(plain.eval()(features), ours.eval()(features), atol=1e-5)
    assert {type(module).__module__.split(".")[0] for module in plain.modules()} == {"torch", "benchmark"}
    assert [type(layer).__name__ for layer in plain.block1] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]


def test_both_loops_start_with_the_same_losses():
    features, targets = benchmark.random_examples(64, n_frames=32)
    plain, ours = benchmark.new_networks(block_dropout=0.0, head_dropout=0.0)
    theirs = benchmark.plain_loop(plain, features, targets, 16, 4)
    mine = benchmark.our_loop(ours, features, targets, 16, 4, "float32")
    assert len(theirs) == len(mine) == 4
    assert np.allclose(theirs, mine, atol=2e-3)


def test_a_step_has_the_operations_of_its_convolutions():
    features, targets = benchmark.random_examples(2)
    # Multiply-accumulates: three convolutions at their sizes, the one over bands, two linear layers.
    forward = 9 * (1 * 32 * 128 * 173 + 32 * 64 * 64 * 86 + 64 * 128 * 32 * 43) + 3 * 128 * 64 * 16 + 1024 * 128 + 1280
    first = 9 * 1 * 32 * 128 * 173  # whose input needs no gradient
    assert benchmark.flops_of_step(features, targets) == pytest.approx(2 * 2 * (3 * forward - first), rel=1e-3)


def test_the_reference_computes_the_same_features(miniature):
    path = max(miniature.rglob("*.wav"), key=lambda path: soundfile.info(path).duration)  # nothing to pad or repeat
    ours, reason = benchmark.our_clip(path)
    assert reason is None
    usual = benchmark.usual_clip(path)
    assert np.abs(usual - ours.astype(np.float32)).max() < 0.1  # dB; float16


def test_epochs_of_train_py_are_timed(tmp_path, capsys):
    (row,) = benchmark.benchmark_overhead(tmp_path, n_clips=32)
    assert row["ours"] > 0 and row["theirs"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert (tmp_path / "checkpoints" / "fold_0" / f"epoch_{benchmark.TURNS + 1}.pt").is_file()
    assert capsys.readouterr().out == ""


def test_one_stage_as_json_and_as_a_table(run_script, tmp_path):
    for number in range(2):
        demo_data.write_clip(tmp_path / f"{number}.wav", np.full((800, 2), 0.1), 44_100, "PCM_16")
    done = run_script("benchmark.py", "--stage", "preprocess", "--clips", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "torch" in result["machine"]
    assert [row["stage"] for row in result["rows"]] == ["preprocess"] * 2
    row = result["rows"][0]
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    line = benchmark.format_row(row)
    assert line.startswith("| preprocess a clip") and line.count("|") == 7


def test_a_folder_without_clips_is_named(run_script, tmp_path):
    done = run_script("benchmark.py", "--stage", "preprocess", "--clips", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and "--clips" in done.stderr
