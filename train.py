"""Stage 3: train and test one network per fold, the data set's own cross-validation.

    python train.py                                   # every fold, with config.py's settings
    python train.py --folds 0,3-5 --epochs 40         # some folds, shorter
    python train.py --learning_rate 1e-3 --processed_dir DATA --assets_dir ~/sweep/lr1e-3
    torchrun --nproc-per-node=4 train.py              # the folds over four processes, or GPUs; processes.py says how

Prints one line an epoch (fold, epoch, losses, accuracies, learning rate, examples/s, time left) and at the end a table
of folds with mean and standard deviation. Running the same command again goes on after the last completed epoch, with
the result that it would have had without the stop; a finished run prints its table again.

Fold numbers are 0-indexed: --folds 0 tests the data set's fold 1. Each fold is tested once, with the weights of the
epoch that VALIDATION (config.py) chose.
"""

import contextlib
import csv
import dataclasses
import datetime
import os
import time
from pathlib import Path

# Read when torch loads OpenMP. Its threads would otherwise spin while they wait, and two trainings side by side on the
# same cores take 15 times as long as one rather than twice; alone this costs under 5 %.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import batches
import calibration
import check_config
import checkpoint
import config
import data_loader
import evaluate
import processes
import utils
from epoch import SCHEDULES, make_optimizer, predict_logits, targets_of, train_epoch, validate
from model import MODELS, build_model, check_state, count_parameters, model_path, network_class, save_model, takes
from research import audit
from services import hub, publisher, tracking
from utils import UserError

FLAGS = (  # settings of config.py that the result depends on and that a flag overrides
    "model",
    "epochs",
    "batch_size",
    "learning_rate",
    "schedule",
    "weight_decay",
    "label_smoothing",
    *batches.augmentation_settings(),
    "validation",
    "seed",
)


# --- Settings ----------------------------------------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--processed_dir", metavar="DIR", help="processed files of stage 2 (default: data/ in the assets)")
    add("--model_dir", metavar="DIR", help="where each fold's best model goes (default: models/ in the assets)")
    add("--checkpoint_dir", metavar="DIR", help="default: checkpoints/ in the assets")
    add("--results_dir", metavar="DIR", help="predictions and report (default: results/ in the assets)")
    add("--folds", type=utils.parse_folds, help="0-indexed folds to train and test, as in 0,3-5 (default: all present)")
    add("--model", choices=MODELS, default=config.MODEL, help=f"default: {config.MODEL} (see model.py)")
    add("--epochs", type=utils.positive_int, default=config.EPOCHS, help=f"default: {config.EPOCHS}")
    quick = max(round(config.QUICK_SHARE * config.EPOCHS), 1)
    add("--quick", action="store_const", dest="epochs", const=quick, help=f"a quick look: {quick} epochs")
    add("--batch_size", type=utils.positive_int, default=config.BATCH_SIZE, help=f"clips; default: {config.BATCH_SIZE}")
    add(
        "--learning_rate",
        type=utils.positive_float,
        default=config.LEARNING_RATE,
        help=f"peak of the schedule; default: {config.LEARNING_RATE}",
    )
    add("--schedule", choices=SCHEDULES, default=config.SCHEDULE, help=f"default: {config.SCHEDULE} (see config.py)")
    add(
        "--validation",
        choices=batches.VALIDATIONS,
        default=config.VALIDATION,
        help=f"which clips choose the epoch that is tested; default: {config.VALIDATION} (see config.py)",
    )
    add("--seed", type=int, default=config.SEED, help=f"default: {config.SEED}")
    for name in ("weight_decay", "label_smoothing", *batches.augmentation_settings()):
        value = getattr(config, name.upper())
        add(f"--{name}", type=check_config.number_for(name.upper()), default=value, help=f"default: {value}")
    add("--device", default=config.DEVICE, help=f"auto, cpu, cuda, cuda:1, mps; default: {config.DEVICE}")
    add("--fresh", action="store_true", help="remove what an earlier run left for these folds and start again")
    return parser.parse_args()


