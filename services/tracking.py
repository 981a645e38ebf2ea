"""Weights & Biases: the only file that knows it. Off until config.py or the environment names WANDB_PROJECT.

    WANDB_PROJECT=urbansound python train.py     # curves, best models and mistakes of each fold; see README.md
    wandb sync ASSETS/wandb                      # later, where there was no account or no network

One run a fold, in a group that is the cross-validation, and a summary run. Their ids are training_state.json's run_id
with -fold-<k> and -summary, so that a resumed fold goes on in its own run. Prints one line: where the runs can be seen,
or what failed.

wandb runs in a process of its own, which train.py starts, feeds through a pipe and never waits for before its end. So
it can't touch training's random numbers, signals or output, and whatever becomes of it, training goes on. That process
outlives a killed train.py just long enough to write what it has been told, FINISH_SECONDS at most.
"""

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

import audio_reader
import config
import evaluate
import utils
from utils import UserError

FINISH_SECONDS = 60  # s that a finished (or killed) run waits for the last uploads
MISTAKES_SHOWN = 20  # wrongly classified clips in a fold's table
SAID = 3  # exit status of the process where it has told what failed
ROOT = Path(__file__).resolve().parent.parent
WITHOUT = "The run goes on without it"
# wandb's own settings, as its environment variables: what is set already stands. Nothing is collected but what is sent.
DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "30",  # s for a run to start; without a network it goes on offline then
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_LABEL_DISABLE": "true",
    "WANDB_SYMLINK": "false",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # s; its own default would lose 15 s to a power cut
}
# What `wandb agent` sets for the one run that it knows: the summary run takes it, not the folds'.
SWEEP_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


# --- In train.py: tell, and go on ----------------------------------------------------------------------------------


class Tracker:
    """What train.py tells of its run, as a context. Does nothing if WANDB_PROJECT is empty, and never raises.

    assets_dir: where wandb/ goes (the environment's WANDB_DIR overrides it), and where the data set is looked for;
    is_quiet: leave to another process to say where the runs can be seen.
    """

    def __init__(self, assets_dir, is_quiet=False):
        self.stdout = subprocess.DEVNULL if is_quiet else None
        self.assets_dir = Path(assets_dir).absolute()
        self.is_on = bool(config.WANDB_PROJECT) and os.environ.get("WANDB_MODE") != "disabled"
        self.process, self.messages = None, queue.SimpleQueue()

    def __enter__(self):
        return self

    def start_fold(self, fold, run):
        """Begin a fold's run, or go on in it: after `train.resume`. What it has of the history is not logged again."""
        history = fold.newest["history"] if fold.newest else []
        self._start(run, f"fold-{fold.number}", bool(history), {"fold": fold.number})
        for row in history:
            self.log_epoch(row)

    def log_epoch(self, row):
        """Log an epoch's row of the history: after the checkpoint, so that no epoch is logged that a kill undoes."""
        self._tell("log_epoch", row=row)

    def end_fold(self, fold, run, data, paths):
        """Log a tested fold's scores, best weights and mistakes."""
        from model import model_path  # imports torch, which the process that runs wandb does without

        with self._going_on():
            if self.is_on:
                scores = run.state["folds"][str(fold.number)]
                model = str(model_path(paths.models, fold.number).absolute())
                self._tell("log_result", scores=scores, model=model, mistakes=pick_mistakes(fold, data, paths))

    def log_summary(self, run, results, results_dir):
        """Log the cross-validation's summary run; results: as `evaluate.write_report` returns them."""
        with self._going_on():
            if self.is_on:
                chosen = chosen_epochs(results, results_dir)
                self._start(run, "summary", False, {})
                self._tell("log_summary", results=results, chosen=chosen, folder=str(Path(results_dir).absolute()))

    def __exit__(self, kind, *_):
        """Wait for the process's end, FINISH_SECONDS at most."""
        if self.process is None:
            return
        self._tell("end", exit_code=int(kind is not None))
        self.messages.put(None)
        try:
            self.process.wait(FINISH_SECONDS + 1)
            if self.process.returncode not in (0, SAID):
                warn(f"its process has ended with status {self.process.returncode}. {WITHOUT}")
        except subprocess.TimeoutExpired:
            warn(f"not finished after {FINISH_SECONDS} s: given up. `wandb sync` sends what is on the disk")
        finally:
            self.process.kill()  # its wandb-core follows it
            self.process.wait()

    def _start(self, run, part, is_resumed, settings):
        run_id = run.state["run_id"]
        with self._going_on():
            self._tell(
                "start",
                name=part,
                run_id=f"{run_id}-{part}",
                group=run_id,
                config={**run.state["settings"], **settings},
                is_resumed=is_resumed,
                assets_dir=str(self.assets_dir),
                project=config.WANDB_PROJECT,
                entity=config.WANDB_ENTITY or None,
            )

    def _tell(self, what, **details):
        if self.is_on and self.process is None:
            with self._going_on():
                command = [sys.executable, "-m", "services.tracking"]
                # A session of its own: Ctrl-C in the terminal is for train.py.
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=self.stdout, start_new_session=True, cwd=ROOT
                )
                threading.Thread(target=feed, args=(self.process.stdin, self.messages), daemon=True).start()
        if self.is_on:
            self.messages.put((what, details))

    @contextlib.contextmanager
    def _going_on(self):
        try:
            yield
        except Exception as error:
            self.is_on = False
            warn(f"{one_line(error)}. {WITHOUT}")


