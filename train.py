"""Stage 3: train and test one network per fold, the data set's own cross-validation.

    python train.py                                   # every fold, with config.py's settings
    python train.py --folds 0,3-5 --epochs 8          # some folds, shorter
    python train.py --folds none                      # one network on all clips: for use, it has no test
    python train.py --learning_rate 1e-3 --processed_dir DATA --assets_dir ~/sweep/lr1e-3
    torchrun --nproc-per-node=4 train.py              # four folds at a time; so does starting it four times

Prints one line an epoch (fold, epoch, losses, accuracies, learning rate, examples/s, time left) and at the end a table
of folds with mean and standard deviation. The same command resumes after the last completed epoch, with the result
that it would have had without the stop; a finished run prints its table again. Several processes, on one machine or
on many that share the folder, each take the next free fold, and the last one writes the report.

Fold numbers are 0-indexed: --folds 0 tests the data set's fold 1. Each fold is tested once, with the weights of the
epoch that VALIDATION (config.py) chose.
"""

import dataclasses
import datetime
import math
import os
import signal
import time
import typing
from pathlib import Path

# Ctrl-C during the imports needs no traceback (see utils.run). A shell's background job ignores it, and goes on so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Read when torch loads OpenMP. Its threads would otherwise spin while they wait, and two trainings side by side on the
# same cores take 15 times as long as one rather than twice; alone this costs under 5 %.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import augment
import checkpoint
import config
import data_loader
import model
import model_file
import utils
from reports import metrics, tables
from research import audit
from services import events, hub
from utils import UserError

# --- Settings ----------------------------------------------------------------------------------------------------

# All that the result depends on, with the smallest and largest value that makes sense. FLAGS override config.py.
RANGES = {
    "epochs": (1, 100_000),
    "batch_size": (2, 100_000),  # clips
    "learning_rate": (1e-9, 1e6),
    "warmup_share": (0, 1),
    "weight_decay": (0, 100),
    "label_smoothing": (0, 0.99),
    "block_dropout": (0, 0.99),
    "head_dropout": (0, 0.99),
    "seed": (0, 2**63),
    **augment.RANGES,
}
CHOICES = {  # None: as config.py annotates it
    "model": tuple(model.MODELS),
    "schedule": None,
    "class_weights": None,
    "validation": None,
}
NOT_FLAGS = {"warmup_share", "block_dropout", "head_dropout"}


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--processed_dir", metavar="DIR", help="processed files of stage 2 (default: data/ in the assets)")
    add("--model_dir", metavar="DIR", help="where each fold's best model goes (default: models/ in the assets)")
    add("--folds", type=utils.parse_folds, help="0-indexed, as in 0,3-5, or none: train on all (default: all present)")
    types = typing.get_type_hints(config)
    for name in (*CHOICES, *RANGES):
        kind, default = types[name.upper()], getattr(config, name.upper())
        if name in CHOICES:
            choices = CHOICES[name] or typing.get_args(kind)
            add(f"--{name}", choices=choices, default=default, help=f"default: {default}")
        elif name not in NOT_FLAGS:
            add(f"--{name}", type=kind, default=default, metavar="N", help=f"default: {default} (see config.py)")
    add("--device", default=config.DEVICE, help=f"auto, cpu, cuda, cuda:1, mps; default: {config.DEVICE}")
    add("--fresh", action="store_true", help="remove what an earlier run left for these folds and start again")
    return parser.parse_args()


def training_settings(args, data):
    """Return all that the result depends on: compared on resume, stored with checkpoints and results.

    args: an object with those settings that differ from config.py; data: the Processed data set. UserError for a value
    that is out of range, and for a network that can't take such examples.
    """
    names = (*CHOICES, *RANGES, "precision", "fast_blocks")
    settings = {name: getattr(args, name, getattr(config, name.upper())) for name in names}
    for name, (low, high) in RANGES.items():
        if not low <= settings[name] <= high:  # nor is NaN
            raise UserError(f"{name} is {settings[name]!r}: it must be from {low} to {high} (config.py or --{name})")
    network = model.build_model(settings, len(data.class_names), data.audio)
    model.check_shape(network, (data.audio.n_mels, augment.crop_length(data.audio.n_frames, settings)))
    settings["network"] = model.digest(network)  # after an edit of the network, an earlier run is not resumed
    settings["data"] = data.info["fingerprint"]
    return settings


