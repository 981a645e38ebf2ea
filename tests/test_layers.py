"""The layers that are faster on a CPU, against the plain ones that they stand for."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import layers

# --- InputBlock --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 21), (1, 2, 2), (2, 1, 5), (2, 4, 3)])
def test_patch_statistics_are_those_of_the_patches(shape):
    images = np.random.default_rng(0).normal(0.5, 2, shape)
    patches = F.unfold(torch.from_numpy(images)[:, None], 3, padding=1).transpose(0, 1).flatten(1).numpy()
    mean, covariance = layers.patch_statistics(images)
    np.testing.assert_allclose(mean, patches.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(patches, bias=True), atol=1e-12)


def blocks(dtype=torch.float32):
    """(InputBlock, the plain layers) with the same weights, some of them negative, and without dropout."""
    torch.manual_seed(0)
    plain = layers.conv_block(1, 6, (2, 2), 0.0).to(dtype)
    with torch.no_grad():
        plain[1].weight.uniform_(-2, 2)
        plain[1].bias.uniform_(-2, 2)
    block = layers.InputBlock(*layers.conv_block(1, 6, (2, 2), 0.0)).to(dtype)
    block.load_state_dict(plain.state_dict())
    return block.to(memory_format=torch.channels_last), plain


def test_input_block_is_its_layers_to_the_last_digits():
    block, plain = blocks(torch.float64)
    for step in range(3):
        x = torch.randn(4, 1, 10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * 3 + 1
        ours, expected = block(x), plain(x)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        for output, layers_ in ((ours, block), (expected, plain)):
            layers_.zero_grad()
            (output**3).sum().backward()
        for (name, parameter), (_, wanted) in zip(block.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-8, atol=1e-8, msg=name)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], tensor, rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))


def test_input_block_in_bfloat16_is_no_further_from_float32_than_its_layers_are():
    x = torch.randn(8, 1, 64, 50, generator=torch.Generator().manual_seed(0))
    block, plain = blocks()
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = block(x), plain(x)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() <= (theirs.float() - exact).abs().mean() * 1.2


def test_input_block_gives_a_gradient_to_its_input():
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    block, plain = blocks()
    torch.testing.assert_close(
        torch.autograd.grad(block(x).square().sum(), x), torch.autograd.grad(plain(x).square().sum(), x)
    )


# --- Dropout -----------------------------------------------------------------------------------------------------


def dropped(p, x, seed=0):
    torch.manual_seed(seed)
    return layers.Dropout(p).train()(x)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_it_up(p):
    n = 400_000
    kept = dropped(p, torch.ones(n))
    values = kept.unique()
    assert values.tolist() == pytest.approx([0, 1 / (1 - p)], abs=1e-3 / (1 - p))
    spread = (p * (1 - p) / n) ** 0.5
    assert abs((kept > 0).float().mean().item() - (1 - p)) < 5 * spread + 1e-5


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
        "one element": base[:1, :1, :1, :1],
        "empty": base[:0],
    }


@pytest.mark.parametrize("layout", layouts())
def test_dropout_of_any_layout(layout):
    x = layouts()[layout]
    result = dropped(0.5, x)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    assert torch.equal(result, torch.where(result != 0, 2 * x, 0))
    if x.numel() > 100:
        kept = result != 0
        assert 0.4 < kept.float().mean() < 0.6
        for dim in range(x.ndim):  # each element has a draw of its own: no two neighbours along a dimension are tied
            one, other = kept.narrow(dim, 0, 1), kept.narrow(dim, 1, 1)
            assert 0.2 < (one == other).float().mean() < 0.8
        assert not torch.equal(kept, dropped(0.5, x, seed=1) != 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced", "expanded"])
def test_gradient_of_dropout_is_its_mask(layout):
    x = layouts()[layout].clone(memory_format=torch.preserve_format).requires_grad_()
    result = dropped(0.2, x)
    gradient = torch.randn(x.shape)
    (received,) = torch.autograd.grad(result, x, gradient)
    torch.testing.assert_close(received, gradient * (result / x).detach(), rtol=1e-5, atol=0)


def test_dropout_follows_from_the_seed():
    x = torch.ones(10_000)
    torch.manual_seed(7)
    layer = layers.Dropout(0.3).train()
    first, second = layer(x), layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("p", "training", "factor"), [(0.5, False, 1), (0, True, 1), (1, True, 0)])
def test_dropout_at_its_ends_and_in_evaluation(p, training, factor):
    x = torch.ones(1_000_000)
    torch.manual_seed(0)
    assert torch.equal(layers.Dropout(p).train(training)(x), factor * x)
