"""The fast convolution block against its own modules: equal to rounding, and out of the way after any edit."""

import copy
import os
import shutil
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

import kernels
import model
from audio import AudioSettings

SHARE = 19661 / 65536  # what a dropout of 0.3 drops
POOLS = [(2, 2), (2, 4), (1, 3)]


def make_block(dropout, pool=(2, 2), channels=3, kind=model.ConvBlock):
    """A fast block with some negative norm weights, in training."""
    torch.manual_seed(0)
    block = kind(channels, 6, pool, dropout)
    block.is_fast = True
    with torch.no_grad():
        block[1].weight.uniform_(-2, 2)
        block[1].bias.uniform_(-2, 2)
    return block.to(memory_format=torch.channels_last)


class Plain(nn.Sequential):
    """The modules one after the other, with the mask that the fast block draws."""

    def forward(self, x):
        convolution, norm, pool, relu, dropout = self
        x = pool(relu(norm(convolution(x))))
        if not dropout.p:
            return x
        images, channels, height, width = x.shape
        numbers = torch.from_numpy(kernels.random_numbers((images, height, width, channels))).permute(0, 3, 1, 2)
        return torch.where(numbers >= 65536 * SHARE - 32768, x / (1 - SHARE), 0)


def plain_of(block, dtype=torch.float32, kind=Plain):
    return kind(*copy.deepcopy(list(block))).to(dtype)


def example(block, seed, shape=(10, 14), channels=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, channels, *shape, generator=generator) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last)


