"""The blocks that are faster on a CPU, against the plain layers that they stand for."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layers

# --- Patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 21), (1, 2, 2), (2, 1, 5), (2, 4, 3)])
def test_patch_statistics_are_those_of_the_patches(shape):
    images = np.random.default_rng(0).normal(0.5, 2, shape)
    patches = F.unfold(torch.from_numpy(images)[:, None], 3, padding=1).transpose(0, 1).flatten(1).numpy()
    mean, covariance = layers.patch_statistics(images)
    np.testing.assert_allclose(mean, patches.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(patches, bias=True), atol=1e-12)


# --- Blocks ------------------------------------------------------------------------------------------------------

KINDS = {"input": (layers.InputBlock, 1), "later": (layers.ConvBlock, 3)}  # and the channels they read
SHARE = 19661 / 65536  # what a dropout of 0.3 drops


def make_block(kind, dropout, dtype=torch.float32):
    """A block with some negative norm weights."""
    torch.manual_seed(0)
    make, channels = KINDS[kind]
    block = make(channels, 6, (2, 2), dropout).to(dtype)
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
        return torch.where(layers.keep_mask(x, SHARE) != 0, x / (1 - SHARE), 0)


def plain_of(block):
    return Plain(*copy.deepcopy(list(block)))


def example(block, seed, dtype=torch.float32, shape=(10, 14)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, block[0].in_channels, *shape, dtype=dtype, generator=generator) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_block_is_its_layers_to_the_last_digits(kind, dropout):
    block = make_block(kind, dropout, torch.float64)
    plain = plain_of(block)
    for step in range(3):
        results = []
        for network in (block, plain):
            network.zero_grad()
            torch.manual_seed(step)
            results.append(network(example(block, step, torch.float64)))
            (results[-1] ** 3).sum().backward()
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        for (name, parameter), (_, wanted) in zip(block.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-8, atol=1e-7, msg=name)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_block_in_evaluation_is_its_layers(kind):
    block = make_block(kind, 0.3)
    block(example(block, 0))  # its running statistics are no longer the first ones
    block.eval()
    x = example(block, 1)
    torch.testing.assert_close(block(x), F.relu(block[2](block[1](block[0](x)))))


@pytest.mark.parametrize("kind", KINDS)
def test_block_in_bfloat16_is_no_further_from_float32_than_its_layers_are(kind):
    block = make_block(kind, 0.0)
    plain = plain_of(block)
    x = example(block, 0, shape=(64, 50))
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block(x), plain(x)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() <= (theirs.float() - exact).abs().mean() * 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_block_gives_a_gradient_to_its_input(kind):
    block = make_block(kind, 0.0)
    x = example(block, 0).requires_grad_()
    gradients = [torch.autograd.grad(network(x).square().sum(), x)[0] for network in (block, plain_of(block))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_block_drops_its_share(kind, p):
    block = make_block(kind, p)
    with torch.no_grad():
        block[1].weight.zero_()
        block[1].bias.fill_(1)  # so that each output is 1 before dropout
    values = block(example(block, 0, shape=(128, 128)))
    n = values.numel()
    assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)], abs=1e-3 / (1 - p))
    assert abs((values == 0).float().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-5


def test_a_block_that_drops_everything():
    block = make_block("later", 1.0)
    output = block(example(block, 0))
    assert torch.equal(output, torch.zeros(4, 6, 5, 7))


# --- Masks -------------------------------------------------------------------------------------------------------


def layouts():
    base = torch.arange(1.0, 1 + 8 * 6 * 10 * 12).reshape(8, 6, 10, 12)
    return {
        "contiguous": base,
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "sliced": base[1:7:2, :, ::3],
        "with an offset": base[3:],
        "expanded": torch.arange(1.0, 13).expand(8, 6, 10, 12),
        "bfloat16": base.bfloat16(),
        "float64": base.double(),
        "one element": base[:1, :1, :1, :1],
        "empty": base[:0],
    }


@pytest.mark.parametrize("layout", layouts())
def test_mask_of_any_layout(layout):
    x = layouts()[layout]
    torch.manual_seed(0)
    mask = layers.keep_mask(x, 0.5)
    assert mask.shape == x.shape
    assert mask.element_size() == x.element_size()
    assert {*mask.unique().tolist()} <= {0, -1}  # -1: all bits
    if x.numel() > 100:
        kept = mask != 0
        assert 0.4 < kept.float().mean() < 0.6
        for dim in range(x.ndim):  # each element has a draw of its own: no two neighbours along a dimension are tied
            one, other = kept.narrow(dim, 0, 1), kept.narrow(dim, 1, 1)
            assert 0.2 < (one == other).float().mean() < 0.8
        assert not torch.equal(mask, layers.keep_mask(x, 0.5))


def test_masks_follow_from_the_seed():
    x = torch.ones(10_000)
    torch.manual_seed(7)
    first, second = layers.keep_mask(x, 0.3), layers.keep_mask(x, 0.3)
    torch.manual_seed(7)
    assert torch.equal(layers.keep_mask(x, 0.3), first)
    assert torch.equal(layers.keep_mask(x, 0.3), second)
    assert not torch.equal(first, second)
