"""Splits, normalisation, batches and augmentation, against slow plain numpy."""

import numpy as np
import pytest
import torch

import batches
import config
from utils import UserError

ALL = {
    "crop_frames": 12,
    "time_stretch": 0.5,
    "mixup_alpha": 0.3,
    "band_shift": 3,
    "band_stretch": 0.4,
    "gain_db": 4.0,
    "filter_db": 5.0,
    "mask_bands": 4,
    "mask_frames": 6,
}
OFF = dict.fromkeys(ALL, 0)
N_CLIPS, N_MELS, N_FRAMES = 30, 16, 20
BLOCKS = [N_MELS, 4, 4]  # a log-mel, and two fine frames of each frame
N_ROWS = sum(BLOCKS)
ROWS = batches.rows_of(BLOCKS, "cpu")
SEED_PARTS = (0, 0, 1)


@pytest.fixture(scope="module")
def data():
    """(features, their Rows, one-hot targets, band statistics) of 30 random clips of three classes, as tensors."""
    rng = np.random.default_rng(0)
    features = rng.normal(-40, 12, (N_CLIPS, N_ROWS, N_FRAMES)).astype(np.float16)
    targets = np.eye(3, dtype=np.float32)[rng.integers(0, 3, N_CLIPS)]
    statistics = batches.band_statistics(features, np.arange(N_CLIPS))
    return torch.from_numpy(features), ROWS, torch.from_numpy(targets), [torch.from_numpy(row) for row in statistics]


def plan_of(settings, indices=range(N_CLIPS), seed_parts=SEED_PARTS, shape=(N_MELS, N_FRAMES)):
    return batches.plan_epoch(np.array(indices), shape, settings, seed_parts, torch.device("cpu"))


# --- Splits ------------------------------------------------------------------------------------------------------


def clips_of(folds, wanted):
    return [index for index, fold in enumerate(folds) if fold in wanted]


@pytest.mark.parametrize("present", [range(1, 11), [2, 5, 9], [1, 2, 10]])
@pytest.mark.parametrize("validation", batches.VALIDATIONS)
def test_split_of_every_fold(present, validation):
    present = list(present)
    folds = np.random.default_rng(0).permutation(np.repeat(present, 4))
    for place, fold in enumerate(present):
        following = present[place + 1] if fold != present[-1] else present[0]
        held_out = {"next_fold": [following], "none": [], "test_fold": [fold]}[validation]
        training, validating, test = batches.split(folds, fold, validation)
        assert test.tolist() == clips_of(folds, [fold])
        assert validating.tolist() == clips_of(folds, held_out)
        assert training.tolist() == clips_of(folds, set(present) - {fold, *held_out})


@pytest.mark.parametrize(("present", "validation"), [([4, 7], "next_fold"), ([4], "none"), ([4], "test_fold")])
def test_too_few_folds(present, validation):
    with pytest.raises(UserError, match=f"validation '{validation}' needs at least . folds, and only {len(present)}"):
        batches.split(np.repeat(present, 5), 4, validation)


def test_fold_without_clips_is_named_as_on_the_command_line():
    with pytest.raises(UserError, match=r"fold 2 has no clips; the folds present are \[0, 1\]"):
        batches.split(np.array([1, 2, 1, 2]), 3, "none")


# --- Normalisation -----------------------------------------------------------------------------------------------


def test_band_statistics_are_of_the_named_clips_alone(data):
    features = data[0].numpy().copy()
    training = np.arange(0, N_CLIPS, 3)
    mean, deviation = batches.band_statistics(features, training)
    chosen = features[training].astype(np.float64)
    assert mean.dtype == deviation.dtype == np.float32
    np.testing.assert_allclose(mean, chosen.mean(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, chosen.std(axis=(0, 2)), rtol=1e-5)

    features[np.setdiff1d(np.arange(N_CLIPS), training)] = np.nan
    again = batches.band_statistics(features, training)
    assert np.array_equal(again[0], mean)
    assert np.array_equal(again[1], deviation)


def test_a_constant_band_stays_finite():
    features = np.full((4, 2, 5), -80, np.float16)
    statistics = [torch.from_numpy(row) for row in batches.band_statistics(features, np.arange(4))]
    assert (batches.normalise(torch.from_numpy(features), statistics) == 0).all()


# --- Batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_clips", "batch_size", "sizes"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 5]),  # one last clip joins the batch before it
        (5, 4, [5]),
        (3, 8, [3]),
        (1, 8, [1]),
        (3, 1, [1, 2]),
    ],
)
def test_batch_slices(n_clips, batch_size, sizes):
    slices = batches.batch_slices(n_clips, batch_size)
    pieces = [list(range(n_clips))[piece] for piece in slices]
    assert [len(piece) for piece in pieces] == sizes
    assert [clip for piece in pieces for clip in piece] == list(range(n_clips))


