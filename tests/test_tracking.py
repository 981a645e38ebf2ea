"""Weights & Biases, by the real client: offline, with a dead server, a killed service, a full disk, in a sweep."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from warm_start import WarmScripts

import check_config
import config
from services import tracking

SETTINGS = ("--batch_size", "8", "--validation", "none")
ROW = {"train_loss": 0.5, "validation_loss": None}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    """No account and no settings of whoever runs the tests, and a mark by which a test's processes are found."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("TRACKING_TEST", mark := os.urandom(8).hex())
    yield mark
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    wait_for(lambda: not processes(mark), "these processes outlive the run: " + str(processes(mark)))


def processes(mark, part=""):
    """Return {pid: command} of the live processes that a test has started."""
    found = {}
    for folder in os.listdir("/proc") if sys.platform == "linux" else []:
        if not folder.isdigit() or int(folder) == os.getpid():
            continue
        try:
            with open(f"/proc/{folder}/environ", "rb") as file:
                is_ours = f"TRACKING_TEST={mark}".encode() in file.read()
            with open(f"/proc/{folder}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if is_ours and part in command and command:  # a zombie has no command
            found[int(folder)] = command
    return found


def wait_for(is_so, otherwise):
    limit = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < limit, otherwise
        time.sleep(0.05)


def read_runs(folder):
    """Return {run id: [{type: [records]}, a file each, by start]} of a wandb folder, by wandb's own reader."""
    runs, paths = {}, sorted(folder.glob("*run-*/run-*.wandb"))
    with ThreadPoolExecutor() as pool:
        for path, records in zip(paths, pool.map(tracking.read_file, paths), strict=True):
            by_type = {}
            for record in records:
                by_type.setdefault(record["type"], []).append(record.get(record["type"]))
            runs.setdefault(path.stem.removeprefix("run-"), []).append(by_type)
    return runs


def epochs_of(files):
    return [item["epoch"] for file in files for item in items(file) if "epoch" in item]


def items(file):
    return [record["item"] for record in file.get("history", [])]


def summary_of(files):
    return {name: value for file in files for record in file["summary"] for name, value in record["update"].items()}


@pytest.fixture(scope="module")
def tracked_scripts(tmp_path_factory):
    """As `scripts`, for runs that are tracked."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_PROJECT", "p")
        patch.setenv("TRACKING_TEST", "warm")
        scripts = WarmScripts(tmp_path_factory.mktemp("tracked")).__enter__()
    yield scripts
    scripts.__exit__()


def train(scripts, data, folder, *flags):
    scripts.start("train", "--processed_dir", data, "--assets_dir", folder, *SETTINGS, *flags)


# --- A whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tmp_path_factory.mktemp("assets")


@pytest.fixture(scope="module")
def tracked(data, assets, tracked_scripts):
    """A tracked run of two folds, with sound files of one fold's clips in 24 bit."""
    sounds = assets / "tracked" / config.DATASET_DIR / "audio" / "fold1"
    sounds.mkdir(parents=True)
    for index in range(8):
        soundfile.write(sounds / f"{index}-{index % 2}-0-0.wav", np.zeros((4410, 2)), 44100, subtype="PCM_24")
    train(tracked_scripts, data, assets / "tracked", "--folds", "0,1", "--epochs", "1")
    done = tracked_scripts.wait()
    assert done.returncode == 0, done.stderr
    state = json.loads((assets / "tracked" / "checkpoints" / "training_state.json").read_text())
    return SimpleNamespace(done=done, state=state, runs=read_runs(assets / "tracked" / "wandb"))


def test_no_account_is_said_once_with_the_remedy(tracked, assets):
    folder = assets / "tracked" / "wandb"
    (line,) = [line for line in tracked.done.stdout.splitlines() if "Weights & Biases" in line]
    assert line == (
        f"Weights & Biases: no account here (`wandb login`), so the runs stay in {folder}; `wandb sync {folder}` sends "
        "them"
    )
    assert "wandb" not in tracked.done.stderr
    assert not (assets / ".config").exists()
    assert not (assets / ".cache").exists()


def test_one_run_a_fold_and_a_summary_in_one_group(tracked):
    run_id, settings = tracked.state["run_id"], tracked.state["settings"]
    assert set(tracked.runs) == {f"{run_id}-fold-0", f"{run_id}-fold-1", f"{run_id}-summary"}
    for name, (file,) in tracked.runs.items():
        (run,) = file["run"]
        is_fold = "fold" in name
        assert (run["run_group"], run["job_type"]) == (run_id, "fold" if is_fold else "summary")
        assert settings.items() <= run["config"]["update"].items()
        assert "git" not in run
        assert epochs_of([file]) == ([1] if is_fold else [])
        steps = {metric.get("glob_name") or metric["name"]: metric.get("step_metric") for metric in file["metric"]}
        assert steps == {"epoch": None, "learning_rate": "epoch", "train_*": "epoch", "validation_*": "epoch"}


def test_fold_run_has_scores_best_weights_and_mistakes(tracked, assets):
    files = tracked.runs[f"{tracked.state['run_id']}-fold-0"]
    scores = tracked.state["folds"]["0"]
    summary = summary_of(files)
    assert {name: summary[name] for name in ("test_accuracy", "best_epoch")}.items() <= scores.items()
    artifacts = {artifact["type"]: artifact for artifact in files[0]["artifact"]}
    (weights,) = artifacts["model"]["manifest"]["contents"]
    assert weights["path"] == "model_fold_0_best.safetensors"
    with open(weights["local_path"], "rb") as copy:
        assert copy.read() == (assets / "tracked" / "models" / weights["path"]).read_bytes()

    paths = {content["path"]: content["local_path"] for content in artifacts["run_table"]["manifest"]["contents"]}
    with open(paths["mistakes.table.json"]) as file:
        table = json.load(file)
    assert table["columns"] == ["name", "true", "predicted", "confidence", "spectrogram", "audio"]
    wrong = round((1 - scores["test_accuracy"]) * scores["test_clips"])
    assert len(table["data"]) == wrong > 0
    for name, true, predicted, confidence, spectrogram, audio in table["data"]:
        assert true == ("dog_bark", "siren")[int(name.split("-")[1])] != predicted
        assert 0.5 <= confidence <= 1
        assert (spectrogram["height"], spectrogram["width"]) == (128, 173)
        samples, rate = soundfile.read(paths[audio["path"]])
        assert (rate, len(samples)) == (22050, 2205)


def test_summary_run_is_the_report(tracked, assets):
    results = json.loads((assets / "tracked" / "results" / "results.json").read_text())
    files = tracked.runs[f"{tracked.state['run_id']}-summary"]
    summary = summary_of(files)
    assert (summary["accuracy_mean"], summary["accuracy_std"]) == (results["accuracy_mean"], results["accuracy_std"])
    assert summary["protocol"] == "none"
    assert "validation_accuracy_mean" not in summary
    for part in ("classes", "folds", "confusion", "confusion_matrix", "per_class"):
        assert any(name.split(".")[0] == part for name in summary), part


def test_results_are_those_of_a_run_without_it(tracked, data, assets, scripts):
    train(scripts, data, assets / "plain", "--folds", "0,1", "--epochs", "1")
    done = scripts.wait()
    assert done.returncode == 0, done.stderr
    names = [f"{kind}_fold_{fold}.csv" for kind in ("predictions", "history") for fold in (0, 1)]
    files = [f"results/{name}" for name in (*names, "results.json")]
    files += [f"models/model_fold_{fold}_best.safetensors" for fold in (0, 1)]
    for name in files:
        assert (assets / "plain" / name).read_bytes() == (assets / "tracked" / name).read_bytes(), name
    assert "Weights & Biases" not in done.stdout + done.stderr
    assert not (assets / "plain" / "wandb").exists()


def test_off_by_default_and_then_not_imported():
    program = "import sys, config, train; print(repr(config.WANDB_PROJECT), 'wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "'' False\n", done.stderr


# --- Resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_resumed_fold_is_one_run_with_every_epoch_once(data, tmp_path, tracked_scripts, sent):
    flags = ("--folds", "0", "--epochs", "4")
    train(tracked_scripts, data, tmp_path, *flags)
    wait_for(lambda: "epoch 2/4" in tracked_scripts.printed(), "no second epoch")
    os.kill(tracked_scripts.child, sent)
    tracked_scripts.wait()
    for part in ("services.tracking", "wandb-core"):
        wait_for(lambda part=part: not processes("warm", part), f"{part} outlives its run")
    train(tracked_scripts, data, tmp_path, *flags)
    done = tracked_scripts.wait()
    assert done.returncode == 0, done.stderr
    assert re.search("going on after epoch [23] of 4", done.stdout)
    runs = read_runs(tmp_path / "wandb")
    state = json.loads((tmp_path / "checkpoints" / "training_state.json").read_text())
    files = runs[f"{state['run_id']}-fold-0"]
    assert len(files) == 2
    assert epochs_of(files) == [1, 2, 3, 4]
    assert files[1]["run"][0]["resume"] is True
    artifacts = [artifact["type"] for file in files for artifact in file.get("artifact", [])]
    assert artifacts.count("model") == 1


# --- What can go wrong, told by the Tracker alone --------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(config, "WANDB_PROJECT", "p")
    return SimpleNamespace(state={"run_id": "abcd1234", "settings": {"seed": 0}, "folds": {}})


def history(n_epochs):
    return [{"epoch": epoch, **ROW} for epoch in range(1, n_epochs + 1)]


def fold_after(n_epochs):
    return SimpleNamespace(number=0, newest={"history": history(n_epochs)} if n_epochs else None)


def follow(folder, run, before, epochs):
    with tracking.Tracker(folder) as tracker:
        tracker.start_fold(fold_after(before), run)
        for row in history(epochs)[before:]:
            tracker.log_epoch(row)


def test_epochs_that_a_damaged_file_lacks_are_logged_again(run, tmp_path):
    follow(tmp_path, run, 0, 3)
    (path,) = (tmp_path / "wandb").glob("*run-*/run-*.wandb")
    whole = path.read_bytes()
    last = whole.rindex(b"train_loss")  # in the last epoch's record
    path.write_bytes(whole[: last + 4])
    assert epochs_of(read_runs(tmp_path / "wandb")["abcd1234-fold-0"]) == [1, 2]
    follow(tmp_path, run, 3, 4)
    assert epochs_of(read_runs(tmp_path / "wandb")["abcd1234-fold-0"]) == [1, 2, 3, 4]


def test_fold_that_begins_anew_logs_all_its_epochs(run, tmp_path):
    follow(tmp_path, run, 0, 2)
    follow(tmp_path, run, 0, 1)
    follow(tmp_path, run, 1, 2)
    first, second, third = read_runs(tmp_path / "wandb")["abcd1234-fold-0"]
    assert [epochs_of([file]) for file in (first, second, third)] == [[1, 2], [1], [2]]
    assert "resume" not in second["run"][0]


def one_warning(capfd):
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("warning: Weights & Biases: ")
    return line


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def started(folder):
    wait_for(lambda: list((folder / "wandb").glob("*run-*/run-*.wandb")), "no run started")


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_service_costs_the_log_and_one_line(run, tmp_path, no_account, capfd):
    with tracking.Tracker(tmp_path) as tracker:
        tracker.start_fold(fold_after(0), run)
        started(tmp_path)
        for pid in processes(no_account, "wandb-core"):
            kill(pid)
        for row in history(5):
            tracker.log_epoch(row)
            time.sleep(0.1)
    assert tracking.WITHOUT in one_warning(capfd)


def test_killed_process_costs_the_log_and_one_line(run, tmp_path, capfd):
    with tracking.Tracker(tmp_path) as tracker:
        tracker.start_fold(fold_after(0), run)
        started(tmp_path)
        kill(tracker.process.pid)
        for row in history(5):
            tracker.log_epoch(row)
    assert "its process has ended with status -9" in one_warning(capfd)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_service_that_hangs_is_given_up(run, tmp_path, no_account, capfd, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2)
    with tracking.Tracker(tmp_path) as tracker:
        tracker.start_fold(fold_after(0), run)
        started(tmp_path)
        stopped = processes(no_account, "wandb-core")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
    assert "not finished after 2 s" in one_warning(capfd)
    for pid in stopped:  # a stopped process learns of the other's end when it goes on
        os.kill(pid, signal.SIGCONT)


def test_dead_server_means_offline(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    follow(tmp_path, run, 0, 2)
    (line,) = capfd.readouterr().out.splitlines()
    assert re.match(r"Weights & Biases: no connection \(.*\), so the runs stay in", line)
    (path,) = (tmp_path / "wandb").glob("offline-run-*")
    assert path.name.endswith("abcd1234-fold-0")
    assert epochs_of(read_runs(tmp_path / "wandb")["abcd1234-fold-0"]) == [1, 2]


def test_key_that_is_none_is_named(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    follow(tmp_path, run, 0, 2)
    assert "WANDB_API_KEY invalid" in one_warning(capfd)


def test_missing_package_is_named(run, tmp_path, monkeypatch, capfd):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    follow(tmp_path, run, 0, 2)
    assert "needs wandb, which is not installed: bash 01_setup.sh" in one_warning(capfd)


def test_disabled_starts_nothing(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    follow(tmp_path, run, 0, 2)
    output = capfd.readouterr()
    assert output.out == output.err == ""
    assert not list(tmp_path.iterdir())


def test_offline_by_the_environment(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    follow(tmp_path / "assets", run, 0, 1)
    (line,) = capfd.readouterr().out.splitlines()
    assert "WANDB_MODE is offline, so the runs stay in " + str(tmp_path / "elsewhere" / "wandb") in line
    assert not (tmp_path / "assets").exists()


def test_full_disk_costs_the_log_alone(run, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no small disk to fill: mount says {done.stderr.strip()}")
    try:
        follow(small, run, 0, 2000)
        space = os.statvfs(small)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert space.f_bavail == 0
    output = capfd.readouterr()
    assert len(output.out.splitlines()) == 1
    assert len(output.err.splitlines()) <= 1


# --- A sweep -------------------------------------------------------------------------------------------------------


def test_sweep_runs_train_py_as_it_is(data, tmp_path, monkeypatch):
    """The agent's own code makes the command from sweep.yaml; the second point, as an agent runs it."""
    from wandb.sdk.launch.sweeps import utils as sweeps

    sweep = sweeps.load_sweep_config(str(REPOSITORY / "research" / "sweep.yaml"))
    assert sweep["metric"]["name"] == "validation_accuracy_mean"
    monkeypatch.setenv("SWEEP_DATA", str(data))
    monkeypatch.setenv("SWEEP_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_PROJECT", "p")
    point = {name: {"value": values["values"][0]} for name, values in sweep["parameters"].items() if "values" in values}
    point |= {"learning_rate": {"value": 0.00123}, "epochs": {"value": 1}}
    sweeps.create_sweep_command(sweep["command"])  # the first point's, which fills in its variables for good
    monkeypatch.setenv("WANDB_RUN_ID", run_id := "point2")
    template = sweeps.create_sweep_command(sweep["command"])
    parts = {**sweeps.create_sweep_command_args({"args": point}), "env": ["/usr/bin/env"], "program": ["train.py"]}
    command = [word for part in template for word in parts.get(part[2:-1], [part])]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    runs = read_runs(tmp_path / run_id / "wandb")
    state = json.loads((tmp_path / run_id / "checkpoints" / "training_state.json").read_text())
    assert {name: value["value"] for name, value in point.items()}.items() <= state["settings"].items()
    assert set(runs) == {f"{state['run_id']}-fold-0", f"{state['run_id']}-fold-1", run_id}
    assert runs[run_id][0]["run"][0]["sweep_id"] == "sweep1"
    assert not any("sweep_id" in file["run"][0] for name in set(runs) - {run_id} for file in runs[name])
    chosen = summary_of(runs[run_id])["validation_accuracy_mean"]
    epochs = [items(runs[f"{state['run_id']}-fold-{fold}"][0])[0] for fold in (0, 1)]
    assert chosen == pytest.approx(np.mean([epoch["validation_accuracy"] for epoch in epochs]))


def test_flag_of_an_augmentation_setting_keeps_to_its_rule(run_script):
    done = run_script("train.py", "--mask_bands", "-1")
    assert done.returncode == 2
    assert "argument --mask_bands: '-1' is not a whole number of at least 0" in done.stderr
    assert check_config.number_for("MIXUP_ALPHA")("0.3") == 0.3
    assert check_config.number_for("CROP_FRAMES")("96") == 96


def test_process_is_none_to_start_by_hand():
    if not shutil.which("script"):
        pytest.skip("no `script` to make a terminal")
    command = ["script", "-qec", f"{sys.executable} -m services.tracking", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "error: train.py starts this file: set WANDB_PROJECT" in done.stdout + done.stderr
