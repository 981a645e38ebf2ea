"""Weights & Biases: the only file that knows it. Off until config.py or the environment names WANDB_PROJECT.

    WANDB_PROJECT=urbansound python train.py     # curves, best model and mistakes of each fold
    wandb sync ASSETS/wandb                      # later, where there was no account or no network

One run a fold, in a group that is the cross-validation, and a summary run. Their ids are training_state.json's run_id
with -fold-<k> and -summary, so that a resumed fold continues its own run. One thread makes all calls of wandb, in
order: training waits for none of them, Ctrl-C interrupts none, and the first that fails ends the log and nothing else.
"""

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd

import checkpoint
import config
import utils
from audio import read_audio
from model import model_path
from reports import metrics
from utils import UserError

FINISH_SECONDS = 60  # s that a finished training waits for the last uploads
STOP_SECONDS = 3  # s that an interrupted one waits
MISTAKES_SHOWN = 20  # wrongly classified clips in a fold's table
# wandb's settings, as its environment variables: what is set already stays. Only what is logged here is sent.
DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "30",  # s for a run to start; without a network it continues offline then
    "WANDB_FINISH_TIMEOUT": str(FINISH_SECONDS),
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # s; its own default would lose 15 s to a power cut
}
# What `wandb agent` sets for the one run that it knows: the summary run takes it, not the folds'.
SWEEP_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


def in_thread(method):
    """Make a Tracker's method one that its thread calls, after the calls before it."""

    @functools.wraps(method)
    def call(self, *arguments):
        if self.is_on:
            self.calls.put((method, arguments))

    return call


