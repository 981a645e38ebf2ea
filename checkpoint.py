"""Checkpoints: all that a fold's training needs to resume, the JSON that tracks the run, and which folds are free.

    checkpoints/fold_<k>/epoch_<e>.pt            weights, optimizer, best weights so far, history, settings
    checkpoints/fold_<k>/epoch_<e>.safetensors   weights with their metadata, as prediction reads them
    checkpoints/fold_<k>/best_model_this_fold.pt the best weights so far
    checkpoints/training_state.json              the run's id and settings, last epoch of each fold, folds done

An epoch_<e>.pt is whole or absent, and enough by itself: the other files follow from it and are written after it, so
after a kill at any moment the newest readable .pt decides and the rest is written again. A .pt ends with a checksum of
all before it, which torch.load ignores.

A fold is a job: a process holds the lock of the fold that it trains, and takes the next one that is free. Several
processes need nothing but the folder; the system frees the lock of a process that dies.
"""

import contextlib
import csv
import hashlib
import io
import json
import re
import secrets
import shutil
import zipfile

import torch
from safetensors import safe_open

import config
import utils
from model_file import is_temperature, model_path, save_model
from utils import UserError

CHECKSUM_BYTES = 32
REPORT_FILES = ("run.json", "results.json", "report.md", "README.md")  # in the results, beside those of the folds
REPORT_FILES += ("confusion_matrix.png", "per_class.png", "reliability.png", "curves.png")
CHECKPOINT_KEYS = {"epoch", "model", "optimizer", "best", "best_model", "history", "settings", "run_id"}


def fold_dir(checkpoint_dir, fold):
    return checkpoint_dir / f"fold_{fold}"


def lock_path(checkpoint_dir, fold):
    """Return the file whose lock a process holds while it trains a fold."""
    return checkpoint_dir / f".fold_{fold}.lock"


def result_path(results_dir, name, fold):
    """Return the path of a fold's "predictions" or "history" in the results."""
    return results_dir / f"{name}_fold_{fold}.csv"


def file_digests(paths, fold):
    """Return {"model": digest, "predictions": ..., "history": ...} of a fold's files, None for one that is missing."""
    files = {name: result_path(paths.results, name, fold) for name in ("predictions", "history")}
    files["model"] = model_path(paths.models, fold)
    return {name: utils.file_digest(path) for name, path in files.items()}


# --- Save and load -----------------------------------------------------------------------------------------------


def save(folder, checkpoint, info):
    """Write a fold's checkpoint of one epoch, and the files that follow from it.

    checkpoint: dict of CHECKPOINT_KEYS, plain values and tensors only ("best_model" is None while the newest weights
    are the best); info: metadata of the .safetensors.
    """
    write_pt(folder / f"epoch_{checkpoint['epoch']}.pt", checkpoint)
    follow_up(folder, checkpoint, info)


def follow_up(folder, checkpoint, info):
    """Write what follows from a fold's newest checkpoint, and prune to KEEP_EPOCHS. May be called twice."""
    save_model(folder / f"epoch_{checkpoint['epoch']}.safetensors", checkpoint["model"], info)
    write_pt(folder / "best_model_this_fold.pt", {**checkpoint["best"], "model": best_weights(checkpoint)})
    if config.KEEP_EPOCHS is not None:
        # A later epoch than this one is a file that can't be used: it must not count among those kept.
        epochs = [epoch for epoch in checkpoint_epochs(folder) if epoch <= checkpoint["epoch"]]
        for epoch in epochs[max(config.KEEP_EPOCHS, 1) :]:
            # The .pt last: while it is there, the next call finds what a kill has kept this one from removing.
            (folder / f"epoch_{epoch}.safetensors").unlink(missing_ok=True)
            (folder / f"epoch_{epoch}.pt").unlink()


def follow_ups_are_whole(folder):
    """Return whether the files that follow from a fold's newest checkpoint can be read; True if it was removed."""
    try:
        for epoch in checkpoint_epochs(folder)[:1]:
            read_pt(folder / "best_model_this_fold.pt")
            safe_open(folder / f"epoch_{epoch}.safetensors", framework="pt")
    except Exception:  # a damaged file makes torch.load raise anything
        return False
    return True


