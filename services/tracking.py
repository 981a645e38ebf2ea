"""Weights & Biases: the only file that knows it. Off until config.py or the environment names WANDB_PROJECT.

    WANDB_PROJECT=urbansound python train.py     # curves, best model and mistakes of each fold
    wandb sync ASSETS/wandb                      # later, where there was no account or no network

One run a fold, in a group that is the cross-validation, and a summary run. Their ids are training_state.json's run_id
with -fold-<k> and -summary, so that a resumed fold continues its own run. The first call that fails ends the log and
nothing else. Training waits for a run to start 30 s at most, and for its last uploads FINISH_SECONDS.
"""

import contextlib
import functools
import os
import sys
import threading
from pathlib import Path

import pandas as pd

import config
import utils
from checkpoint import result_path
from model_file import model_path
from reports import metrics

FINISH_SECONDS = 60  # s that a finished fold waits for its last uploads
STOP_SECONDS = 3  # s that an interrupted training waits
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
}
# What `wandb agent` sets for the one run that it knows: the summary run takes it, not the folds'.
SWEEP_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


def warn(text):
    with contextlib.suppress(OSError):
        print(f"warning: Weights & Biases: {text}", file=sys.stderr, flush=True)


def never_raises(method):
    """Make a Tracker's method one that does nothing if tracking is off, and turns it off with a warning if it fails."""

    @functools.wraps(method)
    def call(self, *arguments):
        if self.is_on:
            try:
                method(self, *arguments)
            except (Exception, SystemExit) as error:  # SystemExit is how wandb reports a service that has failed
                self.is_on = False
                warn(f"{utils.one_line(error) or type(error).__name__}. The training continues without it")

    return call


