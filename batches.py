"""Folds, training batches and their augmentation.

Features stay one array (on the GPU when there is one) and a batch is indexed out of it: no Dataset, no workers, no
per-clip Python. All random numbers of an epoch are drawn at once from (seed, fold, epoch), with numpy: the same on
every device, the same after a resume, one transfer an epoch.
"""

import dataclasses
import typing

import numpy as np
import torch

import config
import utils
from utils import UserError

VALIDATIONS = ("next_fold", "none", "test_fold")
FILTER_POINTS = 6  # of a random frequency response


def split(folds, test_fold, validation):
    """Return the clip indices (training, validation, test) for one test fold.

    folds: (clips,) the data set's fold of each clip; test_fold: 1 to 10; validation: one of VALIDATIONS, explained in
    config.py. The validation indices are empty for "none". UserError if no clip is left to train on or to test.
    """
    present = sorted(set(folds.tolist()))
    if test_fold not in present:
        raise UserError(f"fold {test_fold - 1} has no clips; the folds present are {[fold - 1 for fold in present]}")
    test = folds == test_fold
    if validation == "next_fold":
        held_out = folds == present[(present.index(test_fold) + 1) % len(present)]
    else:
        held_out = test if validation == "test_fold" else np.zeros_like(test)
    training = ~test & ~held_out
    if not training.any():
        raise UserError(
            f"validation {validation!r} needs at least {3 if validation == 'next_fold' else 2} folds, and only "
            f"{len(present)} are there: add folds, or try --validation none"
        )
    return tuple(np.flatnonzero(mask) for mask in (training, held_out, test))


def band_statistics(features, indices):
    """Return (mean, standard deviation) of each row over the clips `indices`, both (rows,) float32, in dB.

    One clip at a time in float64, so that no copy of the features is made. These two rows normalise training and
    prediction alike; they come from training clips alone and travel in the model file.
    """
    total = np.zeros(features.shape[1])
    squares = np.zeros(features.shape[1])
    for index in indices:
        clip = features[index].astype(np.float64)  # (rows, n_frames)
        total += clip.sum(axis=1)
        squares += (clip**2).sum(axis=1)
    count = len(indices) * features.shape[2]
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.maximum(deviation, 1e-3).astype(np.float32)  # a constant band stays finite


def normalise(features, statistics):
    """Return features in standard deviations of their mel band: (B, rows, frames) dB -> (B, 1, rows, frames)."""
    mean, deviation = statistics  # (rows,) tensors
    return ((features.float() - mean[:, None]) / deviation[:, None]).unsqueeze(1)


def statistics_of(info):
    """Return (mean, deviation) of each row as `normalise` takes them, from a model file's metadata."""
    return [torch.tensor(info[key]) for key in ("band_mean", "band_deviation")]


def batch_slices(n_clips, batch_size):
    """Return slices that cut an epoch into batches. One last clip joins the batch before it: BatchNorm needs two."""
    starts = list(range(0, n_clips, batch_size))
    if len(starts) > 1 and n_clips - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], n_clips], strict=True)]


class Rows(typing.NamedTuple):
    """Where each row of a clip's features lies (front_end.py's `clip_features`): tensors (rows,) on the device."""

    n_mels: int  # of the log-mel
    first: torch.Tensor  # row of its block: of the log-mel, or of one fine frame
    last: torch.Tensor  # row of its block
    width: torch.Tensor  # in mel bands of the log-mel: 1, or 4 of 128 where 32 fine ones are
    band: torch.Tensor  # mel band of the log-mel at which it begins


def rows_of(blocks, device):
    """Return the Rows of features with these blocks (AudioSettings.blocks), on the device."""
    size = torch.cat([torch.full((bands,), bands) for bands in blocks])  # (rows,)
    place = torch.cat([torch.arange(bands) for bands in blocks])  # in the block
    first = torch.arange(len(size)) - place
    width = blocks[0] / size
    return Rows(blocks[0], *(row.to(device) for row in (first, first + size - 1, width, place * width)))


@dataclasses.dataclass
class EpochPlan:
    """The clips of an epoch in their order, with what happens to each: tensors of shape (clips, ...) on the device."""

    index: torch.Tensor  # the clip's place in the features
    first_frame: torch.Tensor  # of the crop
    frame_step: torch.Tensor  # frames of the clip per frame of the crop: 1.2 plays it faster by a fifth
    band_shift: torch.Tensor  # mel bands
    band_step: torch.Tensor  # mel bands of the clip per mel band of the example
    mask_band: torch.Tensor  # first masked mel band
    mask_bands: torch.Tensor  # how many
    mask_frame: torch.Tensor  # first masked frame of the crop
    mask_frames: torch.Tensor  # how many
    mixup: torch.Tensor  # the clip's own share; the rest is its partner's
    gains: torch.Tensor  # (clips, FILTER_POINTS) dB, at points from the lowest to the highest mel band

    def __getitem__(self, batch):
        return EpochPlan(*(getattr(self, field.name)[batch] for field in dataclasses.fields(self)))