def feed(pipe, messages):
    """Write messages into a pipe until None comes, then close it. A thread does this: a full pipe holds nobody up."""
    with contextlib.suppress(OSError), pipe:  # the process may be gone
        for message in iter(messages.get, None):
            pickle.dump(message, pipe, protocol=5)
            pipe.flush()


def warn(text, stream=None):
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: Weights & Biases: {text}", file=stream or sys.stderr, flush=True)


def one_line(error):
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def pick_mistakes(fold, data, paths):
    """Return the wrong predictions of a tested fold that the network was surest of: MISTAKES_SHOWN dicts at most."""
    path = paths.results / f"predictions_fold_{fold.number}.csv"
    classes, names, class_ids, probabilities = evaluate.read_prediction_file(path)
    true = np.array([fold.info["class_ids"].index(class_id) for class_id in class_ids])
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != true)
    return [
        {
            "name": names[row],
            "dataset_fold": fold.number + 1,
            "true": classes[true[row]],
            "predicted": classes[predicted[row]],
            "confidence": float(confidence[row]),
            "spectrogram": data.features[fold.test[row], : data.audio.n_mels],  # (n_mels, n_frames) dB
        }
        for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    ]


def chosen_epochs(results, results_dir):
    """Return {"validation_loss_mean", "validation_accuracy_mean"} of the chosen epochs; {} if nothing validated them.

    The value to optimise: the test clips have no part in it.
    """
    columns = {"validation_loss": [], "validation_accuracy": []}
    for row in results["per_fold"]:
        history = evaluate.read_history(results_dir, row["fold"])
        for name, values in columns.items():
            values.append(history[name][history["epoch"] == row["best_epoch"]].item() if history else np.nan)
    means = {f"{name}_mean": float(np.mean(values)) for name, values in columns.items()}
    return {name: mean for name, mean in means.items() if np.isfinite(mean)}


# --- In the process that runs wandb --------------------------------------------------------------------------------