def write_pt(path, value):
    """Write a .pt, atomically. By way of memory: torch.save to a full disk hides the reason behind one of its own."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with utils.atomic_write(path) as file:
        file.write(buffer.getbuffer())
        file.write(checksum(buffer.getbuffer()))


def read_pt(path):
    """Return what a .pt holds, on the CPU. Anything may be raised for a file that is damaged or holds a program."""
    blob = memoryview(path.read_bytes())
    if checksum(blob[:-CHECKSUM_BYTES]) != blob[-CHECKSUM_BYTES:]:  # torch.load would not notice a flipped bit
        raise ValueError("its checksum is wrong: it is damaged")
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        if sum(part.file_size for part in archive.infolist()) > len(blob):  # torch.save compresses nothing
            raise ValueError("it unpacks to more than its size")
    return torch.load(io.BytesIO(blob[:-CHECKSUM_BYTES]), map_location="cpu", weights_only=True)


def checksum(data):
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def best_weights(checkpoint):
    """Return the state_dict of the best epoch so far."""
    return checkpoint["best_model"] or checkpoint["model"]


def checkpoint_epochs(folder):
    """Return the epochs that have a .pt file, newest first."""
    matches = (re.fullmatch(r"epoch_([1-9][0-9]*)\.pt", path.name) for path in folder.glob("epoch_*.pt"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def load_newest(folder):
    """Return a fold's newest readable checkpoint, on the CPU, or None. Prints which files it had to pass over."""
    for epoch in checkpoint_epochs(folder):
        path = folder / f"epoch_{epoch}.pt"
        try:
            return load_checkpoint(path, epoch)
        except FileNotFoundError:  # pruned meanwhile by the process that trains this fold
            continue
        except Exception as error:  # a damaged file makes torch.load raise anything
            reason = utils.one_line(str(error) or type(error).__name__, longest=80)
            print(f"{path} can't be used ({reason}): taking the checkpoint before it, or starting again")
    return None