def training_settings(args, data):
    """Return everything that the result depends on: checked on resume, stored with checkpoints and results.

    args: an object with those FLAGS that differ from config.py; data: the Processed data set. UserError if the
    network's pooling leaves nothing of such examples.
    """
    settings = {
        **{name: getattr(args, name, getattr(config, name.upper())) for name in FLAGS},
        "warmup_share": config.WARMUP_SHARE,
        "block_dropout": config.BLOCK_DROPOUT,
        "head_dropout": config.HEAD_DROPOUT,
        "precision": config.PRECISION,
        "data": data.info["fingerprint"],
    }
    network = network_class(settings["model"])
    shape = data.audio.n_mels, batches.crop_length(data.audio.n_frames, settings)  # of an example
    if not takes(network, shape):
        raise UserError(
            "{} needs {} mel bands and {} frames, and training examples have {} and {}: raise N_MELS or CROP_FRAMES in "
            "config.py, or choose another --model".format(settings["model"], *network.least_shape, *shape)
        )
    return settings


def load_data(processed_dir, team=processes.ALONE):
    """Return the Processed data set, fetched from the Hub first if it is not there and HF_REPO_ID is set.

    Of several processes on a node, one fetches it.
    """
    if team.local_rank == 0 and config.HF_REPO_ID and not (processed_dir / "features.json").is_file():
        hub.fetch_processed(processed_dir, config.HF_REPO_ID)
    team.gather("fetched")
    data = data_loader.load_processed(processed_dir)
    data_loader.check_audio_settings(data.info["audio"])
    return data


# --- One fold ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fold:
    """One fold's training: its clips, its network, and how far it has come."""

    number: int  # 0-indexed
    training: np.ndarray  # clip indices
    validation: np.ndarray
    test: np.ndarray
    tensors: tuple  # features, one-hot targets, band statistics: on one device, see `place_features`
    rows: batches.Rows  # of the features, on their device
    device: torch.device  # of the network
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    info: dict  # metadata of its model files
    folder: Path  # of its checkpoints
    newest: dict | None = None  # checkpoint
    shows_bar: bool = True  # those of several processes would overwrite each other


def place_features(features, device):
    """Return the features as a tensor on the device; where they would take over half of its memory, on the CPU.

    On the CPU they stay on the disk and in the system's cache of it, and each batch goes to the device by itself.
    """
    if device.type == "cuda" and features.nbytes > torch.cuda.mem_get_info(device)[1] / 2:
        return torch.from_numpy(features)
    return torch.from_numpy(features).to(device)


def make_fold(number, data, features, settings, checkpoint_dir, device):
    """Return a Fold at its beginning: data split, normalisation measured, network initialised from (seed, fold).

    features: data.features as `place_features` gives them.
    """
    training, validation, test = batches.split(data.folds, number + 1, settings["validation"])
    statistics = batches.band_statistics(data.features, training)
    class_ids = np.array(list(data.class_names))
    targets = torch.from_numpy((data.labels[:, None] == class_ids).astype(np.float32))  # (clips, classes)
    statistics_there = [torch.from_numpy(row).to(features.device) for row in statistics]
    tensors = features, targets.to(features.device), statistics_there
    torch.manual_seed(utils.derive_seed("weights", settings["seed"], number))
    network = build_model(settings["model"], len(class_ids), data.audio)
    network = network.to(device, memory_format=torch.channels_last)
    info = {
        "model": settings["model"],
        "class_names": list(data.class_names.values()),
        "class_ids": class_ids.tolist(),
        "audio": data.info["audio"],
        "band_mean": statistics[0].tolist(),
        "band_deviation": statistics[1].tolist(),
        "fold": number,
        "training_folds": np.unique(data.folds[training]).tolist(),
        "training_digest": audit.names_digest(data.clips, training),
        "settings": settings,
        "source": data.info["source"],
    }
    folder = checkpoint.fold_dir(checkpoint_dir, number)
    optimizer = make_optimizer(network, settings)
    rows = batches.rows_of(data.audio.blocks, features.device)
    return Fold(number, training, validation, test, tensors, rows, device, network, optimizer, info, folder)