def load_data(processed_dir):
    """Return the Processed data set, fetched from the Hub first if it is not there and HF_REPO_ID is set."""
    if config.HF_REPO_ID and not (processed_dir / "features.json").is_file():
        hub.fetch_processed(processed_dir, config.HF_REPO_ID)  # of several processes, one fetches
    return data_loader.load_processed(processed_dir)


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
        start, end, progress = peak / 25, peak, step / warmup_steps
    else:
        start, end, progress = peak, 0.0, (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def class_weights(targets, settings, device):
    """Return the weight of each class in the loss, (classes,) on the device, or None where all are 1.

    targets: (clips, classes) one-hot, of the training clips. "balanced" is clips / (classes * clips of the class), so
    that each class has the same share of the loss; King and Zeng 2001, and scikit-learn's class_weight.
    """
    if settings["class_weights"] == "none":
        return None
    counts = targets.sum(dim=0)  # (classes,)
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).to(device)


def train_step(network, optimizer, inputs, targets, settings, weights=None):
    """Adjust the weights to one batch and return its (mean loss, logits (B, classes)), without waiting for the device.

    inputs: (B, n_mels, frames) float32 in dB; targets: (B, classes) soft; weights: see `class_weights`. Each view of an
    example has its own loss.
    """
    with utils.autocast(inputs.device, settings["precision"]):
        logits = network.view_logits(inputs).float()  # (B, views, classes)
    view_targets = targets.unsqueeze(1).expand_as(logits)  # (B, views, classes)
    smoothing = settings["label_smoothing"]
    loss = cross_entropy(logits.flatten(0, 1), view_targets.flatten(0, 1), weights, label_smoothing=smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach().mean(dim=1)


# --- One epoch ---------------------------------------------------------------------------------------------------


def train_epoch(fold, epoch, settings):
    """Train one epoch and return (loss, accuracy), means over its examples. UserError if a loss is not finite.

    The accuracy counts augmented examples, against the larger share of each mixed pair.
    """
    network, optimizer, features = fold.network, fold.optimizer, fold.features
    slices = augment.batch_slices(len(fold.training), settings["batch_size"])
    total_steps = len(slices) * settings["epochs"]
    seed_parts = settings["seed"], fold.number, epoch
    plan = augment.plan_epoch(fold.training, features.shape[1:], settings, seed_parts, features.device)
    statistics = network.band_mean.to(features.device), network.band_std.to(features.device)
    torch.manual_seed(utils.derive_seed("dropout", *seed_parts))
    network.train()
    losses, correct, rates = [], [], []
    no_bar = True if utils.process_count() > 1 else None  # None: where there is no terminal
    for index, batch in enumerate(tqdm(slices, f"fold {fold.number} epoch {epoch}", leave=False, disable=no_bar)):
        rates.append(learning_rate_at((epoch - 1) * len(slices) + index, total_steps, settings))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        examples = augment.training_batch(features, fold.targets, statistics, plan[batch], settings)
        inputs, targets = (tensor.to(fold.device, non_blocking=True) for tensor in examples)
        loss, logits = train_step(network, optimizer, inputs, targets, settings, fold.weights)
        losses.append(loss * len(inputs))
        correct.append((logits.argmax(1) == targets.argmax(1)).sum())
    losses = torch.stack(losses).tolist()  # the epoch's one wait for the device
    check_finite(fold, epoch, losses, rates)
    return sum(losses) / len(fold.training), torch.stack(correct).sum().item() / len(fold.training)


def check_finite(fold, epoch, losses, rates):
    """Raise a UserError that names the first loss of an epoch that is not finite, or weights that are not."""
    remedy = "try a smaller --learning_rate. The checkpoint of the epoch before is kept"
    for index, (loss, rate) in enumerate(zip(losses, rates, strict=True)):
        if not math.isfinite(loss):
            where = f"fold {fold.number}, epoch {epoch}, batch {index + 1}"
            raise UserError(f"the loss is {loss} in {where}, at learning rate {rate:.2e}: {remedy}")
    if not torch.stack([tensor.isfinite().all() for tensor in fold.network.state_dict().values()]).all():
        raise UserError(f"the weights are not finite after fold {fold.number}, epoch {epoch}: {remedy}")


def validate(fold, settings):
    """Return {"validation_loss", "validation_accuracy"} over the validation clips; None where the protocol has none."""
    if not len(fold.validation):
        return {"validation_loss": None, "validation_accuracy": None}
    logits, targets = fold.logits(fold.validation, settings["precision"])
    accuracy = (logits.argmax(1) == targets).float().mean().item()
    return {"validation_loss": cross_entropy(logits, targets).item(), "validation_accuracy": accuracy}


# --- One fold ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fold:
    """One fold's training: its clips, its network, and how far it has come."""

    number: int  # 0-indexed
    training: np.ndarray  # clip indices
    validation: np.ndarray
    test: np.ndarray
    features: torch.Tensor  # (clips, n_mels, n_frames) dB, see `place_features`
    targets: torch.Tensor  # (clips, classes) one-hot, on the features' device
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device  # of the network
    info: dict  # metadata of its model files
    folder: Path  # of its checkpoints
    weights: torch.Tensor | None  # (classes,) in the loss, see `class_weights`
    newest: dict | None = None  # checkpoint

    def logits(self, indices, precision="float32"):
        """Return the network's (logits (n, classes), class indices (n,)) of clips. UserError if not finite."""
        indices = torch.from_numpy(indices).to(self.features.device)
        logits = model.logits_of(self.network, self.features[indices], precision)
        if not logits.isfinite().all():
            raise UserError(f"the network of fold {self.number} gives NaN or infinity: try a smaller --learning_rate")
        return logits, self.targets[indices].argmax(1).cpu()


def place_features(features, device):
    """Return the features as a tensor on the device; where they would take over half of its memory, on the CPU.

    On the CPU they stay on the disk and in the system's cache of it, and each batch goes to the device by itself.
    """
    if device.type == "cuda" and features.nbytes > torch.cuda.mem_get_info(device)[1] / 2:
        return torch.from_numpy(features)
    return torch.from_numpy(features).to(device)


def make_fold(number, data, features, settings, run, device):
    """Return a Fold at its beginning: data split, network initialised from (seed, fold), normalisation measured.

    features: data.features as `place_features` gives them; run: a checkpoint.Run.
    """
    if number == utils.NO_FOLD:
        training, validation, test = np.arange(len(data.labels)), np.arange(0), np.arange(0)
    else:
        training, validation, test = data_loader.split(data.folds, number + 1, settings["validation"])
    class_ids = np.array(list(data.class_names))
    targets = torch.from_numpy((data.labels[:, None] == class_ids).astype(np.float32))  # (clips, classes)
    torch.manual_seed(utils.derive_seed("weights", settings["seed"], number))
    network = model.build_model(settings, len(class_ids), data.audio)
    mean, std = data_loader.band_statistics(data.features, training)
    network.band_mean.copy_(torch.from_numpy(mean))
    network.band_std.copy_(torch.from_numpy(std))
    network = network.to(device)
    info = {
        "model": settings["model"],
        "class_names": list(data.class_names.values()),
        "class_ids": class_ids.tolist(),
        "audio": data.info["audio"],
        "fold": number,
        "training_folds": np.unique(data.folds[training]).tolist(),
        "training_digest": data_loader.names_digest(data.clips, training),
        "settings": settings,
        "source": data.info["source"],
    }
    optimizer, folder = make_optimizer(network, settings), checkpoint.fold_dir(run.paths.checkpoints, number)
    weights = class_weights(targets[training], settings, device)
    targets = targets.to(features.device)
    return Fold(
        number, training, validation, test, features, targets, network, optimizer, device, info, folder, weights
    )


def resume(fold, settings):
    """Load the fold's newest checkpoint, if there is one, and write again what a kill may have kept it from writing."""
    fold.newest = checkpoint.load_newest(fold.folder)
    if fold.newest is None:
        return
    for state in (fold.newest["model"], checkpoint.best_weights(fold.newest)):
        model_file.check_state(f"{fold.folder} (--fresh starts again)", state, fold.network.state_dict())
    fold.network.load_state_dict(fold.newest["model"])
    checkpoint.load_optimizer(fold.optimizer, fold.newest["optimizer"], fold.folder)
    checkpoint.follow_up(fold.folder, fold.newest, fold.info)
    if fold.newest["epoch"] < settings["epochs"]:
        print(f"fold {fold.number}: resuming after epoch {fold.newest['epoch']} of {settings['epochs']}")


def train_fold(fold, settings, run, services):
    """Train the epochs that the fold still lacks, with a checkpoint, a JSON record and a line after each."""
    for epoch in range(fold.newest["epoch"] + 1 if fold.newest else 1, settings["epochs"] + 1):
        start = time.perf_counter()
        loss, accuracy = train_epoch(fold, epoch, settings)
        examples_per_second = len(fold.training) / (time.perf_counter() - start)
        row = {
            "epoch": epoch,
            "learning_rate": fold.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **validate(fold, settings),
        }
        fold.newest = next_checkpoint(fold, row, settings, run.run_id)
        checkpoint.save(fold.folder, fold.newest, fold.info)
        run.record(fold)
        services.after_epoch(fold, row)
        epochs_left = max(settings["epochs"] - epoch, run.epochs_left / utils.process_count())
        seconds_left = epochs_left * (time.perf_counter() - start)
        print(epoch_line(fold, row, settings, examples_per_second, seconds_left))


def next_checkpoint(fold, row, settings, run_id):
    """Return the checkpoint of the epoch just trained (see checkpoint.py), given its row of the history."""
    before = fold.newest
    best = before and before["best"]
    losses = row["validation_loss"], best and best["validation_loss"]
    if None in losses or losses[0] < losses[1]:
        best, best_model = {"epoch": row["epoch"], "validation_loss": row["validation_loss"]}, None
    else:
        best_model = checkpoint.best_weights(before)
    return {
        "epoch": row["epoch"],
        "model": {name: tensor.to("cpu", copy=True) for name, tensor in fold.network.state_dict().items()},
        "optimizer": fold.optimizer.state_dict(),
        "best": best,
        "best_model": best_model,
        "history": [*(before["history"] if before else []), row],
        "settings": settings,
        "run_id": run_id,
    }


def epoch_line(fold, row, settings, examples_per_second, seconds_left):
    """Return the one line that an epoch prints: `name value` pairs, for people and for grep."""
    parts = [f"fold {fold.number}", f"epoch {row['epoch']}/{settings['epochs']}"]
    parts += [f"train_loss {row['train_loss']:.4f}", f"train_acc {row['train_accuracy']:.4f}"]
    if row["validation_loss"] is not None:
        parts += [f"val_loss {row['validation_loss']:.4f}", f"val_acc {row['validation_accuracy']:.4f}"]
    left = datetime.timedelta(seconds=round(seconds_left))
    return "  ".join(
        [*parts, f"lr {row['learning_rate']:.2e}", f"{examples_per_second:.0f} examples/s", f"left {left}"]
    )


def fit_temperature(logits, classes):
    """Return the temperature T that gives softmax(logits / T) the smallest mean negative log-likelihood.

    logits: (clips, classes); classes: (clips,) indices of the true ones. Guo et al. 2017 (arXiv:1706.04599). The loss
    is convex in 1 / T, so that a search over log T finds its minimum, or the end of TEMPERATURE_RANGE.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    bounds = tuple(map(math.log, model_file.TEMPERATURE_RANGE))
    found = minimize_scalar(lambda x: cross_entropy(logits / math.exp(x), classes).item(), bounds=bounds)
    return round(math.exp(found.x), 4)


def test_fold(fold, data, settings, run):
    """Test the fold once, with its chosen weights: write the model file and the predictions, and record the score.

    Return (scores, whether it was the last fold of the run: see `checkpoint.Run.record`).
    """
    fold.network.load_state_dict(checkpoint.best_weights(fold.newest))
    fitted = {}
    if settings["validation"] == "next_fold":  # the other protocols have no clean validation clips
        fitted = {"temperature": fit_temperature(*fold.logits(fold.validation))}
    logits, classes = fold.logits(fold.test)
    probabilities = logits.softmax(dim=1)  # (clips, classes)
    accuracy = (probabilities.argmax(1) == classes).double().mean().item()
    scores = {"test_accuracy": accuracy, "test_clips": len(classes), "best_epoch": fold.newest["best"]["epoch"]}
    table = pd.DataFrame(probabilities.numpy(), columns=fold.info["class_names"])
    table.insert(0, "slice_file_name", data.clips["slice_file_name"].iloc[fold.test].to_numpy())
    table.insert(1, "classID", data.labels[fold.test])
    with utils.atomic_write(checkpoint.result_path(run.paths.results, "predictions", fold.number), "w") as file:
        table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")
    info = {**fold.info, **fitted, "scores": scores}
    model_file.save_model(model_file.model_path(run.paths.models, fold.number), fold.network.state_dict(), info)
    is_last = run.record(fold, done=True, **scores, **fitted)
    epoch = scores["best_epoch"]
    print(f"fold {fold.number}: tested on {len(classes)} clips with epoch {epoch}: accuracy {accuracy:.4f}")
    return scores, is_last


def keep_without_test(fold, run):
    """Write the model of a network that trained on all clips, and record it as done. Return what `test_fold` does.

    Its temperature is fitted to the run's test predictions, of networks like this one, as far as folds are tested.
    """
    fitted = {}
    if any(map(run.is_done, range(utils.MAX_FOLDS))):
        tested = metrics.read_predictions(run.paths.results)
        logits = torch.from_numpy(tested.probabilities).clamp(min=1e-12).log()  # (clips, classes), up to a constant
        fitted = {"temperature": fit_temperature(logits, torch.tensor(tested.true))}
    path = model_file.model_path(run.paths.models, fold.number)
    model_file.save_model(path, fold.newest["model"], {**fold.info, **fitted})
    print(f"trained on all {len(fold.training)} clips -> {path}. It has no test; the folds of this run have")
    return {}, run.record(fold, done=True, **fitted)


# --- The run -----------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    paths = utils.run_folders(args)
    utils.keep_freed_memory()
    device = utils.pick_device(args.device)
    data = load_data(paths.processed)
    present = sorted({int(fold) - 1 for fold in data.folds})
    folds = args.folds or present
    if absent := [fold for fold in folds if fold not in [*present, utils.NO_FOLD]]:
        raise UserError(f"--folds {absent} have no clips in {paths.processed}; the folds present are {present}")
    settings = training_settings(args, data)
    if args.fresh:
        start_again(paths, args.folds or utils.ALL_FOLDS, settings)  # also folds that are gone
    run = checkpoint.Run(paths, settings, folds)
    with events.Services(args.assets_dir, paths, data, run) as services:
        try:
            cross_validate(data, settings, run, device, services)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped. The same command resumes after the last completed epoch.") from None


def start_again(paths, folds, settings):
    """Remove what an earlier run left for these folds."""
    if utils.process_count() > 1:
        raise UserError(
            "--fresh is for one process, as torchrun may start others again: run it once without torchrun or a Slurm "
            "array (unset WORLD_SIZE and SLURM_ARRAY_TASK_COUNT)"
        )
    checkpoint.remove_folds(paths, folds, settings)
    events.forget(paths.checkpoints, folds)


def cross_validate(data, settings, run, device, services):
    """Train and test the folds that no other process has, then write the report if the last of them was ours."""
    done = [fold for fold in run.folds if run.is_done(fold)]
    folds = "no test" if run.folds == [utils.NO_FOLD] else f"{len(run.folds)} of {len(set(data.folds))} folds"
    print(
        f"{settings['model']} on {device}: {len(data.labels)} clips, {folds}, {settings['epochs']} epochs, "
        f"validation {settings['validation']} -> {run.paths.checkpoints}"
    )
    for fold in done:
        print(f"fold {fold}: done already")
    is_last = len(done) == len(run.folds)  # a finished run prints its table again
    features = place_features(data.features, device)  # (clips, n_mels, n_frames)
    for number in run.claim():
        fold = make_fold(number, data, features, settings, run, device)
        run.name_lost_files(number)
        resume(fold, settings)
        services.start_fold(fold)
        train_fold(fold, settings, run, services)
        scores, is_last = test_fold(fold, data, settings, run) if len(fold.test) else keep_without_test(fold, run)
        run.write_info(data)
        services.after_fold(fold, scores)
    if run.folds == [utils.NO_FOLD]:
        return
    if not is_last:
        print("The other folds are in the hands of other processes; the last of them writes the report.")
        return
    run.write_info(data)
    results = tables.write_report(run.paths.results, run.paths.processed)
    services.at_end(results)
    audit.report(run.paths, data)


if __name__ == "__main__":
    utils.run(main)