class Tracker:
    """The runs of one training. Does nothing if WANDB_PROJECT is empty, and never raises.

    assets_dir: where wandb/ goes (WANDB_DIR overrides it), and where the data set is looked for; settings: dict, the
    config of each run; is_quiet: leave it to another process to print where the runs can be seen.
    """

    def __init__(self, assets_dir, settings, run_id, is_quiet=False):
        self.assets_dir, self.settings, self.run_id = Path(assets_dir).absolute(), settings, run_id
        self.is_on = bool(config.WANDB_PROJECT) and os.environ.get("WANDB_MODE") != "disabled"
        self.is_quiet, self.wandb, self.run = is_quiet, None, None
        self.calls, self.thread = queue.SimpleQueue(), threading.Thread(target=self._work, daemon=True)
        if self.is_on:
            self.thread.start()

    def start_fold(self, number, history):
        """Begin or continue the run of a 0-indexed fold; history: rows of the epochs trained before a resume."""
        self._start(f"fold-{number}", {"fold": number})
        for row in history:
            self.log_epoch(row)

    @in_thread
    def log_epoch(self, row):
        """Log an epoch's row of the history, once: call it after the checkpoint, which a kill does not undo."""
        if row["epoch"] not in self.logged:
            values = {name: value for name, value in row.items() if value is not None}
            self.run.log(values, step=row["epoch"], commit=True)  # without commit it waits for the next epoch

    @in_thread
    def end_fold(self, fold, data, paths):
        """Log a tested fold's scores, best weights and mistakes; data: the Processed data set."""
        entry = utils.load_json(paths.checkpoints / "training_state.json")["folds"][str(fold.number)]
        self.run.summary.update({name: entry[name] for name in ("test_accuracy", "test_clips", "best_epoch")})
        artifact = self.wandb.Artifact(f"model-{self.run.id}", "model", metadata=entry)
        artifact.add_file(str(model_path(paths.models, fold.number)))
        self.run.log_artifact(artifact)
        mistakes = pick_mistakes(fold, data, paths.results, utils.folder(None, self.assets_dir, config.DATASET_DIR))
        mistakes["spectrogram"] = mistakes["spectrogram"].map(self._picture)
        mistakes["audio"] = mistakes["audio"].map(self._sound)
        columns, rows = list(mistakes), mistakes.to_numpy(object).tolist()
        self.run.log({"mistakes": self.wandb.Table(columns=columns, data=rows)})
        self._finish()

    def log_summary(self, results, results_dir):
        """Log the cross-validation as a run of its own; results: dict of results.json."""
        self._start("summary", {})
        self._log_summary(results, Path(results_dir))

    def close(self, ok=True):
        """End the last run, in FINISH_SECONDS at most, or STOP_SECONDS where training was interrupted (not `ok`)."""
        seconds = FINISH_SECONDS if ok else STOP_SECONDS
        self._end(int(not ok))
        if self.is_on:
            self.thread.join(seconds)
        if self.thread.is_alive():
            warn(f"not finished after {seconds} s: given up. `wandb sync` sends what is on the disk")
            leaving = threading.Thread(target=self._tear_down, daemon=True)
            leaving.start()
            leaving.join(1)  # s; enough to remove wandb's exit hook, which would wait without a bound

    # --- In the thread -------------------------------------------------------------------------------------------

    def _work(self):
        """Make the calls, until the last one or the first that fails."""
        try:
            for method, arguments in iter(self.calls.get, None):
                method(self, *arguments)
        except Exception as error:
            self.is_on = False
            warn(f"{utils.one_line(error) or type(error).__name__}. The training continues without it")
        self._tear_down()

    def _tear_down(self):
        with contextlib.suppress(Exception, SystemExit):  # SystemExit is how wandb reports a service that has failed
            self.wandb.teardown()

    @in_thread
    def _start(self, part, extra_settings):
        """Begin or continue the run of a part ("fold-0", "summary"), after the end of the run before."""
        is_first, is_summary = self.wandb is None, part == "summary"
        if is_first:
            self._log_in()
        self._finish()
        sweep_id = self.sweep["WANDB_SWEEP_ID"] if is_summary else None
        run_id = self.sweep["WANDB_RUN_ID"] if sweep_id else f"{self.run_id}-{part}"
        arguments = {
            "project": config.WANDB_PROJECT,
            "entity": config.WANDB_ENTITY or None,
            "id": run_id,
            "group": self.run_id,
            "name": f"{self.run_id} {part}",
            "job_type": "summary" if is_summary else "fold",
            "config": {**self.settings, **extra_settings},
            "resume": None if is_summary else "allow",  # a summary replaces the one before
            "reinit": "create_new",
            "settings": self.wandb.Settings(program="train.py", sweep_id=sweep_id),
        }
        self.logged = set().union(*map(epochs_in, self.folder.glob(f"*run-*/run-{run_id}.wandb")))
        try:
            self.run = self.wandb.init(mode=self.mode, **arguments)
        except self.wandb.Error as error:
            if self.mode != "online":
                raise
            self.wandb.teardown()  # forgets the half-started run
            self._go_offline(f"no connection ({utils.one_line(error)})")
            self.run = self.wandb.init(mode=self.mode, **arguments)
        if self.mode == "online":
            self.logged = set(range(self.run.step))  # those that the server has
            if is_first:
                self._say(f"{self.run.project_url}/groups/{self.run_id}")

    def _log_in(self):
        """Import wandb and find out whether it works online or offline."""
        os.environ.update({"WANDB_DIR": str(self.assets_dir), **DEFAULTS, **os.environ})
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(os.environ["WANDB_DIR"], "wandb")))  # else in the home
        os.environ.setdefault("WANDB_CACHE_DIR", os.environ["WANDB_DIR"])
        self.sweep = {name: os.environ.pop(name, None) for name in SWEEP_VARIABLES}
        self.wandb = utils.need("wandb", "Weights & Biases")
        settings = self.wandb.setup().settings
        self.mode, self.folder = settings.mode, Path(settings.wandb_dir)
        if self.mode == "offline":
            self._go_offline("WANDB_MODE is offline")
        elif not self.wandb.login(prompt=False, verify=False):
            self._go_offline("no account here (`wandb login`)")

    def _go_offline(self, reason):
        self.mode = "offline"
        self._say(f"{reason}, so the runs stay in {self.folder}; `wandb sync {self.folder}` sends them")

    def _say(self, text):
        if not self.is_quiet:
            print(f"Weights & Biases: {text}", flush=True)

    def _finish(self, exit_code=0):
        if self.run:
            self.run.finish(exit_code)
            self.run = None

    @in_thread
    def _end(self, exit_code):
        self._finish(exit_code)
        self.calls.put(None)

    def _picture(self, spectrogram):
        """Return a log-mel, (n_mels, n_frames) in dB, as a grey image, low bands at the bottom."""
        decibels = spectrogram[::-1].astype(np.float32)
        span = max(float(np.ptp(decibels)), 1e-3)  # dB
        return self.wandb.Image((255 * (decibels - decibels.min()) / span).astype(np.uint8))

    def _sound(self, path):
        """Return a clip as sound that a browser plays; None where its file is missing or can't be read."""
        try:
            return self.wandb.Audio(read_audio(path, config.SAMPLE_RATE), sample_rate=config.SAMPLE_RATE)
        except UserError:
            return None

    @in_thread
    def _log_summary(self, results, results_dir):
        classes = pd.DataFrame.from_dict(results["per_class"], orient="index").reset_index(names="class")
        pictures = [results_dir / name for name in results["files"] if name.endswith(".png")]  # confusion_matrix, ...
        self.run.log(
            {
                **{name: value for name, value in results.items() if isinstance(value, int | float | str)},
                **chosen_epochs(results, results_dir),
                "classes": self.wandb.Table(dataframe=classes),
                "folds": self.wandb.Table(dataframe=pd.DataFrame(results["per_fold"])),
                **{path.stem: self.wandb.Image(str(path)) for path in pictures},
            }
        )


