"""train.py in parts: weight decay, learning rate, the loss of each view, temperature."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import model
import model_file
import train
from audio import AudioSettings

SETTINGS = {"block_dropout": 0.0, "head_dropout": 0.0, "fast_blocks": False, "precision": "float32"}
SETTINGS |= {"learning_rate": 0.5, "weight_decay": 0.3, "label_smoothing": 0.1, "warmup_share": 0.3}


def build(name):
    torch.manual_seed(0)
    return model.build_model({**SETTINGS, "model": name}, 10, AudioSettings())


def test_weight_decay_is_for_matrices_and_kernels():
    network = build("AudioCNN")
    groups = train.make_optimizer(network, SETTINGS).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        is_norm = name.split(".")[1] == "1"
        assert decay[id(parameter)] == (0 if name.endswith("bias") or is_norm else 0.3), name


def test_learning_rate_goes_up_and_down_once():
    def rates(schedule, steps=100):
        return [train.learning_rate_at(step, steps, {**SETTINGS, "schedule": schedule}) for step in range(steps)]

    assert set(rates("constant")) == {0.5}
    one_cycle = rates("one_cycle")
    assert one_cycle[0] == pytest.approx(0.5 / 25)
    assert one_cycle[30] == max(one_cycle) == 0.5
    assert one_cycle[:30] == sorted(one_cycle[:30])
    assert one_cycle[30:] == sorted(one_cycle[30:], reverse=True)
    assert 0 < one_cycle[99] < 0.5 / 1000
    assert one_cycle[15] == pytest.approx((0.5 + 0.5 / 25) / 2)  # half-way up, and half-way down
    assert one_cycle[65] == pytest.approx(0.25)
    assert rates("one_cycle", 1) == [pytest.approx(0.5 / 25)]


def test_step_takes_the_mean_loss_of_all_views():
    network, plain = build("SharedAudioCNN"), build("SharedAudioCNN")
    inputs, targets = torch.randn(6, 128, 64), torch.eye(10)[torch.arange(6)]
    loss, logits = train.train_step(network.train(), train.make_optimizer(network, SETTINGS), inputs, targets, SETTINGS)
    views = plain.train().view_logits(inputs)  # (6, 4, 10)
    losses = [cross_entropy(views[:, view], targets, label_smoothing=0.1) for view in range(4)]
    torch.testing.assert_close(loss, sum(losses) / 4)
    torch.testing.assert_close(logits, views.mean(dim=1))
    (sum(losses) / 4).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def sampled(temperature, clips=20_000, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature): that temperature calibrates them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(clips, 10, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
def test_temperature_of_sampled_labels_is_found(temperature):
    assert train.fit_temperature(*sampled(temperature)) == pytest.approx(temperature, rel=0.05)


def test_temperature_has_the_smallest_loss_of_all():
    logits, classes = sampled(1.7, clips=50)
    low, high = map(math.log, model_file.TEMPERATURE_RANGE)
    grid = torch.linspace(low, high, 400).exp().tolist()
    losses = [
        cross_entropy(logits.double() / each, classes).item()
        for each in [train.fit_temperature(logits, classes), *grid]
    ]
    assert losses[0] <= min(losses[1:]) + 1e-7


def test_temperature_stays_in_its_range():
    """Labels that are all right, or all wrong, would have it go to 0 or to infinity."""
    logits, classes = torch.eye(10) / 2, torch.arange(10)
    for sign, end in zip([1, -1], model_file.TEMPERATURE_RANGE, strict=True):
        assert train.fit_temperature(sign * logits, classes) == pytest.approx(end, rel=0.01)
    low, high = model_file.TEMPERATURE_RANGE
    huge = 1e4 * torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    assert all(low <= train.fit_temperature(huge, classes) <= high for classes in (huge.argmax(1), huge.argmin(1)))
