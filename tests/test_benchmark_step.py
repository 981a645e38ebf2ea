"""benchmark_step.py compares like with like: the same network, the same losses. Its timings are not asserted."""

import numpy as np
import pytest
import torch

from benchmarks import benchmark_step


def test_the_plain_network_is_the_same_function():
    plain, ours = benchmark_step.new_networks()
    features, _ = benchmark_step.random_examples(4)
    assert torch.allclose(plain.eval()(features), ours.eval()(features), atol=1e-5)
    assert {type(module).__module__.split(".")[0] for module in plain.modules()} == {"torch", "benchmark_step"}
    assert [type(layer).__name__ for layer in plain.block1] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]


def test_both_loops_start_with_the_same_losses():
    features, targets = benchmark_step.random_examples(64, n_frames=32)
    plain, ours = benchmark_step.new_networks(block_dropout=0.0, head_dropout=0.0)
    theirs = benchmark_step.plain_loop(plain, features, targets, 16, 4)
    mine = benchmark_step.our_loop(ours, features, targets, 16, 4, "float32")
    assert len(theirs) == len(mine) == 4
    assert np.allclose(theirs, mine, atol=2e-3)


def test_a_step_has_the_operations_of_its_convolutions():
    features, targets = benchmark_step.random_examples(2)
    # Multiply-accumulates: three convolutions at their sizes, the one over bands, two linear layers.
    forward = 9 * (1 * 32 * 128 * 173 + 32 * 64 * 64 * 86 + 64 * 128 * 32 * 43) + 3 * 128 * 64 * 16 + 1024 * 128 + 1280
    first = 9 * 1 * 32 * 128 * 173  # whose input needs no gradient
    assert benchmark_step.flops_of_step(features, targets) == pytest.approx(2 * 2 * (3 * forward - first), rel=1e-3)
