"""Checkpoints: all that a fold's training needs to go on, and the JSON that tracks the run.

    checkpoints/fold_<k>/epoch_<e>.pt            weights, optimizer, best weights so far, history, settings
    checkpoints/fold_<k>/epoch_<e>.safetensors   weights with their metadata, as prediction reads them
    checkpoints/fold_<k>/best_model_this_fold.pt the best weights so far
    checkpoints/training_state.json              folds done, last epoch of each, the run's id and settings

An epoch_<e>.pt is whole or absent, and enough by itself: the other files follow from it and are written after it, so
after a kill at any moment the newest readable .pt decides and the rest is written again. A .pt ends with a checksum of
all before it, which torch.load does not mind.
"""

import csv
import hashlib
import io
import re
import secrets
import shutil

import torch

import config
import processes
import utils
from model import model_path, save_model
from utils import UserError

FOLD_NUMBERS = tuple("0123456789")
CHECKSUM_BYTES = 32
CHECKPOINT_KEYS = {"epoch", "model", "optimizer", "best", "best_model", "history", "settings", "run_id"}


def fold_dir(checkpoint_dir, fold):
    return checkpoint_dir / f"fold_{fold}"


def save_checkpoint(folder, checkpoint, info):
    """Write a fold's checkpoint of one epoch, and the files that follow from it.

    checkpoint: dict of CHECKPOINT_KEYS, plain values and tensors only ("best_model" is None while the newest weights
    are the best); info: metadata of the .safetensors.
    """
    write_pt(folder / f"epoch_{checkpoint['epoch']}.pt", checkpoint)
    follow_up(folder, checkpoint, info)


def follow_up(folder, checkpoint, info):
    """Write what follows from a fold's newest checkpoint, and prune to KEEP_EPOCHS. Does no harm the second time."""
    save_model(folder / f"epoch_{checkpoint['epoch']}.safetensors", checkpoint["model"], info)
    write_pt(folder / "best_model_this_fold.pt", {**checkpoint["best"], "model": best_weights(checkpoint)})
    if config.KEEP_EPOCHS is not None:
        # A later epoch than this one is a file that can't be used: it must not count among those kept.
        epochs = [epoch for epoch in checkpoint_epochs(folder) if epoch <= checkpoint["epoch"]]
        for epoch in epochs[config.KEEP_EPOCHS :]:
            # The .pt last: while it is there, the next call finds what a kill has kept this one from removing.
            (folder / f"epoch_{epoch}.safetensors").unlink(missing_ok=True)
            (folder / f"epoch_{epoch}.pt").unlink()


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
    """Return a fold's newest readable checkpoint, on the CPU, or None. Says which files it had to pass over."""
    for epoch in checkpoint_epochs(folder):
        try:
            return load_checkpoint(folder, epoch)
        except Exception as error:  # a damaged file makes torch.load raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            path = folder / f"epoch_{epoch}.pt"
            print(f"{path} can't be used ({reason[:80]}): going by the checkpoint before it, or from the start")
    return None


def load_all_newest(checkpoint_dir):
    """Return {fold: its newest readable checkpoint} of the folds that have one."""
    newest = {int(number): load_newest(fold_dir(checkpoint_dir, number)) for number in FOLD_NUMBERS}
    return {number: checkpoint for number, checkpoint in newest.items() if checkpoint}


