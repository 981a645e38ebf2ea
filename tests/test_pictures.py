"""pictures.py: any results can be drawn, and Grad-CAM finds what a decision depends on."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from torch import nn

import model
from audio import AudioSettings
from reports import metrics, pictures
from reports.answers import Answer
from utils import UserError


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def results(class_names, folds=2, clips=40, temperatures=None):
    rng = np.random.default_rng(0)
    n_classes = len(class_names)
    predictions = metrics.Predictions(
        class_names=class_names,
        names=[f"clip{clip}.wav" for clip in range(folds * clips)],
        folds=np.repeat(np.arange(folds), clips),
        true=rng.integers(0, n_classes, folds * clips),
        probabilities=rng.dirichlet(np.ones(n_classes), folds * clips),
        clips=None,
    )
    return metrics.summarise(predictions, {"best_epochs": {"0": 2}, "temperatures": temperatures or {}})


def history(losses, validation=True):
    """A history with these training losses; what validates is empty if there is no validation."""
    values = pd.DataFrame({"epoch": np.arange(1.0, len(losses) + 1), "train_loss": losses, "train_accuracy": 0.5})
    return values.assign(
        validation_loss=0.9 if validation else np.nan, validation_accuracy=0.4 if validation else np.nan
    )


def colours(path):
    """Return {colour: pixels} of a picture."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(maxcolors=2**24)
    return {f"#{red:02X}{green:02X}{blue:02X}": pixels for pixels, (red, green, blue) in found}


# --- The report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_names", [["a_b", "$x$", "50 %", "a\nb", "𓃠"], [f"class {k}" for k in range(25)]])
def test_any_classes_can_be_drawn(tmp_path, class_names):
    values, paths = results(class_names), [tmp_path / "matrix.png", tmp_path / "classes.png"]
    for path, draw in zip(paths, (pictures.draw_confusion_matrix, pictures.draw_classes), strict=True):
        draw(path, values, "A title (a remark)")
        with Image.open(path) as image:
            assert image.width >= 1500 and image.height >= 500 and image.text["Title"] == "A title (a remark)"


