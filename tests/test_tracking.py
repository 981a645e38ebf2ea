"""Weights & Biases by the real client, through train.py: offline, resumed, broken in several ways, in a sweep."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from run_files import assert_same_files

RESULT_FILES = "checkpoints/|models/|results/"
NO_SERVER = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """The environment of a run that is tracked and has no account, whoever runs the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**env, "HOME": str(tmp_path_factory.mktemp("home")), "WANDB_PROJECT": "my project"}


@pytest.fixture(scope="module")
def start(data, scripts):
    """A function that starts train.py and returns its Run."""

    def start(folder, env, folds="0", epochs=2):
        flags = ("--folds", folds, "--epochs", epochs, "--batch_size", 8)
        return scripts.start("train", "--processed_dir", data, "--assets_dir", folder, *flags, env=env)

    return start


def read_runs(assets):
    """Return {run id: [{record type: [records]}, a file each, by start]} of a wandb folder, by `wandb leet inspect`."""
    from wandb.util import get_core_path

    reader, runs = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"], {}
    for path in sorted(assets.glob("wandb/*run-*/run-*.wandb")):
        by_type = {}
        done = subprocess.run([*reader, path, path.parent.parent], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            by_type.setdefault(record["type"], []).append(record.get(record["type"]))
        runs.setdefault(path.stem.removeprefix("run-"), []).append(by_type)
    return runs


def rows_of(files):
    """Return the rows of the epochs that a run's files hold."""
    items = [record["item"] for file in files for record in file.get("history", [])]
    return [item for item in items if "epoch" in item]


def summary_of(files):
    return {name: value for file in files for record in file["summary"] for name, value in record["update"].items()}


def state_of(assets):
    return json.loads((assets / "checkpoints" / "training_state.json").read_text())


def wandb_lines(text):
    return [line for line in text.splitlines() if "wandb" in line.lower() or "Weights & Biases" in line]


# --- A whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(start, env, tmp_path_factory):
    """The folder of a run without Weights & Biases."""
    folder = tmp_path_factory.mktemp("plain")
    done = start(folder, {**env, "WANDB_PROJECT": ""}).wait()
    assert (done.returncode, wandb_lines(done.stdout + done.stderr)) == (0, [])
    assert not (folder / "wandb").exists()
    return folder


@pytest.fixture(scope="module")
def tracked(start, env, tmp_path_factory):
    """(folder, output) of a run of two folds, tracked."""
    folder = tmp_path_factory.mktemp("tracked")
    return folder, start(folder, env, "0,1").wait()


@pytest.fixture(scope="module")
def runs(tracked):
    return read_runs(tracked[0])


def test_no_account_is_one_line_with_the_remedy(tracked, env):
    folder = tracked[0] / "wandb"
    remedy = f"so the runs stay in {folder}; `wandb sync {folder}` sends them"
    assert wandb_lines(tracked[1].stdout) == [f"Weights & Biases: no account here (`wandb login`), {remedy}"]
    assert wandb_lines(tracked[1].stderr) == []
    assert not list(Path(env["HOME"]).rglob("*wandb*"))


def test_results_are_those_of_a_run_without_it(tracked, plain):
    assert_same_files(tracked[0], plain, "fold_0")


def test_runs_are_one_group_with_the_settings(tracked, runs):
    state = state_of(tracked[0])
    assert set(runs) == {f"{state['run_id']}-{part}" for part in ("fold-0", "fold-1", "summary")}
    for name, (file,) in runs.items():
        (run,) = file["run"]
        job = "summary" if name.endswith("summary") else "fold"
        assert (run["project"], run["run_group"], run["job_type"]) == ("my project", state["run_id"], job)
        assert state["settings"].items() <= run["config"]["update"].items()
        assert "git" not in run
        epochs = [(row["epoch"], row["_step"]) for row in rows_of([file])]
        assert epochs == ([] if job == "summary" else [(1, 1), (2, 2)])


def test_fold_run_has_scores_best_weights_and_mistakes(tracked, runs):
    state = state_of(tracked[0])
    files, scores = runs[f"{state['run_id']}-fold-0"], state["folds"]["0"]
    summary = summary_of(files)
    assert {name: summary[name] for name in ("test_accuracy", "test_clips", "best_epoch")}.items() <= scores.items()
    artifacts = {artifact["type"]: artifact["manifest"]["contents"] for artifact in files[0]["artifact"]}
    (weights,) = artifacts["model"]
    with open(weights["local_path"], "rb") as copy:
        assert copy.read() == (tracked[0] / "models" / "model_fold_0_best.safetensors").read_bytes()

    (mistakes,) = artifacts["run_table"]
    with open(mistakes["local_path"]) as file:
        table = json.load(file)
    assert table["columns"] == ["name", "true", "predicted", "confidence"]
    assert len(table["data"]) == round((1 - scores["test_accuracy"]) * scores["test_clips"]) > 0
    for name, true, predicted, confidence in table["data"]:
        assert true == ("dog_bark", "siren")[int(name.split("-")[1])] != predicted
        assert 0.5 <= confidence <= 1


def test_summary_run_is_the_report_and_the_chosen_epochs(tracked, runs):
    results = json.loads((tracked[0] / "results" / "results.json").read_text())
    run_id = state_of(tracked[0])["run_id"]
    summary = summary_of(runs[f"{run_id}-summary"])
    assert {name: summary[name] for name in ("accuracy_mean", "accuracy_std", "protocol")}.items() <= results.items()
    assert {"classes", "folds", "confusion_matrix", "per_class"} <= {name.split(".")[0] for name in summary}
    best = [rows_of(runs[f"{run_id}-fold-{row['fold']}"])[row["best_epoch"] - 1] for row in results["per_fold"]]
    for name in ("validation_loss", "validation_accuracy"):
        assert summary[f"{name}_mean"] == pytest.approx(np.mean([row[name] for row in best]))


def test_off_does_not_import_wandb(env):
    use = "tracker = train.events.tracking.Tracker('.', {}, 'id'); tracker.start_fold(0, []); tracker.close()"
    other = f"train.config.WANDB_PROJECT = 'x'; os.environ['WANDB_MODE'] = 'disabled'; {use}"
    program = f"import os, sys, train; {use}; {other}; sys.exit('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env={**env, "WANDB_PROJECT": ""})
    assert done.returncode == 0


# --- Stopped and resumed -------------------------------------------------------------------------------------------


def wait_for(run, text):
    while text not in run.printed():
        assert not run.ended(), run.printed() + run.printed("stderr")
        time.sleep(0.05)


def test_resumed_fold_has_every_epoch_in_its_last_file(start, env, tmp_path):
    for sent, status, epoch in ((signal.SIGKILL, -9, 2), (signal.SIGINT, 130, 4)):
        run = start(tmp_path, env, epochs=6)
        wait_for(run, f"epoch {epoch}/6")
        run.kill(sent)
        assert run.wait().returncode == status
    assert start(tmp_path, env, epochs=6).wait().returncode == 0
    _, *resumed = read_runs(tmp_path)[f"{state_of(tmp_path)['run_id']}-fold-0"]
    epochs = [[(row["epoch"], row["_step"]) for row in rows_of([file])] for file in resumed]
    assert epochs == [[(n, n) for n in range(1, len(rows) + 1)] for rows in epochs]
    assert len(epochs[0]) >= 4 and len(epochs[1]) == 6  # after the kill, and after Ctrl-C
    assert [file["run"][0]["resume"] for file in resumed] == [True, True]


# --- What can go wrong: one line, and the results of a run without it ------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({**NO_SERVER, "WANDB_INIT_TIMEOUT": "1"}, "no connection"),
    ],
    ids=["invalid key", "no server"],
)
def test_no_connection_is_one_line(start, env, plain, tmp_path, variables, line):
    done = start(tmp_path, {**env, **variables}).wait()
    (found,) = wandb_lines(done.stdout + done.stderr)
    assert line in found
    assert_same_files(tmp_path, plain, RESULT_FILES)


