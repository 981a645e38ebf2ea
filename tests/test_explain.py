"""pictures.py: Grad-CAM by its formula and on a network that is known to look at one place; the check by masking."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from untrained import write_model

import model
from audio_settings import AudioSettings
from batches import rows_of
from model import AudioCNN, SharedAudioCNN, without_mean
from reports import pictures

SMALL = AudioSettings(n_mels=16, fine_n_mels=4)


class Corner(nn.Module):
    """A network whose second class is the level of the low, early cells; the first class never changes."""

    shown_blocks = ("maps",)

    def __init__(self):
        super().__init__()
        self.n_mels = 24
        self.maps = nn.Conv2d(1, 1, 1, bias=False)
        self.maps.weight.data.fill_(1.0)

    def forward(self, x):
        level = self.maps(x)[:, 0, :8, :8].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(level), level], dim=1)


def test_map_is_the_formula_of_the_papers():
    torch.manual_seed(0)
    network = AudioCNN(3, SMALL).eval()
    inputs = torch.randn(2, 1, 16, 40)
    targets = torch.tensor([2, 0])
    heat = pictures.grad_cam(network, inputs.clone(), targets)
    assert heat.shape == (2, 16, 40)
    for clip, target, found in zip(inputs, targets, heat, strict=True):
        maps = network.block3(network.block2(network.block1(clip[None]))).detach().requires_grad_()
        rest = torch.relu(network.over_bands(maps.mean(dim=3)))
        network.logits(torch.relu(network.hidden(rest.flatten(1))))[0, target].backward()
        expected = torch.relu((maps.grad[0] * maps.detach()[0]).sum(dim=0))
        expected = nn.functional.interpolate(expected[None, None], (16, 40), mode="bilinear")[0, 0]
        torch.testing.assert_close(found, expected / expected.max().clamp(min=1e-12))


def test_map_of_a_network_with_views_is_the_sum_of_its_views():
    torch.manual_seed(0)
    network = SharedAudioCNN(3, SMALL).eval()
    inputs, targets = torch.randn(2, 1, 16, 64), torch.tensor([2, 0])
    heat = pictures.grad_cam(network, inputs.clone(), targets)
    level = inputs.unflatten(3, (16, 4)).mean(dim=4)
    change, shape = without_mean(level, 3), without_mean(level, 2)
    cnn, sums = network.cnn, 0
    for view in level, change, shape, without_mean(change, 2):
        maps = cnn.block1(view).detach().requires_grad_()
        rest = torch.relu(cnn.over_bands(cnn.block3(cnn.block2(maps)).mean(dim=3)))
        logits = cnn.logits(torch.relu(cnn.hidden(rest.flatten(1))))
        logits.gather(1, targets[:, None]).sum().backward()
        sums = sums + torch.relu((maps.grad * maps.detach()).sum(dim=1, keepdim=True))
    expected = nn.functional.interpolate(sums, (16, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(heat, expected / expected.amax(dim=(1, 2), keepdim=True))


def test_map_leaves_the_network_as_it_was():
    network = AudioCNN(3, SMALL).eval()
    with torch.inference_mode():
        before = network(torch.ones(1, 1, 16, 40))
    pictures.grad_cam(network, torch.ones(1, 1, 16, 40), torch.tensor([1]))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.block3._forward_hooks
    with torch.inference_mode():
        assert torch.equal(network(torch.ones(1, 1, 16, 40)), before)


def test_masks_have_the_share_they_should():
    values = torch.rand(5, 20, 30)
    top = pictures.highest(values)
    assert top.flatten(1).sum(dim=1).tolist() == [60] * 5
    assert values[top].min() > 0.8
    moved = pictures.moved(top, torch.Generator().manual_seed(0))
    assert moved.flatten(1).sum(dim=1).tolist() == [60] * 5 and not torch.equal(moved, top)


def test_masking_what_counts_lowers_the_confidence_more():
    inputs = torch.zeros(20, 1, 24, 24)
    inputs[:, :, :8, :8] = 3 + torch.rand(20, 1, 8, 8)
    falls = pictures.deletion_falls(Corner().eval(), rows_of([24], "cpu"), inputs)
    top, others = falls["the highest tenth"], [fall for what, fall in falls.items() if what != "the highest tenth"]
    assert len(others) == 2
    for fall in others:
        assert (fall < top).float().mean() >= 0.9


@pytest.mark.parametrize("name", model.MODELS)
def test_every_network_shows_blocks_that_tell_half_seconds_apart(name):
    audio = AudioSettings()
    network = model.build_model(name, 10, audio).eval()
    columns = []
    for block in network.shown_blocks:
        network.get_submodule(block).register_forward_hook(lambda _, __, maps: columns.append(maps.shape[3]))
    with torch.inference_mode():
        network(torch.zeros(1, 1, *audio.shape))  # 4 s
    assert len(columns) == len(network.shown_blocks) and min(columns) >= 8


def test_command_line(random_data, scripts, tmp_path):
    random_data(tmp_path / "data")
    write_model(tmp_path / "models", 0)
    done = scripts.run("reports.explain", "--fold_num", 0, "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first.startswith("8 clips of fold 0; masked")
    shares = [
        re.fullmatch(r"  (.*?) +(-?\d+\.\d) points(; less than the highest tenth in \d+% of the clips)?", row)
        for row in rows
    ]
    assert [match[1] for match in shares] == [
        "the highest tenth",
        "the same shape elsewhere",
        "a tenth of the cells at random",
    ]
    done = scripts.run("reports.explain", "--fold_num", 5, "--assets_dir", tmp_path)
    assert done.returncode == 2 and "--fold_num is one of 0" in done.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_result_does_not_depend_on_anything_but_the_seed(seed):
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1, 16, 40)).astype(np.float32))
    torch.manual_seed(seed)
    network = AudioCNN(3, SMALL).eval()
    first, second = (pictures.deletion_falls(network, rows_of([16], "cpu"), inputs.clone(), seed) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)
