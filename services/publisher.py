"""What training makes, on its way to a model repository of the Hugging Face Hub. Off until HF_MODEL_REPO_ID names one.

train.py adds files, and one background thread sends what waits in one commit: every HF_COMMIT_MINUTES, and at the end
of a fold and of the run. `python -m services.hub push` sends what a run could not.

    checkpoints/outbox/waiting/<name>    to be sent under this name; a newer version replaces it
    checkpoints/outbox/sending/<name>    taken for a commit; waits on if that fails

A file waits as a hard link of its own, so that neither pruning nor a kill takes it away.
"""

import contextlib
import os
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import checkpoint
import config
import evaluate
import utils
from model import model_path
from services import cards, hub
from utils import UserError

FIRST_PAUSE = 1  # s after a failure; each further one takes twice as long
LAST_TRIES = 3  # to send what is left when the run has ended
FINISH_SECONDS = 120  # s that a finished run waits for the last commit
STOP_SECONDS = 3  # s that an interrupted one waits
FILES_PER_COMMIT = 100
RESULT_FILES = ("results.json", "report.md", "confusion_matrix.png")


# --- The outbox --------------------------------------------------------------------------------------------------


def outbox_dir(checkpoint_dir):
    return Path(checkpoint_dir) / "outbox"


def put(outbox, name, path):
    """Let a file wait under its name in the repository, as it is now."""
    target = outbox / "waiting" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a disk without links
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # os.replace leaves it where both are one file