def load_checkpoint(path, epoch):
    """Return a fold's checkpoint of one epoch, on the CPU. ValueError, or what torch.load raises, if it is none."""
    checkpoint = read_pt(path)
    if not isinstance(checkpoint, dict):
        raise ValueError("it is no checkpoint")
    if missing := sorted(CHECKPOINT_KEYS - set(checkpoint)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if type(checkpoint["epoch"]) is not int:
        raise ValueError("its epoch is no number")
    if checkpoint["epoch"] != epoch:
        raise ValueError(f"it is of epoch {checkpoint['epoch']}")
    check_parts(checkpoint)
    return checkpoint


def check_parts(checkpoint):
    """Raise a ValueError if a part of a checkpoint is not what `save` was given: the file may have been forged."""
    kinds = {"best": dict, "history": list, "model": dict, "optimizer": dict, "run_id": str, "settings": dict}
    if odd := [name for name, kind in kinds.items() if not isinstance(checkpoint[name], kind)]:
        raise ValueError(f"its {', '.join(odd)} can't be")
    try:
        json.dumps([checkpoint[name] for name in ("best", "history", "run_id", "settings")])
        best, history = checkpoint["best"], checkpoint["history"]
        epochs = [row["epoch"] for row in history]
        is_right = (
            epochs == list(range(1, checkpoint["epoch"] + 1))
            and all(row.keys() == history[0].keys() for row in history)
            and best["epoch"] in epochs
            and (best["validation_loss"] is None or isinstance(best["validation_loss"], float))
            and all(isinstance(name, str) for name in checkpoint["settings"])
        )
    except (KeyError, TypeError):
        is_right = False
    if not is_right:
        raise ValueError("its best epoch, history or settings can't be")
    for state in (checkpoint["model"], checkpoint["best_model"] or {}):
        for tensor in state.values():
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError("its weights are no plain tensors")


def load_optimizer(optimizer, saved, where):
    """Load AdamW's moments. UserError if they do not fit the weights: it would read memory that is not theirs."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = [[("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())] for p in parameters]
    try:
        moments = [sorted((name, t.shape) for name, t in saved["state"][i].items()) for i in range(len(parameters))]
        tensors = [tensor for each in saved["state"].values() for tensor in each.values()]
        is_plain = all((t.dtype, t.layout, t.device.type) == (torch.float32, torch.strided, "cpu") for t in tensors)
    except (AttributeError, KeyError, TypeError):
        moments = is_plain = None
    if moments != expected or not is_plain:
        raise UserError(f"the optimizer's state in {where} does not fit the network: --fresh starts again")
    state = {}
    for index, parameter in enumerate(parameters):  # in memory of their own, laid out as the weights are
        own = {name: torch.empty_like(parameter, device="cpu") for name in ("exp_avg", "exp_avg_sq")}
        own["step"] = torch.empty(())
        state[index] = {name: tensor.copy_(saved["state"][index][name]) for name, tensor in own.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


# --- training_state.json -----------------------------------------------------------------------------------------


def load_state(path):
    """Return training_state.json as a dict; one without folds if it is missing or damaged: the checkpoints decide."""
    nothing = {"run_id": None, "settings": None, "folds": {}}
    if not path.exists():
        return nothing
    try:
        state = utils.load_json(path)
        if not is_state(state):
            raise UserError(f"{path} is not a training state")
        return state
    except UserError as error:
        print(f"{error}: the checkpoints decide")
        return nothing


def is_state(value):
    """Return whether a value read from JSON has the parts of a training state, each of its type."""
    if not isinstance(value, dict):
        return False
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # as it is written again
    except ValueError:  # NaN, or half a character
        return False
    kinds = {"folds": dict, "settings": dict, "run_id": str}
    if not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(
        fold in map(str, utils.ALL_FOLDS)
        and isinstance(entry, dict)
        and isinstance(entry.get("files", {}), dict)
        and isinstance(entry.get("done"), bool)
        and all(type(entry.get(key)) is int for key in ("epoch", "best_epoch"))
        and 1 <= entry["best_epoch"] <= entry["epoch"]
        and is_temperature(entry.get("temperature", 1))
        for fold, entry in value["folds"].items()
    )


class Run:
    """A cross-validation in a folder, of one process or several: its id, its settings, and how far its folds are.

    paths: the run's folders (.checkpoints, .models, .results); settings: all that the result depends on; folds: the
    0-indexed folds of this call. UserError if the folder holds a run with different settings.
    """

    def __init__(self, paths, settings, folds):
        self.paths, self.settings, self.folds = paths, settings, folds
        self.path = paths.checkpoints / "training_state.json"
        self.epochs_left = len(folds) * settings["epochs"]  # of all folds of this call, as of the last record
        with self.state() as state:
            self.run_id = self._join(state)

    def _join(self, state):
        """Make a state that is missing, damaged or of a different run this run's. Return the run's id."""
        what = f"the run in {self.paths.checkpoints}"
        run_ids = []
        for fold in utils.ALL_FOLDS:
            if checkpoint := load_newest(fold_dir(self.paths.checkpoints, fold)):
                check_settings(checkpoint["settings"], self.settings, f"fold {fold} of {what}")
                run_ids.append(checkpoint["run_id"])
                if checkpoint["epoch"] < self.settings["epochs"] and str(fold) in state["folds"]:
                    state["folds"][str(fold)]["done"] = False
        if run_ids and state["folds"] and (state["run_id"] not in run_ids or state["settings"] != self.settings):
            print(f"training_state.json is not of {what}: the checkpoints decide")
            state.update(run_id=None, folds={})
        if state["folds"]:
            check_settings(state["settings"], self.settings, what)
        state["settings"] = self.settings
        state["run_id"] = state["run_id"] or (run_ids[0] if run_ids else secrets.token_hex(4))
        return state["run_id"]

    @contextlib.contextmanager
    def state(self):
        """Give the training state to be read and changed, under its lock; it is written when the block ends well."""
        with utils.try_lock(self.paths.checkpoints / ".state.lock", wait=True):
            state = load_state(self.path)
            yield state
            state["folds"] = dict(sorted(state["folds"].items()))
            utils.save_json(self.path, state)

    def is_done(self, fold):
        """Return whether a fold is trained and tested, and its files are as the training wrote them."""
        entry = load_state(self.path)["folds"].get(str(fold), {})
        is_whole = follow_ups_are_whole(fold_dir(self.paths.checkpoints, fold))
        return entry.get("done", False) and entry.get("files") == file_digests(self.paths, fold) and is_whole

    def claim(self):
        """Yield the folds of this call that are neither done nor in the hands of another process, one by one.

        A fold whose files are missing or damaged is not done: its checkpoint has what they are made from. The fold's
        lock is held until the next one is asked for, and freed by the system if this process dies.
        """
        found = True
        while found:
            found = False
            for fold in self.folds:
                with utils.try_lock(lock_path(self.paths.checkpoints, fold)) as is_ours:
                    if is_ours and not self.is_done(fold):
                        found = True
                        yield fold

    def name_lost_files(self, fold):
        """Print which files of a finished fold are missing or damaged, and are therefore made again."""
        before = load_state(self.path)["folds"].get(str(fold), {}).get("files", {})
        now = file_digests(self.paths, fold)
        for name in [name for name in now if name in before and now[name] != before[name]]:
            what = "is not as the training wrote it" if now[name] else "is missing"
            print(f"fold {fold}: its {name} file {what}: made again")

    def record(self, fold, done=False, **scores):
        """Write a fold's progress to training_state.json and its history to results/.

        Return whether it was the last of the run's folds to be done: of several processes, that is true for one.
        """
        newest = fold.newest
        entry = {"epoch": newest["epoch"], "best_epoch": newest["best"]["epoch"], "done": done, **scores}
        with utils.atomic_write(result_path(self.paths.results, "history", fold.number), "w") as file:
            writer = csv.DictWriter(file, newest["history"][0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(newest["history"])
        if done:
            entry["files"] = file_digests(self.paths, fold.number)
        with self.state() as state:
            state["folds"][str(fold.number)] = entry
            entries = [state["folds"].get(str(number), {"epoch": 0, "done": False}) for number in self.folds]
        self.epochs_left = sum(self.settings["epochs"] - entry["epoch"] for entry in entries)
        return done and all(entry["done"] for entry in entries)

    def write_info(self, data):
        """Write results/run.json: what the predictions beside it come from, for the report."""
        info = {name: self.settings[name] for name in ("validation", "model", "seed", "epochs")}
        info["n_folds"] = len(set(data.folds.tolist()))
        with self.state() as state:
            folds = state["folds"]
            path, tested = self.paths.results / "run.json", {*folds} - {utils.NO_FOLD}
            if path.is_file() and not any(folds[fold]["done"] for fold in tested):
                return  # of an earlier run, whose predictions are beside it
            info["best_epochs"] = {fold: folds[fold]["best_epoch"] for fold in sorted(folds)}
            info["temperatures"] = {
                fold: entry["temperature"] for fold, entry in folds.items() if "temperature" in entry
            }
            info["files"] = {fold: entry["files"] for fold, entry in folds.items() if "files" in entry}
            info["class_ids"] = {name: class_id for class_id, name in data.class_names.items()}
            info |= {"source": data.info["source"], "settings": self.settings}
            utils.save_json(path, info)


def remove_folds(paths, folds, settings):
    """Remove what an earlier run left for these folds: checkpoints, models, results and their record.

    UserError, and nothing is removed, if other folds stay that have different settings than the new run's, or if
    another process trains one of these.
    """
    for fold in set(utils.ALL_FOLDS) - set(folds):
        if checkpoint := load_newest(fold_dir(paths.checkpoints, fold)):
            check_settings(checkpoint["settings"], settings, f"fold {fold} in {paths.checkpoints}, which stays,")
    with contextlib.ExitStack() as locks:
        for fold in folds:
            if not locks.enter_context(utils.try_lock(lock_path(paths.checkpoints, fold))):
                raise UserError(f"another process trains fold {fold} in {paths.checkpoints}: wait for it to end")
        for fold in folds:
            if (folder := fold_dir(paths.checkpoints, fold)).is_symlink():  # a user keeps it on another disk
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            model_path(paths.models, fold).unlink(missing_ok=True)
            for name in ("predictions", "history"):
                result_path(paths.results, name, fold).unlink(missing_ok=True)
        state = load_state(paths.checkpoints / "training_state.json")
        state["folds"] = {fold: entry for fold, entry in state["folds"].items() if fold not in map(str, folds)}
        if state["folds"]:
            utils.save_json(paths.checkpoints / "training_state.json", state)
        else:
            for path in (paths.checkpoints / "training_state.json", *(paths.results / name for name in REPORT_FILES)):
                path.unlink(missing_ok=True)


def check_settings(found, expected, what):
    """Raise a UserError that names each setting in which an earlier run's files differ from this run's.

    A setting that the earlier run did not have counts as different.
    """
    differences = [
        f"{name} was {utils.one_line(found.get(name))} and is {expected.get(name)!r} now"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"{what} was trained with different settings: {'; '.join(differences)}. Run with the old values to resume, "
            "with --fresh to start again, or with another --assets_dir to keep both"
        )