def resume(fold, settings, run):
    """Load the fold's newest checkpoint, if there is one, and write again what a kill may have kept it from writing."""
    fold.newest = run.load_newest(fold.number)
    if fold.newest is None:
        return
    check_state(f"{fold.folder} (--fresh starts again)", fold.newest["model"], fold.network.state_dict())
    fold.network.load_state_dict(fold.newest["model"])
    fold.optimizer.load_state_dict(fold.newest["optimizer"])
    checkpoint.follow_up(fold.folder, fold.newest, fold.info)
    if fold.newest["epoch"] < settings["epochs"]:
        print(f"fold {fold.number}: going on after epoch {fold.newest['epoch']} of {settings['epochs']}")


def train_fold(fold, settings, run, tracker, models):
    """Train the epochs that the fold still lacks, with a checkpoint, a JSON record and a line after each."""
    for epoch in range(fold.newest["epoch"] + 1 if fold.newest else 1, settings["epochs"] + 1):
        start = time.perf_counter()
        loss, accuracy = train_epoch(fold, epoch, settings)
        examples_per_second = len(fold.training) / (time.perf_counter() - start)
        validation_loss, validation_accuracy = validate(fold)
        row = {
            "epoch": epoch,
            "learning_rate": fold.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
        }
        fold.newest = next_checkpoint(fold, row, settings, run.state["run_id"])
        checkpoint.save_checkpoint(fold.folder, fold.newest, fold.info)
        run.record(fold)
        tracker.log_epoch(row)
        models.add_epoch(fold)
        run.epoch_seconds = time.perf_counter() - start
        print(epoch_line(fold, row, settings, examples_per_second, run.seconds_left(fold)))


def next_checkpoint(fold, row, settings, run_id):
    """Return the checkpoint of the epoch just trained (see checkpoint.py), given its row of the history."""
    before = fold.newest
    best = before and before["best"]
    if best is None or row["validation_loss"] is None or row["validation_loss"] < best["validation_loss"]:
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


def fit_confidence(fold):
    """Return the temperature and the threshold (calibration.py) of the fold's weights, from validation clips alone.

    {} if the protocol has none, or has the test clips in their place.
    """
    if fold.info["settings"]["validation"] != "next_fold":
        return {}
    logits = predict_logits(fold, fold.validation, "float32")
    return calibration.fit(logits, targets_of(fold, fold.validation).argmax(1))