def files_below(folder):
    """Return {name: path} of the files below a folder, the oldest first."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    return {path.relative_to(folder).as_posix(): path for path in paths}


def files_left(outbox):
    """Return the names of what is not sent yet."""
    return list({**files_below(outbox / "sending"), **files_below(outbox / "waiting")})


def send(outbox, repo_id):
    """Send all that waits, and return how many files that were. UserError if it fails; they wait on."""
    for name, path in files_below(outbox / "waiting").items():
        target = outbox / "sending" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # older; and os.replace would leave both names where they are one file
        os.replace(path, target)
    files = files_below(outbox / "sending")
    names = list(files)
    for start in range(0, len(names), FILES_PER_COMMIT):
        group = names[start : start + FILES_PER_COMMIT]
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        hub.commit_files(repo_id, {name: files[name] for name in group}, f"{group[-1]}{more}")
        for name in group:
            files[name].unlink()
    return len(names)


def forget(checkpoint_dir, folds):
    """Remove what waits of these folds, and the report, which speaks for them: --fresh begins them again."""
    for state in ("waiting", "sending"):
        folder = outbox_dir(checkpoint_dir) / state
        for name in ("README.md", *RESULT_FILES):
            (folder / name).unlink(missing_ok=True)
        for number in folds:
            shutil.rmtree(checkpoint.fold_dir(folder / "checkpoints", number), ignore_errors=True)
            model_path(folder, number).unlink(missing_ok=True)


# --- What training adds ------------------------------------------------------------------------------------------


def add_epoch(paths, number, epoch):
    path = checkpoint.fold_dir(paths.checkpoints, number) / f"epoch_{epoch}.safetensors"
    put(outbox_dir(paths.checkpoints), f"checkpoints/fold_{number}/{path.name}", path)


def add_best(paths, number):
    path = model_path(paths.models, number)
    put(outbox_dir(paths.checkpoints), path.name, path)


def add_results(paths, repo_id):
    """Let the report wait, and the model card made from it."""
    results = utils.load_json(paths.results / "results.json")
    file = checkpoint.result_path(paths.results, "predictions", results["per_fold"][0]["fold"])
    names = evaluate.read_prediction_file(file)[1]
    with utils.atomic_write(paths.results / "model_card.md", "w") as file:
        file.write(cards.model_card(results, names, repo_id))
    put(outbox_dir(paths.checkpoints), "README.md", paths.results / "model_card.md")
    for name in RESULT_FILES:
        put(outbox_dir(paths.checkpoints), name, paths.results / name)


class Publisher:
    """The background thread, as a context around a training. Does nothing without HF_MODEL_REPO_ID, and never raises.

    paths: the run's folders (.checkpoints, .models, .results); sends: whether this process sends what it and the others
    add, of which one must.
    """

    def __init__(self, paths, sends=True):
        self.paths, self.repo_id, self.sends = paths, config.HF_MODEL_REPO_ID, sends
        self.outbox = outbox_dir(paths.checkpoints)
        self.wake, self.is_ending, self.is_silent = threading.Event(), False, False
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        if self.repo_id and self.sends:
            self.thread.start()
        return self

    def add_epoch(self, fold):
        self._add(add_epoch, fold.number, fold.newest["epoch"])

    def add_best(self, number):
        """Add a tested fold's model, and send what waits now."""
        self._add(add_best, number)
        self.wake.set()

    def add_results(self):
        self._add(add_results, self.repo_id)

    def _add(self, function, *arguments):
        if self.repo_id:
            try:
                function(self.paths, *arguments)
            except (OSError, UserError) as error:
                self._warn(f"can't be put aside for the Hub: {error}")

    def _work(self):
        """Send what waits, until the run ends or the Hub refuses for good."""
        interval = 60 * config.HF_COMMIT_MINUTES  # s
        pause, failures = interval, 0
        while True:
            self.wake.wait(pause)
            self.wake.clear()
            is_ending = self.is_ending  # after clear(): an end that comes now wakes the next wait
            try:
                send(self.outbox, self.repo_id)
                pause, failures, self.is_silent = interval, 0, False
            except Exception as error:
                failures += 1
                pause = min(FIRST_PAUSE * 2 ** (failures - 1), interval)
                will_retry = not getattr(error, "is_lasting", False)
                self._warn(f"{error}. The run goes on{', and tries again' if will_retry else ''}")
                if not will_retry:
                    return
            if is_ending and (not failures or failures >= LAST_TRIES):
                return

    def _warn(self, text):
        """Print the first of a row of failures."""
        if not self.is_silent:
            self.is_silent = True
            with contextlib.suppress(OSError):
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def __exit__(self, kind, *_):
        """Send what is left, in bounded time, and say what could not be sent."""
        if not self.repo_id or not self.sends:
            return
        self.is_ending = True
        self.wake.set()
        self.thread.join(STOP_SECONDS if kind else FINISH_SECONDS)
        if left := files_left(self.outbox):
            names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            folders = [
                shlex.quote(str(path)) for path in (self.paths.checkpoints, self.paths.models, self.paths.results)
            ]
            print(
                f"warning: {len(left)} files are not on the Hub yet ({names}); to send them: python -m services.hub push "
                "--checkpoint_dir {} --model_dir {} --results_dir {}".format(*folders),
                file=sys.stderr,
            )


# --- By hand -----------------------------------------------------------------------------------------------------


def push(paths, repo_id):
    """Send what a run's folders hold and the repository lacks. UserError if it fails, or there is nothing."""
    outbox = outbox_dir(paths.checkpoints)
    left = set(files_left(outbox))
    for path in sorted(paths.checkpoints.glob("fold_[0-9]/epoch_*.safetensors")):
        put(outbox, f"checkpoints/{path.parent.name}/{path.name}", path)
    for number in range(10):
        if model_path(paths.models, number).is_file():
            add_best(paths, number)
    if (paths.results / "results.json").is_file():
        try:
            add_results(paths, repo_id)
        except (UserError, OSError) as error:  # a report of folds that --fresh has removed since
            print(f"{error}: the report and the card stay here (python evaluate.py makes it anew)", file=sys.stderr)
    if not left and not files_left(outbox):
        raise UserError(f"nothing to send in {paths.checkpoints}, {paths.models} and {paths.results}: train first")
    start = time.perf_counter()
    count = send(outbox, repo_id)
    print(f"on the Hub: {count} files in {repo_id} (looked at or sent in {time.perf_counter() - start:.0f} s)")