class Tracker:
    """The runs of one training. Does nothing if WANDB_PROJECT is empty, and never raises.

    assets_dir: where wandb/ goes (WANDB_DIR overrides it); settings: dict, the config of each run.
    """

    def __init__(self, assets_dir, settings, run_id):
        self.assets_dir, self.settings, self.run_id = Path(assets_dir).absolute(), settings, run_id
        self.is_on = bool(config.WANDB_PROJECT) and os.environ.get("WANDB_MODE") != "disabled"
        self.wandb = self.run = None

    @never_raises
    def start_fold(self, number, history):
        """Begin or continue the run of a 0-indexed fold; history: rows of the epochs trained before a resume."""
        self._start(f"fold-{number}", {"fold": number})
        for row in history:  # what a kill has kept from it; wandb ignores the epochs that it has
            self.log_epoch(row)

    @never_raises
    def log_epoch(self, row):
        """Log an epoch's row of the history. Call it after the checkpoint, which a kill does not undo."""
        values = {name: value for name, value in row.items() if value is not None}
        self.run.log(values, step=row["epoch"], commit=True)  # without commit it waits for the next epoch

    @never_raises
    def end_fold(self, fold, paths, scores):
        """Log a tested fold's scores (dict), best weights and the mistakes that the network was surest of."""
        self.run.summary.update(scores)
        artifact = self.wandb.Artifact(f"model-{self.run.id}", "model", metadata=scores)
        artifact.add_file(str(model_path(paths.models, fold.number)))
        self.run.log_artifact(artifact)
        mistakes = pick_mistakes(result_path(paths.results, "predictions", fold.number), fold.info["class_ids"])
        self.run.log({"mistakes": self.wandb.Table(dataframe=mistakes)})
        self._finish()

    @never_raises
    def log_summary(self, results, results_dir):
        """Log the cross-validation as a run of its own; results: dict of results.json."""
        self._start("summary", {})
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

    def close(self, ok=True):
        """End the last run, in FINISH_SECONDS at most, or STOP_SECONDS where training was interrupted (not `ok`)."""
        if not self.wandb:
            return
        seconds = FINISH_SECONDS if ok else STOP_SECONDS
        ending = threading.Thread(target=self._end, args=[int(not ok)], daemon=True)
        ending.start()
        ending.join(seconds)
        if ending.is_alive():
            warn(f"not finished after {seconds} s: given up. `wandb sync` sends what is on the disk")
            leaving = threading.Thread(target=self.wandb.teardown, daemon=True)
            leaving.start()
            leaving.join(1)  # s; enough to remove wandb's exit hook, which would wait without a bound

    def _end(self, exit_code):
        with contextlib.suppress(Exception, SystemExit):
            self._finish(exit_code)
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()

    def _start(self, part, extra_settings):
        """Begin or continue the run of a part ("fold-0", "summary"), after the end of the run before."""
        is_first, is_summary = self.wandb is None, part == "summary"
        if is_first:
            self._log_in()
        self._finish()
        sweep_id = self.sweep["WANDB_SWEEP_ID"] if is_summary else None
        arguments = {
            "project": config.WANDB_PROJECT,
            "entity": config.WANDB_ENTITY or None,
            "id": self.sweep["WANDB_RUN_ID"] if sweep_id else f"{self.run_id}-{part}",
            "group": self.run_id,
            "name": f"{self.run_id} {part}",
            "job_type": "summary" if is_summary else "fold",
            "config": {**self.settings, **extra_settings},
            "resume": None if is_summary else "allow",  # a summary replaces the one before
            "reinit": "create_new",
            "settings": self.wandb.Settings(program="train.py", sweep_id=sweep_id),
        }
        try:
            self.run = self.wandb.init(mode=self.mode, **arguments)
        except self.wandb.Error as error:
            if self.mode != "online":
                raise
            self.wandb.teardown()  # forgets the half-started run
            self._go_offline(f"no connection ({utils.one_line(error)})")
            self.run = self.wandb.init(mode=self.mode, **arguments)
        if self.mode == "online" and is_first:
            print(f"Weights & Biases: {self.run.project_url}/groups/{self.run_id}", flush=True)

    def _log_in(self):
        """Import wandb and find out whether it works online or offline."""
        folder = utils.home_path(os.environ.get("WANDB_DIR") or self.assets_dir)  # a .env file leaves ~ as it is
        os.environ.update({**DEFAULTS, **os.environ, "WANDB_DIR": str(folder)})
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(os.environ["WANDB_DIR"], "wandb")))  # else in the home
        os.environ.setdefault("WANDB_CACHE_DIR", os.environ["WANDB_DIR"])
        self.sweep = {name: os.environ.pop(name, None) for name in SWEEP_VARIABLES}
        self.wandb = utils.need("wandb", "Weights & Biases")
        settings = self.wandb.setup().settings
        self.mode, self.folder = settings.mode, settings.wandb_dir
        if self.mode == "offline":
            self._go_offline("WANDB_MODE is offline")
        elif not self.wandb.login(prompt=False, verify=False):
            self._go_offline("no account here (`wandb login`)")

    def _go_offline(self, reason):
        self.mode, folder = "offline", self.folder.rstrip("/")
        print(f"Weights & Biases: {reason}, so the runs stay in {folder}; `wandb sync {folder}` sends them", flush=True)

    def _finish(self, exit_code=0):
        if self.run:
            self.run.finish(exit_code)
            self.run = None


def pick_mistakes(path, class_ids):
    """Return the wrong predictions in a file that the network was surest of, as a DataFrame of MISTAKES_SHOWN rows.

    class_ids: of the classes in the order of the file's columns.
    """
    classes, names, truth, probabilities = metrics.read_prediction_file(path)
    by_id = dict(zip(class_ids, classes, strict=True))
    clips = pd.DataFrame({"name": names, "true": [by_id[class_id] for class_id in truth]})
    clips["predicted"] = [classes[index] for index in probabilities.argmax(axis=1)]
    clips["confidence"] = probabilities.max(axis=1)
    return clips[clips["true"] != clips["predicted"]].nlargest(MISTAKES_SHOWN, "confidence")


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
