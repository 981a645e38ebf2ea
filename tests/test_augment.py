"""Training batches: the epoch's plan, and each augmentation against slow plain numpy."""

import numpy as np
import pytest
import torch

import augment
import data_loader
from model import Network

ALL = {
    "crop_frames": 12,
    "time_stretch": 0.5,
    "mixup_alpha": 0.3,
    "band_stretch": 0.4,
    "mask_bands": 4,
    "mask_frames": 6,
}
OFF = dict.fromkeys(augment.RANGES, 0)
N_CLIPS, N_MELS, N_FRAMES = 30, 16, 20
SEED_PARTS = (0, 0, 1)


@pytest.fixture(scope="module")
def data():
    """(features, one-hot targets, band statistics) of 30 random clips of three classes, as tensors."""
    rng = np.random.default_rng(0)
    features = rng.normal(-40, 12, (N_CLIPS, N_MELS, N_FRAMES)).astype(np.float16)
    targets = np.eye(3, dtype=np.float32)[rng.integers(0, 3, N_CLIPS)]
    statistics = data_loader.band_statistics(features, np.arange(N_CLIPS))
    return torch.from_numpy(features), torch.from_numpy(targets), [torch.from_numpy(row) for row in statistics]


def plan_of(settings, indices=range(N_CLIPS), seed_parts=SEED_PARTS):
    return augment.plan_epoch(np.array(indices), (N_MELS, N_FRAMES), settings, seed_parts, torch.device("cpu"))


def seen(inputs, statistics):
    """What the network's first layer makes of examples: (B, n_mels, frames)."""
    network = Network(N_MELS)
    network.band_mean.copy_(statistics[0])
    network.band_std.copy_(statistics[1])
    return network.normalise(inputs)[:, 0]


# --- The plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_clips", "batch_size", "sizes"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 5]),  # a single last clip joins the batch before it
        (1, 8, [1]),
    ],
)
def test_batch_slices_have_each_clip_once(n_clips, batch_size, sizes):
    batches = [list(range(n_clips))[batch] for batch in augment.batch_slices(n_clips, batch_size)]
    assert [len(batch) for batch in batches] == sizes
    assert [clip for batch in batches for clip in batch] == list(range(n_clips))


@pytest.mark.parametrize("different", [(1, 0, 1), (0, 1, 1), (0, 0, 2)])
def test_plan_has_each_clip_once_and_follows_from_seed_fold_and_epoch_alone(different):
    torch.manual_seed(0)
    plan = plan_of(ALL)
    torch.manual_seed(1)
    np.random.seed(1)
    again, changed = plan_of(ALL), plan_of(ALL, seed_parts=different)
    assert sorted(plan.index.tolist()) == sorted(changed.index.tolist()) == list(range(N_CLIPS))
    for name, column in vars(plan).items():
        assert torch.equal(column, getattr(again, name)), name
        assert not torch.equal(column, getattr(changed, name)), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        OFF,
        {"crop_frames": 500, "mask_bands": 100, "mask_frames": 100},
        {"crop_frames": 5, "band_stretch": 9, "mixup_alpha": 100},
        {"crop_frames": 0, "time_stretch": 9},
    ],
    ids=str,
)
def test_draws_are_in_range_and_reach_its_ends(changes, data):
    settings = {**ALL, **changes}
    plan = plan_of(settings, range(4000))
    crop = min(settings["crop_frames"] or N_FRAMES, N_FRAMES)
    max_step = min(1 + settings["time_stretch"], (N_FRAMES - 1) / max(crop - 1, 1))
    last_frame = plan.first_frame + ((crop - 1) * plan.frame_step).round().long()
    assert (plan.first_frame.min(), last_frame.max()) == (0, N_FRAMES - 1)
    assert plan.frame_step.min() >= 1 / (1 + settings["time_stretch"]) - 1e-6
    assert plan.frame_step.max().item() == pytest.approx(max_step, rel=2e-3)
    assert plan.band_step.min().item() == pytest.approx(1 / (1 + settings["band_stretch"]), rel=0.01)
    assert plan.band_step.max().item() == pytest.approx(1 + settings["band_stretch"], rel=0.01)
    for name, first, size in ("mask_bands", plan.mask_band, N_MELS), ("mask_frames", plan.mask_frame, crop):
        length = getattr(plan, name)
        assert (length.min(), length.max()) == (0, settings[name])
        assert (first >= 0).all()
        assert ((first + length <= size) | (first == 0)).all()  # a mask longer than the clip covers all of it
    assert ((plan.mixup >= 0) & (plan.mixup <= 1)).all()
    assert settings["mixup_alpha"] or (plan.mixup == 1).all()

    inputs, labels = augment.training_batch(*data, plan_of(settings)[:8], settings)
    assert inputs.shape == (8, N_MELS, crop) and inputs.isfinite().all()
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(8))


# --- The augmentations -------------------------------------------------------------------------------------------


def slow_batch(data, plan, settings):
    """What training_batch should give, normalised: one clip and one band at a time."""
    features, targets, (mean, std) = data[0].numpy().astype(np.float64), data[1].numpy(), data[2]
    crop = min(settings["crop_frames"] or N_FRAMES, N_FRAMES)
    clips, labels = [], []
    for index, first, step, stretch in zip(
        plan.index, plan.first_frame, plan.frame_step, plan.band_step.tolist(), strict=True
    ):
        sources = [min(N_MELS - 1, round(band * stretch)) for band in range(N_MELS)]
        frames = [int(first) + round(frame * float(step)) for frame in range(crop)]
        rows = [(features[index, band, frames] - float(mean[band])) / float(std[band]) for band in sources]
        clips.append(np.stack(rows))
        labels.append(targets[index])
    inputs, mixed_labels = [], []
    for index, share in enumerate(plan.mixup.tolist()):
        mixed = share * clips[index] + (1 - share) * clips[-1 - index]
        band, frame = int(plan.mask_band[index]), int(plan.mask_frame[index])
        mixed[band : band + int(plan.mask_bands[index])] = 0
        mixed[:, frame : frame + int(plan.mask_frames[index])] = 0
        inputs.append(mixed)
        mixed_labels.append(share * labels[index] + (1 - share) * labels[-1 - index])
    return np.stack(inputs), np.stack(mixed_labels)


@pytest.mark.parametrize("name", [*augment.RANGES, "all"])
def test_augmentation_equals_the_slow_version(name, data):
    settings = ALL if name == "all" else {**OFF, name: ALL[name]}
    plan = plan_of(settings)
    for batch in augment.batch_slices(N_CLIPS, 7):
        inputs, labels = augment.training_batch(*data, plan[batch], settings)
        expected_inputs, expected_labels = slow_batch(data, plan[batch], settings)
        np.testing.assert_allclose(seen(inputs, data[2]).numpy(), expected_inputs, atol=1e-5)
        np.testing.assert_allclose(labels.numpy(), expected_labels, atol=1e-6)
    whole, _ = augment.training_batch(*data, plan, settings)
    features = data[0][plan.index].float()
    assert whole.shape != features.shape or not torch.allclose(whole, features, atol=1)  # it does something


def test_without_augmentation_training_sees_what_testing_sees(data):
    plan = plan_of(OFF)
    inputs, labels = augment.training_batch(*data, plan, OFF)
    assert torch.equal(inputs, data[0][plan.index].float())
    assert torch.equal(labels, data[1][plan.index])