def test_back_end_of_a_notebook_is_left_to_it(tmp_path):
    program = "import os, sys\nfrom reports import pictures\nwith pictures.picture(sys.argv[1], 'Title', 5, 5): pass\n"
    program += "import matplotlib\nprint(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])"
    env = {**os.environ, "MPLBACKEND": "module://a_notebooks"}
    command = [sys.executable, "-c", program, tmp_path / "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env)
    assert done.stdout == "module://a_notebooks module://a_notebooks\n", done.stderr


@pytest.mark.parametrize("folds", [1, 7])
def test_curves_of_any_number_of_folds_show_training_and_validation(tmp_path, folds):
    histories = {fold: history([2, 1, 0.7]) for fold in range(folds)}
    pictures.draw_curves(tmp_path / "curves.png", results(["a", "b"], folds), "Training", histories)
    found = colours(tmp_path / "curves.png")
    assert found[pictures.BLUE] > 1000 and found[pictures.ORANGE] > 500


def test_curves_without_validation_and_of_a_loss_that_is_not_finite(tmp_path):
    histories = {0: history([2], False), 1: history([2, np.inf, np.nan, 1], False), 2: history([np.nan], False)}
    pictures.draw_curves(tmp_path / "curves.png", results(["a", "b"], folds=3), "Training", histories)
    found = colours(tmp_path / "curves.png")
    assert pictures.BLUE in found and pictures.ORANGE not in found


def test_reliability_has_a_diagram_more_after_a_temperature(tmp_path):
    pictures.draw_reliability(tmp_path / "before.png", results(["a", "b"], folds=1, clips=1), "Confidence")
    both = results(["a", "b", "c"], temperatures={"0": 2.0, "1": 3.0})
    pictures.draw_reliability(tmp_path / "both.png", both, "Confidence")
    before, after = colours(tmp_path / "before.png"), colours(tmp_path / "both.png")
    assert before[pictures.BLUE] > 1000 and before[pictures.ORANGE] > 500 and after[pictures.BLUE] > 5000
    with Image.open(tmp_path / "before.png") as one, Image.open(tmp_path / "both.png") as two:
        assert two.width > 1.3 * one.width


# --- A recording -------------------------------------------------------------------------------------------------

SMALL = AudioSettings(n_mels=16)  # 4 s, 173 frames


def build(name, n_classes=2):
    torch.manual_seed(0)
    settings = {"model": name, "block_dropout": 0.0, "head_dropout": 0.0, "fast_blocks": False}
    return model.build_model(settings, n_classes, SMALL).eval()


@pytest.mark.parametrize("n_windows", [1, 300])
def test_recording_and_explanation_can_be_drawn(tmp_path, n_windows):
    rng = np.random.default_rng(0)
    sketch, hop = pictures.Sketch(SMALL), SMALL.clip_samples // 2
    probabilities = rng.dirichlet([1, 1], n_windows)
    probabilities[1::7] = np.nan  # silence
    for index, row in enumerate(probabilities):
        window = rng.uniform(-1, 1, SMALL.clip_samples).astype(np.float32)
        sketch.add(index * hop, window, row)
    starts = np.arange(n_windows) * hop / SMALL.sample_rate
    answer = Answer(["a_b", "$x$"], float(starts[-1] + 4), starts, starts + 4, probabilities, np.ones(n_windows), [])
    name = "folder/dro$le\udcff\n.wav"
    pictures.draw_recording(tmp_path / "plot.png", name, answer, sketch)
    pictures.draw_explanation(tmp_path / "why.png", name, answer, [build("SharedAudioCNN")] * 2, sketch)
    for picture in ("plot.png", "why.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width >= 1500 and image.text["Title"].startswith(r"dro\$le? .wav: ")


# --- Grad-CAM ----------------------------------------------------------------------------------------------------


def test_map_is_gradient_times_activation_of_the_last_part_with_enough_columns():
    network = build("AudioCNN", n_classes=3)
    features, targets = torch.randn(2, *SMALL.shape), torch.tensor([2, 0])
    heat = pictures.grad_cam(network, features, targets)
    with torch.no_grad():
        maps = network.block2(network.block1(network.normalise(features)))  # (2, 64, 4, 43); block3 leaves 10 columns
    maps.requires_grad_()
    hidden = torch.relu(network.hidden(torch.relu(network.over_bands(network.block3(maps).mean(dim=3))).flatten(1)))
    network.logits(hidden).gather(1, targets[:, None]).sum().backward()
    expected = torch.relu((maps.grad * maps.detach()).sum(dim=1, keepdim=True))
    expected = nn.functional.interpolate(expected, SMALL.shape, mode="bilinear")[:, 0]
    torch.testing.assert_close(heat, expected / expected.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12))


def test_map_leaves_the_network_as_it_was():
    network, features = build("SharedAudioCNN"), torch.randn(1, *SMALL.shape)
    pictures.grad_cam(network, features, torch.tensor([1]))
    assert all(parameter.grad is None for parameter in network.parameters()) and not features.requires_grad
    assert not any(module._forward_hooks for module in network.modules())


def test_map_of_a_network_without_feature_maps_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(SMALL.shape[0] * SMALL.shape[1], 2))
    with pytest.raises(UserError, match="feature maps of 16 columns, and Sequential has none"):
        pictures.grad_cam(network, torch.randn(1, *SMALL.shape), torch.tensor([0]))


def sounds(clips, generator):
    """Noise of two classes in dB, (clips, n_mels, frames): a tenth is louder, in other bands and frames for each."""
    labels = torch.arange(clips) % 2
    features = torch.randn(clips, *SMALL.shape, generator=generator)
    features[labels == 0, :8, 34:68] += 1
    features[labels == 1, 8:, 102:136] += 1
    return features, labels


@pytest.mark.parametrize("name", model.MODELS)
def test_masking_the_highest_fifth_costs_more_confidence_than_random_cells(name):
    network, generator = build(name), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(30):
        features, labels = sounds(16, generator)
        loss = nn.functional.cross_entropy(network.train().view_logits(features).mean(dim=1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    features, labels = sounds(32, generator)
    heat = pictures.grad_cam(network, features, labels)

    @torch.no_grad()
    def confidence(ratings):
        """Return the mean probability of the true class with the fifth of highest rating masked."""
        masked = features.flatten(1)
        masked = masked.scatter(1, ratings.flatten(1).topk(masked.shape[1] // 5).indices, 0.0)
        return network(masked.view_as(features)).softmax(dim=1).gather(1, labels[:, None]).mean().item()

    at_random = confidence(torch.rand(heat.shape, generator=generator))
    assert at_random > 0.9 and confidence(heat) < at_random - 0.15