class Follower:
    """Does with wandb what the Tracker tells; its methods are the messages. say, warn: functions of one line."""

    def __init__(self, say, warn):
        self.say, self.warn = say, warn
        self.sweep = {name: os.environ.pop(name, None) for name in SWEEP_VARIABLES}
        self.wandb, self.run, self.mode = None, None, None

    def log_in(self, assets_dir):
        """Import wandb and find out whether it works online, offline or not at all."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ["WANDB_DIR"] = self.root = os.environ.get("WANDB_DIR") or assets_dir
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(self.root) / "wandb"))  # copies of uploads; else in the home
        os.environ.setdefault("WANDB_CACHE_DIR", self.root)  # wandb/logs there
        self.wandb = utils.need("wandb", "Weights & Biases")
        self.mode = self.wandb.setup().settings.mode
        self.folder = Path(self.wandb.setup().settings.wandb_dir)
        self.dataset = utils.folder(None, assets_dir, config.DATASET_DIR)
        if self.mode == "online" and not self.wandb.login(prompt=False, verify=False):
            self.go_offline("no account here (`wandb login`), so")
        elif self.mode == "offline":
            self.go_offline("WANDB_MODE is offline, so")

    def go_offline(self, reason):
        self.mode = "offline"
        self.say(f"Weights & Biases: {reason} the runs stay in {self.folder}; `wandb sync {self.folder}` sends them")

    def start(self, name, run_id, group, config, is_resumed, assets_dir, project, entity):
        """Begin a run or go on in it, after the end of the one before."""
        is_first = self.wandb is None
        if is_first:
            self.log_in(assets_dir)
        self.end(0)
        options = {"sweep_id": self.sweep["WANDB_SWEEP_ID"]} if name == "summary" else {}
        if options.get("sweep_id"):
            run_id = self.sweep["WANDB_RUN_ID"] or run_id
        arguments = {
            "project": project,
            "entity": entity,
            "id": run_id,
            "group": group,
            "name": f"{group} {name}",
            "job_type": "summary" if name == "summary" else "fold",
            "config": config,
            "resume": "allow" if is_resumed else None,  # without it, the id begins anew
            "dir": self.root,
            "reinit": "create_new",
            "settings": self.wandb.Settings(program="train.py", **options),
        }
        try:
            self.run = self.wandb.init(mode=self.mode, **arguments)
        except self.wandb.Error as error:
            if self.mode != "online":
                raise
            self.wandb.teardown()  # forgets the half-started run
            self.go_offline(f"no connection ({one_line(error)}), so")
            self.run = self.wandb.init(mode=self.mode, **arguments)
        if is_first and self.mode == "online":
            self.say(f"Weights & Biases: {self.run.project_url}/groups/{group}")
        self.run.define_metric("epoch")
        for metric in ("learning_rate", "train_*", "validation_*"):
            self.run.define_metric(metric, step_metric="epoch")
        self.logged = self.epochs_there(run_id) if is_resumed else set()

    def epochs_there(self, run_id):
        """Return the epochs that a run has already: online what the server knows, else what the files hold."""
        if self.mode == "online":
            return set(range(1, 1 + int(self.run.summary.get("epoch", 0)))) if self.run.resumed else set()
        epochs = set()
        for start in sorted(map(read_file, self.folder.glob(f"*run-*/run-{run_id}.wandb")), key=started_at):
            epochs = epochs if is_continued(start) else set()  # a run that was begun anew overwrites the one before
            epochs |= {record["history"]["item"].get("epoch") for record in start if record["type"] == "history"}
        return epochs

    def log_epoch(self, row):
        if row["epoch"] not in self.logged:
            self.run.log({name: value for name, value in row.items() if value is not None})
            self.logged.add(row["epoch"])

    def log_result(self, scores, model, mistakes):
        self.run.summary.update({name: scores[name] for name in ("test_accuracy", "test_clips", "best_epoch")})
        artifact = self.wandb.Artifact(f"model-{self.run.id}", "model", metadata=scores)
        artifact.add_file(model)
        self.run.log_artifact(artifact)
        columns = ["name", "true", "predicted", "confidence", "spectrogram", "audio"]
        rows = [[*map(clip.get, columns[:4]), self.picture(clip), self.sound(clip)] for clip in mistakes]
        self.run.log({"mistakes": self.wandb.Table(columns=columns, data=rows)})

    def picture(self, clip):
        """Return a spectrogram as an image, low bands at the bottom."""
        from matplotlib import colormaps

        decibels = clip["spectrogram"][::-1].astype(np.float32)
        span = max(float(np.ptp(decibels)), 1e-3)
        return self.wandb.Image(
            (colormaps["magma"]((decibels - decibels.min()) / span)[..., :3] * 255).astype(np.uint8)
        )

    def sound(self, clip):
        """Return a clip's sound, if its file is there."""
        path = self.dataset / "audio" / f"fold{clip['dataset_fold']}" / clip["name"]
        try:
            samples = audio_reader.read_audio(path, config.SAMPLE_RATE)
        except UserError:
            return None
        return self.wandb.Audio(samples, sample_rate=config.SAMPLE_RATE)

    def log_summary(self, results, chosen, folder):
        plain = {name: value for name, value in results.items() if isinstance(value, int | float | str)}
        table = self.wandb.Table
        scores = ["clips", "precision", "recall", "f1"]
        classes = [[name, *map(row.get, scores)] for name, row in results["per_class"].items()]
        folds = [list(row.values()) for row in results["per_fold"]]
        names = results["class_names"]
        confusion = [[name, *row] for name, row in zip(names, results["confusion_matrix"], strict=True)]
        pictures = {Path(name).stem: name for name in results["files"] if name.endswith(".png")}
        self.run.log(
            {
                **plain,
                **chosen,
                "accuracy_interval_95": results["accuracy_interval_95"],
                "classes": table(columns=["class", *scores], data=classes),
                "folds": table(columns=list(results["per_fold"][0]), data=folds),
                "confusion": table(columns=["true", *(f"as {name}" for name in names)], data=confusion),
                **{stem: self.wandb.Image(str(Path(folder) / name)) for stem, name in pictures.items()},
            }
        )

    def end(self, exit_code):
        if self.run:
            self.run.finish(exit_code)
            self.run = None