@pytest.mark.parametrize("folder, place", [("~/runs", "home/runs/wandb"), ("", "assets/wandb")])
def test_wandb_dir_with_tilde_or_empty_is_where_it_is_meant(env, tmp_path, folder, place):
    for name in ("home/runs", "assets", "here"):
        (tmp_path / name).mkdir(parents=True)
    program = "import sys; from services import tracking; tracking.Tracker(sys.argv[1], {}, 'id').start_fold(0, [])"
    more = {"HOME": str(tmp_path / "home"), "WANDB_DIR": folder, "WANDB_MODE": "offline", "PYTHONPATH": REPOSITORY}
    command = [sys.executable, "-c", program, tmp_path / "assets"]
    printed = subprocess.check_output(command, cwd=tmp_path / "here", env={**env, **more}, text=True)
    assert f"the runs stay in {tmp_path / place}" in printed and not list((tmp_path / "here").iterdir())


def test_wandb_that_raises_is_one_line(start, env, tmp_path):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('no wandb today')")
    done = start(tmp_path / "run", {**env, "PYTHONPATH": str(tmp_path)}, epochs=1).wait()
    assert done.stderr == "warning: Weights & Biases: no wandb today. The training continues without it\n"
    assert done.returncode == 0


def service_of(folder):
    """Return the process id of the wandb-core that a run in this folder has started."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            command, environ = (Path("/proc", pid, name).read_bytes() for name in ("cmdline", "environ"))
            if b"wandb-core" in command and f"WANDB_DIR={folder}\0".encode() in environ:
                return int(pid)
    raise AssertionError("no wandb-core runs")


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_service_costs_one_line(start, env, plain, tmp_path):
    run = start(tmp_path, {**env, "WANDB_MODE": "offline"})
    wait_for(run, "WANDB_MODE is offline, so the runs stay in")
    os.kill(service_of(tmp_path), signal.SIGKILL)
    done = run.wait()
    (line,) = wandb_lines(done.stderr)
    assert line.startswith("warning: Weights & Biases: ")
    assert line.endswith("The training continues without it")
    assert_same_files(tmp_path, plain, RESULT_FILES)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_frozen_service_does_not_hold_up_ctrl_c(start, env, tmp_path):
    run = start(tmp_path, env, epochs=1000)
    wait_for(run, "epoch 2/1000")
    service = service_of(tmp_path)
    os.kill(service, signal.SIGSTOP)
    run.kill(signal.SIGINT)
    done = run.wait()
    os.kill(service, signal.SIGCONT)  # it then sees that its run has ended
    assert done.returncode == 130
    assert "not finished after 3 s: given up" in done.stderr


# --- A sweep -------------------------------------------------------------------------------------------------------


def test_sweep_runs_train_py_as_it_is(data, scripts, env, words_of_python, tmp_path):
    """The agent's own code makes the command from sweep.yaml; the second point, as an agent's shell runs it."""
    from wandb.sdk.launch.sweeps import utils as sweeps

    sweep = sweeps.load_sweep_config(str(REPOSITORY / "research" / "sweep.yaml"))
    assert sweep["metric"]["name"] == "validation_accuracy_mean"
    point = {name: {"value": values["values"][0]} for name, values in sweep["parameters"].items() if "values" in values}
    point |= {"learning_rate": {"value": 0.00123}, "epochs": {"value": 1}}
    sweeps.create_sweep_command(sweep["command"])  # the first point's, which fills in its variables for good
    template = sweeps.create_sweep_command(sweep["command"])
    parts = {**sweeps.create_sweep_command_args({"args": point}), "env": ["/usr/bin/env"], "program": ["train.py"]}
    command = [word for part in template for word in parts.get(part[2:-1], [part])]
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "point2", "SWEEP_DATA": str(data), "SWEEP_DIR": str(tmp_path)}
    agent = {**env, **agent, **words_of_python}
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, env=agent)
    script, *flags = done.stdout.splitlines()
    assert script == "train.py" and scripts.run("train", *flags, env=agent).returncode == 0
    runs, state = read_runs(tmp_path / "point2"), state_of(tmp_path / "point2")
    assert {name: value["value"] for name, value in point.items()}.items() <= state["settings"].items()
    assert {name: file["run"][0].get("sweep_id") for name, (file,) in runs.items()} == {
        f"{state['run_id']}-fold-0": None,
        f"{state['run_id']}-fold-1": None,
        "point2": "sweep1",
    }
    assert "validation_accuracy_mean" in summary_of(runs["point2"])