def test_an_epoch_has_each_clip_once_in_an_order_of_its_own():
    indices = range(7, 107)
    orders = [plan_of(ALL, indices, (0, 0, epoch)).index.tolist() for epoch in (1, 2, 3)]
    for order in orders:
        assert sorted(order) == list(indices)
    assert len(set(map(tuple, [*orders, indices]))) == 4


@pytest.mark.parametrize("other", [(1, 0, 1), (0, 1, 1), (0, 0, 2), (0, 1, 0)])
def test_plan_follows_from_seed_fold_and_epoch_alone(other):
    plan, same, different = (plan_of(ALL, seed_parts=parts) for parts in (SEED_PARTS, SEED_PARTS, other))
    for name, column in vars(plan).items():
        assert torch.equal(column, getattr(same, name)), name
        assert not torch.equal(column, getattr(different, name)), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        OFF,
        {"crop_frames": 0},
        {"crop_frames": N_FRAMES},
        {"crop_frames": 500},
        {"crop_frames": 1},
        {"band_shift": 0},
        {"band_shift": 100},
        {"band_stretch": 0},
        {"band_stretch": 9},
        {"mask_bands": 0},
        {"mask_bands": 100},
        {"mask_frames": 0},
        {"mask_frames": 100},
        {"crop_frames": 5, "mask_frames": 6},
        {"time_stretch": 0},
        {"time_stretch": 9, "crop_frames": 0},
        {"mixup_alpha": 0},
        {"mixup_alpha": 1e-3},
        {"mixup_alpha": 100},
        {"gain_db": 0},
        {"filter_db": 0},
    ],
    ids=str,
)
def test_every_draw_is_in_range_and_the_ends_are_reached(changes, data):
    settings = {**ALL, **changes}
    plan = plan_of(settings, range(4000))
    crop = min(settings["crop_frames"] or N_FRAMES, N_FRAMES)
    longest_step = min(1 + settings["time_stretch"], (N_FRAMES - 1) / max(crop - 1, 1))
    last = plan.first_frame + ((crop - 1) * plan.frame_step).round().long()
    assert (plan.first_frame.min(), last.max()) == (0, N_FRAMES - 1)
    assert 1 / (1 + settings["time_stretch"]) - 1e-6 <= plan.frame_step.min() <= plan.frame_step.max()
    assert plan.frame_step.max().item() == pytest.approx(longest_step, rel=2e-3)
    widest = 1 + settings["band_stretch"]
    assert 1 / widest - 1e-6 <= plan.band_step.min() <= plan.band_step.max() <= widest + 1e-6
    ends = {
        "band_shift": (-settings["band_shift"], settings["band_shift"]),
        "mask_bands": (0, settings["mask_bands"]),
        "mask_frames": (0, settings["mask_frames"]),
    }
    for name, (low, high) in ends.items():
        column = getattr(plan, name)
        assert (int(column.min()), int(column.max())) == (low, high), name
    for first, length, room in (
        (plan.mask_band, plan.mask_bands, N_MELS),
        (plan.mask_frame, plan.mask_frames, crop),
    ):
        assert (first >= 0).all()
        assert ((first + length <= room) | (first == 0)).all()  # a mask longer than the clip covers all of it
    widest = settings["gain_db"] + settings["filter_db"]
    assert 0.9 * widest <= float(plan.gains.abs().max()) <= widest
    assert ((plan.mixup >= 0) & (plan.mixup <= 1)).all()
    if not settings["mixup_alpha"]:
        assert (plan.mixup == 1).all()

    features, _, targets, statistics = data
    inputs, labels = batches.training_batch(features, ROWS, targets, statistics, plan_of(settings)[:8], settings)
    assert inputs.shape == (8, 1, N_ROWS, crop)
    assert inputs.isfinite().all()
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(8))


# --- Augmentation ------------------------------------------------------------------------------------------------


def slow_batch(data, plan, settings):
    """What training_batch should give, one clip and one row at a time."""
    features, targets, (mean, deviation) = data[0].numpy(), data[2].numpy(), [row.numpy() for row in data[3]]
    crop = min(settings["crop_frames"] or N_FRAMES, N_FRAMES)
    clips, labels = [], []
    for place in range(len(plan.index)):
        clip = features[plan.index[place]].astype(np.float32)
        shift, first = int(plan.band_shift[place]), int(plan.first_frame[place])
        points = np.linspace(0, N_MELS - 1, batches.FILTER_POINTS)
        step = float(plan.band_step[place])
        times = [first + round(frame * float(plan.frame_step[place])) for frame in range(crop)]
        rows = []
        for block, size in enumerate(BLOCKS):
            width = N_MELS / size  # mel bands of the log-mel in one of the block's
            for band in range(size):
                source = max(0, min(size - 1, round(band * step + shift / width))) + sum(BLOCKS[:block])
                gain = np.interp(band * width, points, plan.gains[place].numpy())
                rows.append((clip[source] + gain - mean[source]) / deviation[source])
        clips.append(np.stack(rows)[:, times])
        labels.append(targets[plan.index[place]])
    bands = [int(band * N_MELS / size) for size in BLOCKS for band in range(size)]
    inputs, mixed_labels = [], []
    for place, share in enumerate(plan.mixup.tolist()):
        partner = len(clips) - 1 - place
        mixed = share * clips[place] + (1 - share) * clips[partner]
        low, frame = int(plan.mask_band[place]), int(plan.mask_frame[place])
        mixed[[low <= band < low + int(plan.mask_bands[place]) for band in bands]] = 0
        mixed[:, frame : frame + int(plan.mask_frames[place])] = 0
        inputs.append(mixed)
        mixed_labels.append(share * labels[place] + (1 - share) * labels[partner])
    return np.stack(inputs)[:, None], np.stack(mixed_labels)