def load_checkpoint(folder, epoch):
    """Return a fold's checkpoint of one epoch, on the CPU. ValueError, or what torch.load raises, if it is none."""
    checkpoint = read_pt(folder / f"epoch_{epoch}.pt")
    if not isinstance(checkpoint, dict):
        raise ValueError("it is no checkpoint")
    if missing := sorted(CHECKPOINT_KEYS - set(checkpoint)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if checkpoint["epoch"] != epoch:
        raise ValueError(f"it is of epoch {checkpoint['epoch']}")
    return checkpoint


def check_disk_space(folder, n_folds, epochs, n_parameters):
    """Raise a UserError now if the disk can't hold what the training of n_folds folds will write."""
    weights = 4 * n_parameters  # bytes
    kept = epochs if config.KEEP_EPOCHS is None else config.KEEP_EPOCHS + 1  # one more before the oldest goes
    # A .pt holds weights, best weights and two moments of AdamW, a .safetensors weights; a fold has two more of these.
    waiting = epochs if config.HF_MODEL_REPO_ID else 0  # in the outbox, if the Hub can't be reached
    needed = n_folds * weights * (5 * kept + 2 + waiting)
    utils.need_space(
        folder,
        needed,
        f", and {n_folds} folds need {needed / 1e6:,.0f} MB: "
        "make room, keep fewer KEEP_EPOCHS (config.py), or use another --assets_dir",
    )


# --- training_state.json -----------------------------------------------------------------------------------------


def load_state(path):
    """Return training_state.json as a dict; an empty one if it is missing or damaged: the checkpoints know better."""
    if not path.exists():
        return {"folds": {}}
    try:
        state = utils.load_json(path)
        if not is_state(state):
            raise UserError(f"{path} is not a training state")
        return state
    except UserError as error:
        print(f"{error}: going by the checkpoints")
        return {"folds": {}}


def is_state(value):
    """Return whether a value read from JSON has the parts of a training state, each of its kind."""
    if not isinstance(value, dict):
        return False
    kinds = {"folds": dict, "settings": dict, "run_id": str}
    if not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    kinds = {"epoch": int, "best_epoch": int, "done": bool}
    return all(
        number in FOLD_NUMBERS
        and isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        for number, entry in value["folds"].items()
    )


def reconcile(state, checkpoints, settings, what):
    """Return the training state that holds: where it and the checkpoints differ, the checkpoints decide.

    state: a training state, perhaps of another run, or ahead of or behind the checkpoints; checkpoints: {fold: newest
    checkpoint}; settings: this run's; what: the run's name in messages. UserError if the run has other settings.
    """
    for number, checkpoint in checkpoints.items():
        check_settings(checkpoint["settings"], settings, f"fold {number} of {what}")
    run_ids = [checkpoint["run_id"] for checkpoint in checkpoints.values()]
    entries = state["folds"]
    if run_ids and entries and (state["run_id"] not in run_ids or state["settings"] != settings):
        print(f"training_state.json is not of {what}: going by the checkpoints")
        state, entries = {}, {}
    folds = {number: entry for number, entry in entries.items() if entry["done"]}  # its checkpoints may be gone
    if folds:
        check_settings(state["settings"], settings, what)
    for number, checkpoint in checkpoints.items():
        there = {"epoch": checkpoint["epoch"], "best_epoch": checkpoint["best"]["epoch"]}
        entry = entries.get(str(number), {})
        is_done = entry.get("done") and checkpoint["epoch"] == entry["epoch"] == settings["epochs"]
        folds[str(number)] = {**entry, **there} if is_done else {**there, "done": False}
    run_id = state.get("run_id")
    if run_ids and run_id not in run_ids:
        run_id = run_ids[0]
    return {"folds": dict(sorted(folds.items())), "settings": settings, "run_id": run_id or secrets.token_hex(4)}


class Run:
    """What training_state.json tracks: the run's id and settings, each fold's last epoch, which folds are done.

    paths: the run's folders (.checkpoints, .models, .results); settings: what the result depends on; folds: the
    0-indexed folds of this call; team: the processes that train them. UserError if the folder holds a run with other
    settings.
    """

    def __init__(self, paths, settings, folds, team=processes.ALONE):
        self.paths, self.folds, self.team, self.epoch_seconds = paths, folds, team, 0.0
        self.path = paths.checkpoints / "training_state.json"
        self.state, self.resumable = team.once(lambda: self._look(settings))
        self.done = team.once(lambda: [number for number in folds if self.is_done(number)])

    def _look(self, settings):
        """Return (the training state that holds, {fold: epoch of its newest checkpoint})."""
        checkpoints = load_all_newest(self.paths.checkpoints)
        state = reconcile(load_state(self.path), checkpoints, settings, f"the run in {self.paths.checkpoints}")
        return state, {number: checkpoint["epoch"] for number, checkpoint in checkpoints.items()}

    def epochs_left(self, number):
        """Return how many epochs a fold lacks, as far as this process has been told."""
        return self.state["settings"]["epochs"] - self.state["folds"].get(str(number), {"epoch": 0})["epoch"]

    def folds_left(self):
        """Yield the folds that are to be trained here, one after another, until every fold has its process.

        Between several processes those with most epochs left go first, so that all end at about the same time.
        """
        left = [number for number in self.folds if number not in self.done]
        if self.team.size > 1:
            left.sort(key=self.epochs_left, reverse=True)
        yield from self.team.claim(left)

    def wait_for_others(self):
        """Wait until the other processes have trained their folds; the first one records how far they are."""
        for _ in self.team.wait():
            if self.team.is_first and self._hear():
                self.save_state()
        self.save_state()

    def check_done(self):
        """Raise a UserError that names the folds which no process has trained to the end."""
        if missing := [number for number in self.folds if not self.is_done(number)]:
            raise UserError(f"folds {missing} are not done: run the same command again")

    def _hear(self):
        """Take over what other processes have told of their folds. Return whether any of it is news."""
        before = self.state["folds"]
        self.state["folds"] = dict(sorted({**before, **self.team.told(FOLD_NUMBERS)}.items()))
        return self.state["folds"] != before

    def load_newest(self, number):
        """Return a fold's newest checkpoint as it was when the run began, or None."""
        if number not in self.resumable:
            return None
        return load_checkpoint(fold_dir(self.paths.checkpoints, number), self.resumable[number])

    def is_done(self, number):
        """Return whether a fold is trained and tested, with its files in place."""
        files = model_path(self.paths.models, number), result_path(self.paths.results, "predictions", number)
        return self.state["folds"].get(str(number), {}).get("done", False) and all(path.is_file() for path in files)

    def record(self, fold, done=False, **scores):
        """Write a fold's progress to training_state.json and its history to results/."""
        newest = fold.newest
        entry = {"epoch": newest["epoch"], "best_epoch": newest["best"]["epoch"], "done": done, **scores}
        self.state["folds"][str(fold.number)] = entry
        self.team.tell(str(fold.number), entry)
        with utils.atomic_write(result_path(self.paths.results, "history", fold.number), "w") as file:
            writer = csv.DictWriter(file, newest["history"][0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(newest["history"])
        self.save_state()

    def save_state(self):
        """Write training_state.json, with what the other processes have told. One process does."""
        self._hear()
        if self.team.is_first:
            utils.save_json(self.path, self.state)

    def write_info(self, data):
        """Write results/run.json: what the predictions beside it come from, for evaluate.py. One process does."""
        if not self.team.is_first:
            return
        settings = self.state["settings"]
        info = {name: settings[name] for name in ("validation", "model", "seed", "epochs")}
        info["n_folds"] = len(set(data.folds.tolist()))
        info["best_epochs"] = {number: fold["best_epoch"] for number, fold in self.state["folds"].items()}
        info["temperatures"] = {
            number: fold["temperature"] for number, fold in self.state["folds"].items() if "temperature" in fold
        }
        info["source"] = data.info["source"]
        utils.save_json(self.paths.results / "run.json", {**info, "settings": settings})

    def seconds_left(self, fold):
        """Estimate the time to the end of the run from the last epoch's."""
        all_left = sum(self.epochs_left(number) for number in self.folds)
        return self.epoch_seconds * max(self.epochs_left(fold.number), all_left / self.team.size)


def remove_folds(paths, folds, settings):
    """Remove what an earlier run left for these folds: checkpoints, models, results and their record.

    UserError, and nothing is removed, if other folds stay that have other settings than the new run's.
    """
    for number, checkpoint in load_all_newest(paths.checkpoints).items():
        if number not in folds:
            check_settings(checkpoint["settings"], settings, f"fold {number} in {paths.checkpoints}, which stays,")
    state_path = paths.checkpoints / "training_state.json"
    state = load_state(state_path)
    for number in folds:
        if fold_dir(paths.checkpoints, number).exists():
            shutil.rmtree(fold_dir(paths.checkpoints, number))
        model_path(paths.models, number).unlink(missing_ok=True)
        for name in ("predictions", "history"):
            result_path(paths.results, name, number).unlink(missing_ok=True)
        state["folds"].pop(str(number), None)
    if state["folds"]:
        utils.save_json(state_path, state)
    else:
        state_path.unlink(missing_ok=True)


def result_path(results_dir, name, fold):
    """Return the path of a fold's "predictions" or "history" in the results."""
    return results_dir / f"{name}_fold_{fold}.csv"


def check_settings(there, wanted, what):
    """Raise a UserError that names each setting in which an earlier run's files differ from this run's.

    A setting that the earlier run did not know counts as different.
    """
    differences = [
        f"{name} was {there.get(name)!r} and is {wanted.get(name)!r} now"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserError(
            f"{what} was trained with other settings: {'; '.join(differences)}. Run with the old values to go on, "
            "with --fresh to start again, or with another --assets_dir to keep both"
        )