def read_file(path):
    """Return the records of a .wandb file, by wandb's own reader, as far as they are whole."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_record(records):
    return next((record["run"] for record in records if record["type"] == "run"), {})


def started_at(records):
    return run_record(records).get("start_time", "")


def is_continued(records):
    return run_record(records).get("resume", False)


def read_messages(pipe, messages, warn):
    """Pass on the messages of a pipe until train.py closes it, or dies. Then end this process, in bounded time."""
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            messages.put(pickle.load(pipe))  # train.py's own, through a pipe that nobody else has
    messages.put(None)
    threading.Event().wait(FINISH_SECONDS)
    warn(f"not finished after {FINISH_SECONDS} s: given up. `wandb sync` sends what is on the disk")
    os._exit(SAID)


def main():
    if sys.stdin.isatty():
        raise UserError("train.py starts this file: set WANDB_PROJECT and run python train.py")
    streams = [os.fdopen(os.dup(number), mode) for number, mode in ((0, "rb"), (1, "w"), (2, "w"))]
    for number in range(3):  # wandb and its service print, and the service keeps what it inherits open
        os.dup2(os.open(os.devnull, os.O_RDWR), number)

    def say(text):
        with contextlib.suppress(OSError):
            print(text, file=streams[1], flush=True)

    def warn_there(text):
        warn(text, streams[2])

    messages = queue.SimpleQueue()
    threading.Thread(target=read_messages, args=(streams[0], messages, warn_there), daemon=True).start()
    follower = Follower(say, warn_there)
    try:
        for what, details in iter(messages.get, None):
            getattr(follower, what)(**details)
        follower.end(1)  # after a kill, when nobody has said the end
        if follower.wandb:
            follower.wandb.teardown()
    except Exception as error:
        warn_there(f"{one_line(error)}. {WITHOUT}")
        os._exit(SAID)  # not by way of wandb's exit hooks, which wait for a service that may be dead
    os._exit(0)


if __name__ == "__main__":
    utils.run(main)
