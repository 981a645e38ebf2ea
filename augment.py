"""Training batches: one epoch's random plan, and a function for each augmentation.

Features stay one array (on the GPU when there is one) and a batch is indexed out of it: no Dataset, no workers, no
per-clip Python. All random numbers of an epoch are drawn at once from (seed, fold, epoch), with numpy: the same on
every device, the same after a resume, one transfer an epoch.

To add an augmentation: its setting in config.py and its range in RANGES, its draws in `plan_epoch`, a function, and a
line in `training_batch`.
"""

import dataclasses

import numpy as np
import torch

import utils

RANGES = {  # smallest and largest value of each augmentation's setting in config.py
    "crop_frames": (0, 100_000),
    "time_stretch": (0, 10),
    "mixup_alpha": (0, 1000),
    "band_stretch": (0, 10),
    "mask_bands": (0, 1024),
    "mask_frames": (0, 100_000),
}


@dataclasses.dataclass
class EpochPlan:
    """The clips of an epoch in their order, with what happens to each: tensors (clips,) on the features' device."""

    index: torch.Tensor  # of the clip in the features
    first_frame: torch.Tensor  # of the crop
    frame_step: torch.Tensor  # frames of the clip per frame of the crop: 1.2 plays it faster by a fifth
    band_step: torch.Tensor  # mel bands of the clip per mel band of the example
    mask_band: torch.Tensor  # first masked mel band
    mask_bands: torch.Tensor  # masked mel bands
    mask_frame: torch.Tensor  # first masked frame of the crop
    mask_frames: torch.Tensor  # masked frames
    mixup: torch.Tensor  # the clip's own share; the rest is its partner's

    def __getitem__(self, batch):
        return EpochPlan(*(getattr(self, field.name)[batch] for field in dataclasses.fields(self)))


def plan_epoch(indices, shape, settings, seed_parts, device):
    """Return the EpochPlan of one epoch: the order of the clips and what happens to each.

    indices: the training clips; shape: (n_mels, n_frames) of a clip; settings: dict with the names of RANGES;
    seed_parts: (seed, fold, epoch).
    """
    rng = np.random.default_rng(utils.derive_seed("epoch", *seed_parts))
    n, (n_mels, n_frames) = len(indices), shape
    crop = crop_length(n_frames, settings)
    frame_step = (1 + settings["time_stretch"]) ** rng.uniform(-1, 1, n)
    frame_step = frame_step.clip(max=(n_frames - 1) / max(crop - 1, 1))  # no further than the clip
    last_start = n_frames - 1 - np.ceil((crop - 1) * frame_step - 1e-6).astype(np.int64)
    mask_bands = rng.integers(0, settings["mask_bands"] + 1, n)
    mask_frames = rng.integers(0, settings["mask_frames"] + 1, n)
    alpha = settings["mixup_alpha"]
    plan = EpochPlan(
        index=rng.permutation(indices),
        first_frame=rng.integers(0, last_start + 1),
        frame_step=frame_step.astype(np.float32),
        band_step=((1 + settings["band_stretch"]) ** rng.uniform(-1, 1, n)).astype(np.float32),
        mask_band=rng.integers(0, np.maximum(n_mels - mask_bands, 0) + 1),
        mask_bands=mask_bands,
        mask_frame=rng.integers(0, np.maximum(crop - mask_frames, 0) + 1),
        mask_frames=mask_frames,
        mixup=(rng.beta(alpha, alpha, n) if alpha else np.ones(n)).astype(np.float32),
    )
    return EpochPlan(*(torch.from_numpy(column).to(device) for column in vars(plan).values()))


def crop_length(n_frames, settings):
    """Return the frames of a training example; CROP_FRAMES = 0 means the whole clip."""
    return min(settings["crop_frames"] or n_frames, n_frames)


def batch_slices(n_clips, batch_size):
    """Return slices that cut an epoch into batches. A single last clip joins the batch before: BatchNorm needs two."""
    starts = list(range(0, n_clips, batch_size))
    if len(starts) > 1 and n_clips - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], n_clips], strict=True)]


def training_batch(features, targets, statistics, plan, settings):
    """Return (inputs, soft targets) of one batch: (B, n_mels, crop) float32 in dB, and (B, classes).

    features: (clips, n_mels, n_frames) dB; targets: (clips, classes) one-hot; statistics: (mean, std) of each mel band,
    (n_mels,) dB, as the network normalises with; plan: an EpochPlan cut to the batch.
    """
    bands = stretched_bands(plan, features.shape[1])  # (B, n_mels)
    frames = cropped_frames(plan, crop_length(features.shape[2], settings))  # (B, crop)
    inputs = features[plan.index[:, None, None], bands[:, :, None], frames[:, None, :]].float()  # (B, n_mels, crop)
    inputs = relevel(inputs, bands, statistics)
    labels = targets[plan.index]  # (B, classes)
    if settings["mixup_alpha"]:
        inputs, labels = mixup(inputs, labels, plan)
    if settings["mask_bands"] or settings["mask_frames"]:
        inputs = mask(inputs, plan, statistics)
    return inputs, labels


# --- The augmentations -------------------------------------------------------------------------------------------


def stretched_bands(plan, n_mels):
    """Return the mel band of the clip that each band of an example shows, (B, n_mels): the mel axis stretched."""
    bands = torch.arange(n_mels, device=plan.index.device)
    return (bands * plan.band_step[:, None]).round().long().clamp(max=n_mels - 1)


def cropped_frames(plan, crop):
    """Return the frame of the clip that each frame of an example shows, (B, crop): a crop, played faster or slower."""
    frames = torch.arange(crop, device=plan.index.device)
    return plan.first_frame[:, None] + (frames * plan.frame_step[:, None]).round().long()


def relevel(inputs, bands, statistics):
    """Return inputs (B, n_mels, crop) whose cells keep their distance from the band they came from, in its stds.

    A stretch then moves the pattern of a sound, and leaves the average spectrum of the data set where it is.
    """
    mean, std = statistics  # (n_mels,)
    scale = std / std[bands]  # (B, n_mels)
    return inputs.sub_(mean[bands][:, :, None]).mul_(scale[:, :, None]).add_(mean[:, None])


def mixup(inputs, labels, plan):
    """Return inputs and labels, each mixed with its partner's: the mirror clip of the batch, whose order is random."""
    share = plan.mixup[:, None]  # (B, 1)
    return torch.lerp(inputs.flip(0), inputs, share[:, :, None]), torch.lerp(labels.flip(0), labels, share)


def mask(inputs, plan, statistics):
    """Return inputs (B, n_mels, crop) with a range of bands and one of frames at their band's mean: SpecAugment."""
    bands = torch.arange(inputs.shape[1], device=inputs.device)
    frames = torch.arange(inputs.shape[2], device=inputs.device)
    in_bands = (bands >= plan.mask_band[:, None]) & (bands < (plan.mask_band + plan.mask_bands)[:, None])
    in_frames = (frames >= plan.mask_frame[:, None]) & (frames < (plan.mask_frame + plan.mask_frames)[:, None])
    return torch.where(in_bands[:, :, None] | in_frames[:, None, :], statistics[0][:, None], inputs)
