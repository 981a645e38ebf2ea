"""One epoch of one fold: a step of the network for each batch, then what it says of whole clips.

train.py has the loops over epochs and folds around it, and the Fold that these functions take: the clips of one fold,
its network and its optimizer.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import batches
import config
import utils
from utils import UserError

EVALUATION_BATCH = 64  # clips
SCHEDULES = ("one_cycle", "constant")


# --- One step ----------------------------------------------------------------------------------------------------


def make_optimizer(network, settings):
    """Return AdamW with weight decay on matrices and kernels, none on biases and norms."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], fused=True)


def learning_rate_at(step, total_steps, settings):
    """Return the learning rate of a step (0-indexed): one cosine up from a 25th of the peak, one down to zero.

    That is "one_cycle", the schedule of Smith and Topin 2018 (arXiv:1708.07120) with cosine halves; "constant" is the
    peak throughout. A function of the step alone: a resumed run needs no scheduler state.
    """
    peak = settings["learning_rate"]
    if settings["schedule"] == "constant":
        return peak
    warmup_steps = settings["warmup_share"] * total_steps
    if step < warmup_steps:
        low, high, progress = peak / 25, peak, step / warmup_steps
    else:
        low, high, progress = peak, 0.0, (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return high + (low - high) * (1 + math.cos(math.pi * progress)) / 2


def train_step(network, optimizer, inputs, wanted, label_smoothing, precision=config.PRECISION):
    """Adjust the weights to one batch and return its (mean loss, logits), without waiting for the device.

    inputs: (B, 1, rows, frames) float32; wanted: (B, classes) soft targets.
    """
    with utils.autocast(inputs.device, precision):
        logits = network(inputs.contiguous(memory_format=torch.channels_last))  # (B, classes), once a branch or view
    branches = len(logits) // len(wanted)
    loss = cross_entropy(logits.float(), wanted.repeat(branches, 1), label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach().view(branches, *wanted.shape).mean(dim=0)


# --- One epoch ---------------------------------------------------------------------------------------------------


def train_epoch(fold, epoch, settings):
    """Train one epoch and return (loss, accuracy), means over its examples. UserError if a loss is not finite.

    The accuracy counts augmented examples, against the larger share of each mixed pair.
    """
    features, targets, statistics = fold.tensors
    network, optimizer = fold.network, fold.optimizer
    disable = None if fold.shows_bar else True  # None: where there is no terminal
    slices = batches.batch_slices(len(fold.training), settings["batch_size"])
    total_steps = len(slices) * settings["epochs"]
    seed_parts = settings["seed"], fold.number, epoch
    shape = fold.rows.n_mels, features.shape[2]
    plan = batches.plan_epoch(fold.training, shape, settings, seed_parts, features.device)
    torch.manual_seed(utils.derive_seed("dropout", *seed_parts))
    network.train()
    losses, correct, rates = [], [], []
    for number, batch in enumerate(tqdm(slices, f"fold {fold.number} epoch {epoch}", leave=False, disable=disable)):
        rates.append(learning_rate_at((epoch - 1) * len(slices) + number, total_steps, settings))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        examples = batches.training_batch(features, fold.rows, targets, statistics, plan[batch], settings)
        inputs, wanted = (tensor.to(fold.device, non_blocking=True) for tensor in examples)
        loss, logits = train_step(network, optimizer, inputs, wanted, settings["label_smoothing"])
        losses.append(loss * len(inputs))
        correct.append((logits.argmax(1) == wanted.argmax(1)).sum())
    losses = torch.stack(losses).tolist()  # the epoch's one wait for the device
    for number, (loss, rate) in enumerate(zip(losses, rates, strict=True)):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in fold {fold.number}, epoch {epoch}, batch {number + 1}, at learning rate "
                f"{rate:.2e}: try a smaller --learning_rate. The checkpoint of the epoch before is kept"
            )
    are_finite = torch.stack([tensor.isfinite().all() for tensor in network.state_dict().values()])
    if not are_finite.all():  # after the epoch's last step
        raise UserError(
            f"the weights are no numbers after fold {fold.number}, epoch {epoch}: try a smaller --learning_rate. "
            "The checkpoint of the epoch before is kept"
        )
    return sum(losses) / len(fold.training), torch.stack(correct).sum().item() / len(fold.training)


# --- Whole clips -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_logits(fold, indices, precision=config.PRECISION):
    """Return the logits of whole clips, (len(indices), classes) float32 on the device. UserError if not finite."""
    features, _, statistics = fold.tensors
    fold.network.eval()
    logits = []
    for start in range(0, len(indices), EVALUATION_BATCH):
        clips = features[torch.from_numpy(indices[start : start + EVALUATION_BATCH]).to(features.device)]
        inputs = batches.normalise(clips, statistics).to(fold.device).contiguous(memory_format=torch.channels_last)
        with utils.autocast(fold.device, precision):
            logits.append(fold.network(inputs).float())
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise UserError(f"the network of fold {fold.number} gives NaN or infinity: try a smaller --learning_rate")
    return logits


def targets_of(fold, indices):
    """Return the one-hot targets of clips, on the network's device."""
    targets = fold.tensors[1]
    return targets[torch.from_numpy(indices).to(targets.device)].to(fold.device)


def validate(fold):
    """Return (loss, accuracy) over the validation clips, or (None, None) if the protocol has none."""
    if not len(fold.validation):
        return None, None
    logits = predict_logits(fold, fold.validation)
    targets = targets_of(fold, fold.validation)
    accuracy = (logits.argmax(1) == targets.argmax(1)).float().mean()
    return cross_entropy(logits, targets).item(), accuracy.item()
