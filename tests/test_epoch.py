"""epoch.py: the optimizer, the schedule, and a step of several branches."""

import copy

import pytest
import torch

import data_loader
import epoch
import model


def test_weight_decay_is_for_matrices_and_kernels():
    network = model.build_model("AudioCNN", 10, data_loader.AudioSettings())
    groups = epoch.make_optimizer(network, {"weight_decay": 0.3, "learning_rate": 1e-3}).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        is_norm = name.split(".")[1] == "1"
        assert decay[id(parameter)] == (0 if name.endswith("bias") or is_norm else 0.3), name


def test_learning_rate_goes_up_and_down_once():
    settings = {"learning_rate": 0.5, "warmup_share": 0.3, "schedule": "one_cycle"}
    constant = {**settings, "schedule": "constant"}
    assert {epoch.learning_rate_at(step, 100, constant) for step in range(100)} == {0.5}
    rates = [epoch.learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 / 25)
    assert rates[30] == max(rates) == 0.5
    assert rates[:30] == sorted(rates[:30])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0 < rates[99] < 0.5 / 1000
    assert rates[15] == pytest.approx((0.5 + 0.5 / 25) / 2)  # half-way up, and half-way down
    assert rates[65] == pytest.approx(0.25)
    assert epoch.learning_rate_at(0, 1, settings) == pytest.approx(0.5 / 25)


def test_three_branches_learn_each_from_its_own_loss():
    torch.manual_seed(0)
    audio = data_loader.AudioSettings(n_mels=16, fine_n_mels=4)
    views = model.AudioViews(3, audio, block_dropout=0.0, head_dropout=0.0).to(memory_format=torch.channels_last)
    alone = [copy.deepcopy(branch) for branch in views.branches.values()]
    inputs, wanted = torch.randn(8, 1, 24, 80), torch.eye(3)[torch.arange(8) % 3]
    level = inputs[:, :, :16].unflatten(3, (20, 4)).mean(dim=4)
    fine = torch.stack([inputs[:, :, 16:20], inputs[:, :, 20:]], dim=4).flatten(3)  # (8, 1, 4, 160)
    seen = level, model.without_mean(level, dim=3), model.without_mean(fine, dim=2)
    settings = {"weight_decay": 0.0, "learning_rate": 1e-3}
    _, logits = epoch.train_step(views, epoch.make_optimizer(views, settings), inputs, wanted, 0.1, "float32")
    each = [
        epoch.train_step(network, epoch.make_optimizer(network, settings), view, wanted, 0.1, "float32")[1]
        for network, view in zip(alone, seen, strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(each).mean(dim=0))
    assert logits.shape == (8, 3)
    for branch, network in zip(views.branches.values(), alone, strict=True):
        for found, expected in zip(branch.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(3 * found.grad, expected.grad, rtol=1e-3, atol=1e-5)
    views.eval()
    with torch.inference_mode():
        expected = torch.stack([branch(view) for branch, view in zip(views.branches.values(), seen, strict=True)]).mean(
            dim=0
        )
        torch.testing.assert_close(views(inputs), expected)