@pytest.mark.parametrize("name", [*OFF, "all"])
def test_each_augmentation_equals_the_slow_version(name, data):
    settings = ALL if name == "all" else {**OFF, name: ALL[name]}
    plan = plan_of(settings)
    changed = False
    for batch in batches.batch_slices(N_CLIPS, 7):
        inputs, labels = batches.training_batch(*data, plan[batch], settings)
        expected_inputs, expected_labels = slow_batch(data, plan[batch], settings)
        np.testing.assert_allclose(inputs.numpy(), expected_inputs, atol=1e-5)
        np.testing.assert_allclose(labels.numpy(), expected_labels, atol=1e-6)
        whole = batches.normalise(data[0][plan[batch].index], data[3])
        changed |= inputs.shape != whole.shape or not torch.equal(inputs, whole)
    assert changed


def test_without_augmentation_training_sees_what_testing_sees(data):
    features, _, targets, statistics = data
    plan = plan_of(OFF)
    inputs, labels = batches.training_batch(features, ROWS, targets, statistics, plan, OFF)
    assert torch.equal(inputs, batches.normalise(features[plan.index], statistics))
    assert torch.equal(labels, targets[plan.index])


def test_gain_moves_all_bands_alike_and_a_filter_does_not(data):
    for name, alike in (("gain_db", True), ("filter_db", False)):
        settings = {**OFF, name: 6.0}
        plan = plan_of(settings)
        inputs, _ = batches.training_batch(*data, plan, settings)
        moved = (inputs - batches.normalise(data[0][plan.index], data[3]))[:, 0] * data[3][1][:, None]  # dB
        assert moved.abs().max() <= 6 + 1e-3
        assert (moved.std(dim=2).max() < 1e-3).item()  # the same in all frames
        assert (moved.mean(dim=2).std(dim=1).max() < 1e-3).item() == alike
        for block in BLOCKS[1:]:  # a fine band that begins where a band does moves as that does
            torch.testing.assert_close(
                moved[:, N_MELS : N_MELS + block], moved[:, : N_MELS : N_MELS // block], atol=1e-3, rtol=0
            )


def test_masks_hide_whole_bands_and_frames_and_nothing_else(data):
    settings = {**OFF, "mask_bands": 4, "mask_frames": 6}
    plan = plan_of(settings)
    inputs, _ = batches.training_batch(*data, plan, settings)
    whole = batches.normalise(data[0][plan.index], data[3])
    for place, (masked, clip) in enumerate(zip(inputs[:, 0], whole[:, 0], strict=True)):
        hidden = (masked == 0) & (clip != 0)
        assert torch.equal(masked[~hidden], clip[~hidden])
        whole_bands, whole_frames = hidden.all(dim=1), hidden.all(dim=0)
        assert torch.equal(hidden, whole_bands[:, None] | whole_frames)
        assert (whole_bands[:N_MELS].sum(), whole_frames.sum()) == (plan.mask_bands[place], plan.mask_frames[place])
        for fine in whole_bands[N_MELS:].split(BLOCKS[1:]):
            assert torch.equal(fine, whole_bands[: N_MELS : N_MELS // len(fine)])


def test_mixup_mixes_sound_and_label_in_the_same_share(data):
    features, _, targets, statistics = data
    settings = {**OFF, "mixup_alpha": 1.0}
    plan = plan_of(settings)[:8]
    inputs, labels = batches.training_batch(features, ROWS, targets, statistics, plan, settings)
    clips = batches.normalise(features[plan.index], statistics)
    for place, share in enumerate(plan.mixup.tolist()):
        own, partner = plan.index[place], plan.index[7 - place]
        torch.testing.assert_close(inputs[place], share * clips[place] + (1 - share) * clips[7 - place])
        torch.testing.assert_close(labels[place], share * targets[own] + (1 - share) * targets[partner])


def test_augmentation_settings_are_those_of_config():
    settings = batches.augmentation_settings()
    assert settings.keys() == OFF.keys()
    assert settings["crop_frames"] == config.CROP_FRAMES
    assert settings["mixup_alpha"] == config.MIXUP_ALPHA