def plan_epoch(indices, shape, settings, seed_parts, device):
    """Draw one epoch: the order of the clips and each one's augmentation.

    indices: the training clips; shape: (n_mels, n_frames); settings: dict with config.py's augmentation names in
    lower case; seed_parts: (seed, fold, epoch).
    """
    rng = np.random.default_rng(utils.derive_seed("epoch", *seed_parts))
    n, (n_mels, n_frames) = len(indices), shape
    crop = crop_length(n_frames, settings)
    mask_bands = rng.integers(0, settings["mask_bands"] + 1, n)
    mask_frames = rng.integers(0, settings["mask_frames"] + 1, n)
    alpha = settings["mixup_alpha"]
    fastest = 1 + settings["time_stretch"]
    step = (fastest ** rng.uniform(-1, 1, n)).clip(max=(n_frames - 1) / max(crop - 1, 1))  # no further than the clip
    last_start = n_frames - 1 - np.ceil((crop - 1) * step - 1e-6).astype(np.int64)
    widest = 1 + settings["band_stretch"]
    level = rng.uniform(-settings["gain_db"], settings["gain_db"], (n, 1))
    response = rng.uniform(-settings["filter_db"], settings["filter_db"], (n, FILTER_POINTS))
    plan = EpochPlan(
        index=rng.permutation(indices),
        first_frame=rng.integers(0, last_start + 1),
        frame_step=step.astype(np.float32),
        band_shift=rng.integers(-settings["band_shift"], settings["band_shift"] + 1, n),
        band_step=(widest ** rng.uniform(-1, 1, n)).astype(np.float32),
        mask_band=rng.integers(0, np.maximum(n_mels - mask_bands, 0) + 1),
        mask_bands=mask_bands,
        mask_frame=rng.integers(0, np.maximum(crop - mask_frames, 0) + 1),
        mask_frames=mask_frames,
        mixup=(rng.beta(alpha, alpha, n) if alpha else np.ones(n)).astype(np.float32),
        gains=(level + response).astype(np.float32),
    )
    return EpochPlan(*(torch.from_numpy(column).to(device) for column in vars(plan).values()))


def crop_length(n_frames, settings):
    """Return the frames of a training example; CROP_FRAMES = 0 means the whole clip."""
    return min(settings["crop_frames"] or n_frames, n_frames)


def training_batch(features, rows, targets, statistics, plan, settings):
    """Return (inputs, soft targets) of one batch: float32 (B, 1, rows, crop) and (B, classes).

    features: (clips, rows, n_frames) dB; rows: their Rows; targets: (clips, classes) one-hot; plan: an EpochPlan cut to
    the batch.
    """
    mean, deviation = statistics
    frames = torch.arange(crop_length(features.shape[2], settings), device=features.device)  # (crop,)
    # Shift, stretch and crop in one read of the features; the edge band fills what they leave empty.
    source = (rows.band * plan.band_step[:, None] + plan.band_shift[:, None]) / rows.width  # (B, rows)
    source = (rows.first + source.round().long()).clamp(rows.first, rows.last)
    times = plan.first_frame[:, None] + (frames * plan.frame_step[:, None]).round().long()  # (B, crop)
    inputs = features[plan.index[:, None, None], source[:, :, None], times[:, None, :]].float()  # (B, rows, crop)
    if settings["gain_db"] or settings["filter_db"]:
        inputs += over_bands(plan.gains, rows.band, rows.n_mels)[:, :, None]
    inputs.sub_(mean[source][:, :, None]).div_(deviation[source][:, :, None])
    labels = targets[plan.index]  # (B, classes)
    if settings["mixup_alpha"]:  # each clip's partner is its mirror in the batch, which is in random order already
        share = plan.mixup[:, None]
        inputs = torch.lerp(inputs.flip(0), inputs, share[:, :, None])
        labels = torch.lerp(labels.flip(0), labels, share)
    if settings["mask_bands"] or settings["mask_frames"]:  # SpecAugment; 0 is the mean after normalisation
        kept_bands = (rows.band < plan.mask_band[:, None]) | (rows.band >= (plan.mask_band + plan.mask_bands)[:, None])
        kept_frames = (frames < plan.mask_frame[:, None]) | (frames >= (plan.mask_frame + plan.mask_frames)[:, None])
        inputs *= (kept_bands[:, :, None] & kept_frames[:, None, :]).float()
    return inputs.unsqueeze(1), labels


def over_bands(gains, bands, n_mels):
    """Return a frequency response at some of n_mels bands, from its points, straight lines between.

    gains: (B, FILTER_POINTS), from the lowest to the highest band; bands: (rows,); returns (B, rows).
    """
    place = bands * ((FILTER_POINTS - 1) / max(n_mels - 1, 1))  # (rows,)
    below = place.long().clamp(max=FILTER_POINTS - 2)
    return torch.lerp(gains[:, below], gains[:, below + 1], place - below)


def augmentation_settings():
    """Return config.py's augmentation names and values, as `plan_epoch` and `training_batch` take them."""
    names = (
        "CROP_FRAMES",
        "TIME_STRETCH",
        "MIXUP_ALPHA",
        "BAND_SHIFT",
        "BAND_STRETCH",
        "GAIN_DB",
        "FILTER_DB",
        "MASK_BANDS",
        "MASK_FRAMES",
    )
    return {name.lower(): getattr(config, name) for name in names}