def train_once(network, x, seed):
    """Return [output, gradient at the input, gradients at the parameters ...] of one step."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = network(x)
    (y.double() ** 3).mean(dim=(2, 3)).sum().backward()  # the mean's gradient is an expanded tensor
    return [y.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


# --- As it is: equal to rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 14), (33, 21)])  # the second has cells at the edge that fill no window
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fast_block_equals_its_modules(dropout, pool, shape):
    block = make_block(dropout, pool)
    plain = plain_of(block, torch.float64)
    assert kernels.fits(block, example(block, 0, shape))
    for step in range(3):
        x = example(block, step, shape)
        found, expected = train_once(block, x, step), train_once(plain, x.double(), step)
        for tolerance, ours, theirs in zip([1e-5, 1e-4, *[1e-3] * 4], found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=tolerance)
    for name, tensor in plain.state_dict().items():  # running statistics
        torch.testing.assert_close(block.state_dict()[name].double(), tensor.double(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("pool", POOLS)
def test_fast_block_in_bfloat16_is_as_near_to_float64_as_its_modules(pool):
    block = make_block(0.0, pool, channels=16)
    x = example(block, 0, (64, 50), channels=16)
    exact = train_once(plain_of(block, torch.float64), x.double(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = train_once(plain_of(block), x, 0), train_once(block, x, 0)
    assert ours[0].dtype == torch.bfloat16
    for index in (0, 1, 4, 5):  # output, and gradients at the input and at the norm
        errors = [(result[index].double() - exact[index]).abs().mean().item() for result in (ours, theirs)]
        allowed = 0.01 * exact[index].abs().mean().item() if index > 1 else 0
        assert errors[0] <= max(1.1 * errors[1], allowed)


def test_fast_block_is_the_same_with_any_number_of_threads():
    block = make_block(0.3)
    x = torch.cat([example(block, seed, (32, 32)).bfloat16() for seed in (0, 1)], dim=1)
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            inputs, norm = x.clone().requires_grad_(), copy.deepcopy(block[1])
            y = kernels.NormPoolReLUDropout.apply(inputs, norm.weight, norm.bias, norm, (2, 2), 0.3)
            y.square().sum().backward()
            results.append((y.detach(), inputs.grad))
    finally:
        torch.set_num_threads(before)
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_is_not_lost(dtype):
    x = torch.ones(2, 6, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = float("nan")
    norm = nn.BatchNorm2d(6)
    y = kernels.NormPoolReLUDropout.apply(x, norm.weight, norm.bias, norm, (2, 2), 0.0)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()  # its channel has no statistics
    assert norm.running_mean[3].isnan()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fast_block_drops_its_share(p):
    block = make_block(p)
    with torch.no_grad():
        block[1].weight.zero_()
        block[1].bias.fill_(1)  # so that each output is 1 before dropout
    values = block(example(block, 0, (128, 128)))
    assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)], abs=1e-3 / (1 - p))
    std = (p * (1 - p) / values.numel()) ** 0.5
    assert abs((values == 0).float().mean().item() - p) < 5 * std + 1e-5


@pytest.mark.parametrize("shape", [(8, 10, 12, 6), (1, 1, 1, 5), (0, 3, 3, 2)])
def test_random_numbers_follow_from_the_seed_alone(shape):
    torch.manual_seed(7)
    first, second = kernels.random_numbers(shape), kernels.random_numbers(shape)
    torch.manual_seed(7)
    assert np.array_equal(kernels.random_numbers(shape), first)
    assert (first.shape, first.dtype) == (shape, np.int16)
    if first.size > 100:
        assert not np.array_equal(first, second)
        is_high = first >= 0
        assert 0.4 < is_high.mean() < 0.6
        for axis in range(4):  # each has a draw of its own: no two neighbours are tied
            assert 0.2 < (np.take(is_high, 0, axis) == np.take(is_high, 1, axis)).mean() < 0.8


# --- Edited: the edit is what trains -----------------------------------------------------------------------------


class SquaredReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


def replace(index, module):
    return lambda block: block.__setitem__(index, copy.deepcopy(module))


def set_forward(block):
    block[3].forward = torch.nn.functional.gelu


EDITS = {
    "none": lambda block: None,
    "wider convolution": replace(0, nn.Conv2d(3, 6, 5, padding=2, bias=False)),
    "depthwise convolution": replace(0, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 6, 1))),
    "GroupNorm": replace(1, nn.GroupNorm(2, 6)),
    "norm without weights": replace(1, nn.BatchNorm2d(6, affine=False)),
    "norm without running statistics": replace(1, nn.BatchNorm2d(6, track_running_stats=False)),
    "norm with a plain mean of statistics": replace(1, nn.BatchNorm2d(6, momentum=None)),
    "norm that is frozen": lambda block: block[1].eval(),
    "AvgPool2d": replace(2, nn.AvgPool2d((2, 2))),
    "pooling with stride": replace(2, nn.MaxPool2d((2, 2), stride=(1, 1))),
    "pooling with ceil_mode": replace(2, nn.MaxPool2d((2, 2), ceil_mode=True)),
    "GELU": replace(3, nn.GELU()),
    "LeakyReLU": replace(3, nn.LeakyReLU(0.1)),
    "subclass of ReLU": replace(3, SquaredReLU()),
    "AlphaDropout": replace(4, nn.AlphaDropout(0.3)),
    "Dropout2d": replace(4, nn.Dropout2d(0.3)),
    "Dropout of everything": replace(4, nn.Dropout(1.0)),
    "module added": lambda block: block.append(nn.Tanh()),
    "module removed": lambda block: block.pop(3),
    "order": lambda block: block.insert(1, block.pop(3)),
    "forward hook": lambda block: block[3].register_forward_hook(lambda module, args, y: y + 1),
    "forward pre-hook": lambda block: block[3].register_forward_pre_hook(lambda module, args: args[0].abs()),
    "backward hook": lambda block: block[3].register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    "backward pre-hook": lambda block: block[3].register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],)),
    "forward of one module": set_forward,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_block_computes_the_edit(edit, training):
    block = make_block(0.0).train(training)
    torch.manual_seed(1)
    EDITS[edit](block)
    plain = plain_of(block, kind=nn.Sequential)
    for step in range(2):
        x = example(block, step, (11, 15))
        for found, expected in zip(train_once(block, x, step), train_once(plain, x, step), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_overridden_forward_is_what_computes(training):
    class Residual(model.ConvBlock):
        def forward(self, x):
            return torch.cat([super().forward(x), self[2](x)], dim=1)

    block = make_block(0.0, kind=Residual).train(training)
    plain = plain_of(block, kind=nn.Sequential).train(training)
    x = example(block, 0)
    torch.testing.assert_close(block(x), torch.cat([plain(x), plain[2](x)], dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", model.MODELS)
def test_fast_blocks_off_uses_the_modules_themselves(name):
    settings = {"model": name, "block_dropout": 0.3, "head_dropout": 0.0, "fast_blocks": False}
    block, fast = (
        model.build_model({**settings, "fast_blocks": is_fast}, 3, AudioSettings()).block1 for is_fast in (False, True)
    )
    fast.load_state_dict(block.state_dict())
    plain, x = plain_of(block, kind=nn.Sequential), example(block, 0, channels=1)
    results = [train_once(each, x, 5)[0] for each in (block, plain, fast)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])  # the fast form draws its mask in a way of its own


def test_plain_modules_train_where_numba_compiles_nothing():
    code = "import audio, model, torch, kernels\n"
    code += "kernels.fast_block = None  # it would take hours\n"
    code += "settings = {'model': 'AudioCNN', 'block_dropout': 0.1, 'head_dropout': 0.1, 'fast_blocks': True}\n"
    code += "network = model.build_model(settings, 3, audio.AudioSettings()).train()\n"
    code += "print(network.view_logits(torch.zeros(2, 128, 173)).shape)"
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Numba's files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x05 no pickle"])
def test_damaged_file_of_a_loop_is_passed_over(tmp_path, monkeypatch, damaged, content):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def twice(number):
        return 2 * number

    assert kernels.compiled(twice)(21) == 42
    paths = list(tmp_path.rglob(damaged))
    assert paths
    for path in paths:
        path.write_bytes(content)
    assert kernels.compiled(twice)(21) == 42


def test_loops_compile_where_nothing_can_be_kept(tmp_path):
    """A project that is read-only and a user without a home: files stand where the folders would be made."""
    shutil.copy(REPOSITORY / "kernels.py", tmp_path)
    blocked = [tmp_path / name for name in ("__pycache__", "home", "cache")]
    for path in blocked:
        path.write_text("")
    code = "import kernels, numpy as np; sums = np.zeros((2, 2, 4), 'f'); x = np.ones((2, 3, 3, 4), 'f')\n"
    code += "kernels.loops(4, 2, 2)[0](x, np.zeros(4, 'f'), sums); print(sums.sum())"
    env = {**os.environ, "HOME": str(blocked[1]), "XDG_CACHE_HOME": str(blocked[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "144.0\n"), done.stderr