def test_fold(fold, data, paths, run):
    """Test the fold once, with its chosen weights: write the model file and the predictions, and record the score."""
    fold.network.load_state_dict(checkpoint.best_weights(fold.newest))
    confidence = fit_confidence(fold)  # before the test clips are read
    probabilities = predict_logits(fold, fold.test, "float32").softmax(dim=1).cpu().numpy()  # (clips, classes)
    labels = data.labels[fold.test]
    accuracy = float((np.array(fold.info["class_ids"])[probabilities.argmax(1)] == labels).mean())
    scores = {"test_accuracy": accuracy, "test_clips": len(labels), "best_epoch": fold.newest["best"]["epoch"]}
    with utils.atomic_write(checkpoint.result_path(paths.results, "predictions", fold.number), "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["slice_file_name", "classID", *fold.info["class_names"]])
        for clip, label, row in zip(fold.test, labels, probabilities, strict=True):
            writer.writerow([data.clips[clip]["slice_file_name"], label, *(f"{value:.9g}" for value in row)])
    weights = fold.network.state_dict()
    save_model(model_path(paths.models, fold.number), weights, {**fold.info, **confidence, "scores": scores})
    run.record(fold, done=True, **scores, **confidence)
    print(
        f"fold {fold.number}: tested on {len(labels)} clips with epoch {scores['best_epoch']}: accuracy {accuracy:.4f}"
    )


# --- The run -----------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    paths = utils.run_folders(args)
    utils.keep_freed_memory()
    with processes.join() as team, contextlib.ExitStack() as until_the_end:
        device = team.device(args.device)
        data = load_data(paths.processed, team)
        present = sorted({int(fold) - 1 for fold in data.folds})
        folds = args.folds or present
        if absent := [fold for fold in folds if fold not in present]:
            raise UserError(f"--folds {absent} have no clips in {paths.processed}; the folds present are {present}")
        settings = training_settings(args, data)
        team.check_same(settings)
        team.once(lambda: until_the_end.enter_context(utils.only_one(paths.checkpoints, "train.py")))
        team.check_shared(paths.checkpoints)
        tracker = until_the_end.enter_context(tracking.Tracker(args.assets_dir, is_quiet=not team.is_first))
        if args.fresh:
            start_again(paths, folds, settings, team)
        models = until_the_end.enter_context(publisher.Publisher(paths, sends=team.is_first))
        train_folds(folds, data, settings, paths, device, tracker, models, team)


def start_again(paths, folds, settings, team):
    """Remove what an earlier run left for these folds."""
    if team.size > 1:
        raise UserError(
            "--fresh under torchrun would start again after every restart: use another --assets_dir, or remove "
            f"{paths.checkpoints} first"
        )
    checkpoint.remove_folds(paths, folds, settings)
    publisher.forget(paths.checkpoints, folds)


def train_folds(folds, data, settings, paths, device, tracker, models, team=processes.ALONE):
    """Train and test the folds that are not done yet, then write the report over all that are."""
    run = checkpoint.Run(paths, settings, folds, team)
    features = place_features(data.features, device)  # (clips, rows, frames)
    team.once(lambda: start_run(run, data, device, models))
    number = None
    try:
        for number in run.folds_left():
            fold = make_fold(number, data, features, settings, paths.checkpoints, device)
            fold.shows_bar = team.size == 1
            resume(fold, settings, run)
            tracker.start_fold(fold, run)
            train_fold(fold, settings, run, tracker, models)
            test_fold(fold, data, paths, run)
            models.add_best(number)
            tracker.end_fold(fold, run, data, paths)
            run.write_info(data)
        if number is None and len(run.done) < len(folds):
            print(f"{team}: every fold has its process already, none is left for this one")
        run.wait_for_others()
        if team.is_first:
            run.check_done()
            run.write_info(data)
            results = evaluate.write_report(paths.results, paths.processed)
            tracker.log_summary(run, results, paths.results)
            models.add_results()
            audit.report(paths, data)
    except KeyboardInterrupt:
        if not team.is_first:  # which says it
            raise SystemExit(130) from None
        with contextlib.suppress(UserError, OSError):
            run.save_state()
        raise KeyboardInterrupt("Stopped. The same command goes on after the last completed epoch.") from None


def start_run(run, data, device, models):
    """Check that there is room, and print what is to be done and what is done already."""
    settings, folds, paths, team = run.state["settings"], run.folds, run.paths, run.team
    n_parameters = count_parameters(build_model(settings["model"], len(data.class_names), data.audio))
    checkpoint.check_disk_space(paths.checkpoints, len(folds) - len(run.done), settings["epochs"], n_parameters)
    run.save_state()
    run.write_info(data)
    where = f"{device}, {team.size} processes" if team.size > 1 else device
    print(
        f"{settings['model']} on {where}: {len(data.labels)} clips, {len(folds)} of {len(set(data.folds.tolist()))} "
        f"folds, {settings['epochs']} epochs, validation {settings['validation']} -> {paths.checkpoints}"
    )
    for number in run.done:
        print(f"fold {number}: done already")
        models.add_best(number)


if __name__ == "__main__":
    utils.run(main)