def warn(text):
    with contextlib.suppress(OSError):
        print(f"warning: Weights & Biases: {text}", file=sys.stderr, flush=True)


def epochs_in(path):
    """Return the epochs that a .wandb file holds, by wandb's own reader, as far as the file is whole."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    records = map(json.loads, done.stdout.splitlines())
    return {record["history"]["item"].get("epoch") for record in records if record["type"] == "history"}


def pick_mistakes(fold, data, results_dir, dataset_dir):
    """Return the wrong predictions of a tested fold that the network was surest of, as a DataFrame of MISTAKES_SHOWN.

    Columns: name, true, predicted, confidence, spectrogram ((n_mels, n_frames) in dB), audio (path, or no such file).
    """
    path = checkpoint.result_path(results_dir, "predictions", fold.number)
    classes, names, class_ids, probabilities = metrics.read_prediction_file(path)
    by_id = dict(zip(fold.info["class_ids"], classes, strict=True))
    clips = pd.DataFrame({"name": names, "true": [by_id[class_id] for class_id in class_ids]})
    clips["predicted"] = np.array(classes)[probabilities.argmax(axis=1)]
    clips["confidence"] = probabilities.max(axis=1)
    wrong = clips[clips["true"] != clips["predicted"]].sort_values("confidence", ascending=False, kind="stable")
    wrong = wrong.head(MISTAKES_SHOWN)
    wrong["spectrogram"] = [data.features[fold.test[row]] for row in wrong.index]
    wrong["audio"] = [dataset_dir / "audio" / f"fold{fold.number + 1}" / name for name in wrong["name"]]
    return wrong


def chosen_epochs(results, results_dir):
    """Return {"validation_loss_mean", "validation_accuracy_mean"} of the chosen epochs; {} if nothing validated them.

    The value for a sweep to optimise: the test clips have no part in it.
    """
    chosen = []
    for row in results["per_fold"]:
        history = pd.DataFrame(metrics.read_history(results_dir, row["fold"]))
        chosen.append(history[history["epoch"] == row["best_epoch"]])
    means = pd.concat(chosen)[["validation_loss", "validation_accuracy"]].mean().dropna()
    return {f"{name}_mean": float(mean) for name, mean in means.items()}
