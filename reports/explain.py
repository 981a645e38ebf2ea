"""What does a decision hang on? Grad-CAM of a clip, and a check that it finds what matters.

    python predict.py recording.wav --explain why.png     # the picture
    python -m reports.explain --fold_num 0                        # the check, on the clips that fold 0 tests

The check masks the tenth of each spectrogram that Grad-CAM rates highest, and as much of it chosen at random, and
prints by how much the confidence in the class falls. A map that means something makes it fall more than chance does.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import numpy as np
import torch
from torch.nn.functional import interpolate, relu
from tqdm import tqdm

import batches
import data_loader
import utils
from model import find_model, load_model
from utils import UserError

MASKED_SHARE = 0.1  # of a spectrogram's cells
CLIPS_AT_ONCE = 32


def grad_cam(network, inputs, targets):
    """Return which cells of the log-mel speak for a class, (B, n_mels, frames), each from 0 to 1 (the most).

    inputs: normalised features (B, 1, rows, frames); targets: (B,) places of the classes. Selvaraju et al. 2017
    (arXiv:1610.02391): the feature maps of a convolution block (the network's `shown_blocks`), weighted by the gradient
    of the class's logit, summed, and cut at 0; of a network with branches or views, the sum of their maps. The gradient
    is not averaged over the map, as HiResCAM has it (Draelos and Carin 2020, arXiv:2011.08891): AudioCNN's head weighs
    each mel band by itself, and with the mean, masking what the map rates highest costs less confidence than masking
    cells at random.
    """
    maps = []
    blocks = [network.get_submodule(name) for name in network.shown_blocks]
    hooks = [block.register_forward_hook(lambda _, __, output: maps.append(output)) for block in blocks]
    try:
        with torch.enable_grad():
            logits = network(inputs.requires_grad_())
            gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps)  # (B, C, H, W) each
    finally:
        for hook in hooks:
            hook.remove()
    heat, shape = 0, (network.n_mels, inputs.shape[3])
    for gradient, values in zip(gradients, maps, strict=True):
        weight = relu((gradient * values.detach()).sum(dim=1, keepdim=True))  # (B, 1, H, W), once for each view
        weight = weight.unflatten(0, (-1, len(inputs))).sum(dim=0)
        heat = heat + interpolate(weight, shape, mode="bilinear")[:, 0]  # (B, n_mels, frames)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def highest(values, share=MASKED_SHARE):
    """Return a mask, (B, n_mels, frames), of the `share` of each clip's cells with the highest values."""
    flat = values.flatten(1)  # (B, cells)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(1, flat.topk(round(share * flat.shape[1])).indices, True).view_as(values)


def moved(masks, generator):
    """Return masks, (B, n_mels, frames), each at a random place: as many cells in the same shape, rolled around."""
    n_mels, frames = masks.shape[1:]
    shifts = [[torch.randint(size, (), generator=generator).item() for size in (n_mels, frames)] for _ in masks]
    return torch.stack([mask.roll(shift, (0, 1)) for mask, shift in zip(masks, shifts, strict=True)])


@torch.no_grad()
def confidence_without(network, rows, inputs, targets, masks):
    """Return each clip's probability of its class, (B,), where the masked cells have the mean of their band.

    masks: (B, n_mels, frames), of the log-mel; what they cover is masked in the fine log-mel, too.
    """
    masks = masks[:, None, rows.band.long()]  # (B, 1, rows, frames)
    probabilities = network(inputs.masked_fill(masks, 0.0)).softmax(dim=1)
    return probabilities.gather(1, targets[:, None])[:, 0]


def deletion_falls(network, rows, inputs, seed=0):
    """Return by how much the confidence in the predicted class falls when cells are masked, {what is masked: (B,)}.

    rows: the features' Rows (batches.py); inputs: normalised features (B, 1, rows, frames). Masked are the MASKED_SHARE
    of highest Grad-CAM, the same shape at a random place, and single cells at random.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        confidence, targets = network(inputs).softmax(dim=1).max(dim=1)  # (B,)
    top = highest(grad_cam(network, inputs.clone(), targets))  # (B, n_mels, frames)
    masks = {
        "the highest tenth": top,
        "the same shape elsewhere": moved(top, generator),
        "a tenth of the cells at random": highest(torch.rand(top.shape, generator=generator)),
    }
    return {what: confidence - confidence_without(network, rows, inputs, targets, mask) for what, mask in masks.items()}


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--fold_num", type=int, default=0, help="0-indexed fold whose model and clips (default: 0)")
    parser.add_argument("--model_dir", metavar="DIR", help="folder of model files (default: models/ in the assets)")
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    args = parser.parse_args()
    utils.keep_freed_memory()
    folders = utils.run_folders(args)
    network, info = load_model(find_model(folders.models, args.fold_num))
    data = data_loader.load_processed(folders.processed)
    indices = np.flatnonzero(data.folds == args.fold_num + 1)
    if not len(indices):
        raise UserError(f"{folders.processed} has no clips of fold {args.fold_num}: choose another --fold_num")
    rows = batches.rows_of(data.audio.blocks, "cpu")
    falls = []
    for start in tqdm(range(0, len(indices), CLIPS_AT_ONCE), "clips", disable=None, leave=False):
        features = torch.from_numpy(data.features[indices[start : start + CLIPS_AT_ONCE]])
        inputs = batches.normalise(features, batches.statistics_of(info))
        falls.append(deletion_falls(network, rows, inputs, seed=start))
    falls = {what: torch.cat([fall[what] for fall in falls]) for what in falls[0]}  # (clips,) each
    top = falls["the highest tenth"]
    print(f"{len(indices)} clips of fold {args.fold_num}; masked, and by how much the confidence falls:")
    for what, fall in falls.items():
        less = "" if fall is top else f"; less than the highest tenth in {(fall < top).float().mean():.0%} of the clips"
        print(f"  {what:<32}{100 * fall.mean():6.1f} points{less}")


if __name__ == "__main__":
    utils.run(main)
