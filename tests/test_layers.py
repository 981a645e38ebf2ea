"""The block that trains faster on a CPU, against the plain layers that it stands for."""

import copy
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn
from torch.nn import functional as F

import layers

SHARE = 19661 / 65536  # what a dropout of 0.3 drops
POOLS = [(2, 2), (2, 4), (1, 3)]


def make_block(dropout, pool=(2, 2), channels=3):
    """A block with some negative norm weights."""
    torch.manual_seed(0)
    block = layers.ConvBlock(channels, 6, pool, dropout)
    with torch.no_grad():
        block[1].weight.uniform_(-2, 2)
        block[1].bias.uniform_(-2, 2)
    return block.to(memory_format=torch.channels_last)


class Plain(nn.Sequential):
    """The layers as they are written down, with the mask that the block draws."""

    def forward(self, x):
        convolution, norm, pool, relu, dropout = self
        x = pool(relu(norm(convolution(x))))
        if not dropout.p:
            return x
        images, channels, height, width = x.shape
        numbers = torch.from_numpy(layers.random_numbers((images, height, width, channels))).permute(0, 3, 1, 2)
        return torch.where(numbers >= 65536 * SHARE - 32768, x / (1 - SHARE), 0)


def plain_of(block, dtype=torch.float32):
    return Plain(*copy.deepcopy(list(block))).to(dtype)


def example(block, seed, shape=(10, 14)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, block[0].in_channels, *shape, generator=generator) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last)


def train_once(network, x, seed):
    """Return (output, gradient at the input, gradients at the parameters) of one step."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = network(x)
    (y.double() ** 3).mean(dim=(2, 3)).sum().backward()  # the mean's gradient is an expanded tensor
    return y.detach(), x.grad, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("shape", [(10, 14), (9, 13), (33, 21)])  # and cells at the edge that fill no window
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_block_is_its_layers_to_rounding(dropout, pool, shape):
    block = make_block(dropout, pool)
    plain = plain_of(block, torch.float64)
    for step in range(3):
        x = example(block, step, shape)
        y, at_input, at_parameters = train_once(block, x, step)
        wanted_y, wanted_at_input, wanted_at_parameters = train_once(plain, x.double(), step)
        torch.testing.assert_close(y.double(), wanted_y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(at_input.double(), wanted_at_input, rtol=1e-4, atol=1e-4)
        for name, gradient, wanted in zip(
            dict(block.named_parameters()), at_parameters, wanted_at_parameters, strict=True
        ):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-3, msg=name)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name].double(), tensor.double(), rtol=1e-5, atol=1e-5, msg=name)


def test_block_in_evaluation_is_its_layers():
    block = make_block(0.3)
    block(example(block, 0))  # its running statistics are no longer the first ones
    block.eval()
    x = example(block, 1)
    torch.testing.assert_close(block(x), F.relu(block[2](block[1](block[0](x)))))


@pytest.mark.parametrize("pool", POOLS)
def test_block_in_bfloat16_is_no_further_from_float64_than_its_layers_are(pool):
    block = make_block(0.0, pool, channels=16)
    exact = train_once(plain_of(block, torch.float64), example(block, 0, (64, 50)).double(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = train_once(plain_of(block), example(block, 0, (64, 50)), 0)
        ours = train_once(block, example(block, 0, (64, 50)), 0)
    assert ours[0].dtype == torch.bfloat16
    for place in (0, 1):
        errors = [(result[place].double() - exact[place]).abs().mean() for result in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1]
    for gradient, plain, wanted in list(zip(ours[2], theirs[2], exact[2], strict=True))[2:]:  # of the norm
        errors = [(result.double() - wanted).abs().mean() / wanted.abs().mean() for result in (gradient, plain)]
        assert errors[0] <= max(1.1 * errors[1], 0.01)


def test_block_is_the_same_with_any_number_of_threads():
    block = make_block(0.3)
    x = example(block, 0, (32, 32)).bfloat16()
    rest = block[1].weight, block[1].bias
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            inputs = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = layers.NormPoolReLUDropout.apply(inputs, *rest, copy.deepcopy(block[1]), (2, 2), 0.3)
            y.square().sum().backward()
            results.append((y.detach(), inputs.grad))
    finally:
        torch.set_num_threads(before)
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_is_not_lost(dtype):
    x = torch.ones(2, 6, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = float("nan")
    norm = nn.BatchNorm2d(6)
    y = layers.NormPoolReLUDropout.apply(x, norm.weight, norm.bias, norm, (2, 2), 0.0)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()  # its channel's statistics are none
    assert norm.running_mean[3].isnan()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_block_drops_its_share(p):
    block = make_block(p)
    with torch.no_grad():
        block[1].weight.zero_()
        block[1].bias.fill_(1)  # so that each output is 1 before dropout
    values = block(example(block, 0, shape=(128, 128)))
    n = values.numel()
    assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)], abs=1e-3 / (1 - p))
    assert abs((values == 0).float().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-5


def test_a_block_that_drops_everything():
    block = make_block(1.0)
    output = block(example(block, 0))
    assert torch.equal(output, torch.zeros(4, 6, 5, 7))


# --- Random numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 10, 12, 6), (1, 1, 1, 1), (1, 1, 1, 5), (0, 3, 3, 2)])
def test_random_numbers_of_any_shape(shape):
    torch.manual_seed(0)
    numbers = layers.random_numbers(shape)
    assert (numbers.shape, numbers.dtype) == (shape, np.int16)
    if numbers.size > 100:
        is_high = numbers >= 0
        assert 0.4 < is_high.mean() < 0.6
        for axis in range(4):  # each has a draw of its own: no two neighbours are tied
            one, other = np.take(is_high, 0, axis), np.take(is_high, 1, axis)
            assert 0.2 < (one == other).mean() < 0.8
        assert not np.array_equal(numbers, layers.random_numbers(shape))


def test_random_numbers_follow_from_the_seed():
    shape = (2, 50, 10, 10)
    torch.manual_seed(7)
    first, second = layers.random_numbers(shape), layers.random_numbers(shape)
    torch.manual_seed(7)
    assert np.array_equal(layers.random_numbers(shape), first)
    assert np.array_equal(layers.random_numbers(shape), second)
    assert not np.array_equal(first, second)


# --- Compiling ---------------------------------------------------------------------------------------------------


def test_loops_are_compiled_where_nothing_can_be_kept(tmp_path):
    """A project that is read-only and a user without a home: files stand where the folders would be made."""
    for name in ("kernels.py", "layers.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    blocked = [tmp_path / name for name in ("__pycache__", "home", "cache")]
    for path in blocked:
        path.write_text("")
    code = "import torch, layers; print(layers.ConvBlock(1, 4, (2, 2), 0.1)(torch.randn(2, 1, 8, 8)).shape)"
    env = {**os.environ, "HOME": str(blocked[1]), "XDG_CACHE_HOME": str(blocked[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 4, 4, 4])\n"
