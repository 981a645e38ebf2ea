"""Folds over several processes, by torchrun: the result of one process, whoever is killed or stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from hub_server import USER
from run_files import assert_same_files, epoch_lines, files_of

import processes
import train
from utils import UserError

EPOCHS = 8  # of a tenth of a second: enough that a kill after the second comes in the middle
TRAIN = ("--epochs", str(EPOCHS), "--batch_size", "8", "--learning_rate", "0.01")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it: the last bits depend on the threads
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PATIENCE = 120  # s; only ends a run that waits for ever

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data, run_script):
    """The assets folder of a training by one process. Read it, don't write."""
    assets = tmp_path_factory.mktemp("reference")
    done = run_script("train.py", *TRAIN, "--processed_dir", data, "--assets_dir", assets, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return assets


class Started:
    """A command that runs, with its output in files."""

    def __init__(self, folder, command, env):
        self.out, self.err = folder / "stdout", folder / "stderr"
        folder.mkdir(parents=True, exist_ok=True)
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=REPOSITORY)

    def stdout(self):
        return self.out.read_text()

    def wait_for(self, pattern):
        """Wait until the output has a pattern."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.stdout(), re.M):
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def wait(self):
        """Return the exit status."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def workers(self):
        """Return {rank: process id} of torchrun's workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ranks = {}
        for child in children:
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks |= {int(entry[5:]): int(child) for entry in environ if entry.startswith(b"RANK=")}
        return ranks


@pytest.fixture
def torchrun(tmp_path, data):
    """A function that starts torchrun: torchrun(("--nproc-per-node=2",), "--folds", "0") -> Started."""
    started = []

    def start(options, *flags, assets=tmp_path / "assets", env=None):
        command = [*TORCHRUN, *options, "train.py", *TRAIN, "--processed_dir", data, "--assets_dir", assets, *flags]
        env = {**ONE_THREAD, **(env or {})}
        started.append(Started(tmp_path / f"torchrun_{len(started)}", list(map(str, command)), env))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@needs_proc
def test_a_killed_worker_then_ctrl_c_and_one_process_ends_as_if_nothing_had_been(
    torchrun, reference, tmp_path, data, run_script
):
    run = torchrun(("--nproc-per-node=2", "--max-restarts=3"))
    run.wait_for(r"^fold \d  epoch 2/")
    os.kill(run.workers()[1], signal.SIGKILL)
    run.wait_for(r"^fold \d: going on after epoch \d[\s\S]*^fold \d  epoch \d/")
    run.process.send_signal(signal.SIGINT)
    assert run.wait() != 0
    assert run.err.read_text().count("Stopped. The same command goes on after the last completed epoch.") == 1
    assets = tmp_path / "assets"
    stopped = epoch_lines(run.stdout())
    assert len(stopped) < 3 * EPOCHS
    state = json.loads((assets / "checkpoints" / "training_state.json").read_text())
    assert all(state["folds"][str(fold)]["epoch"] >= epoch for fold, epoch in stopped)
    done = run_script("train.py", *TRAIN, "--processed_dir", data, "--assets_dir", assets, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert not set(stopped) & set(epoch_lines(done.stdout))
    assert len(stopped) <= len(set(stopped)) + 2  # each of the two was in the middle of one epoch at most
    assert_same_files(assets, reference)


@needs_proc
def test_a_node_that_dies_leaves_its_fold_to_the_others(torchrun, reference, tmp_path):
    port = free_port()
    patience = "--rdzv-conf=last_call_timeout=3,keep_alive_interval=2"
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", patience)
    options = ("--nnodes=1:2", "--nproc-per-node=1", "--rdzv-id=1", "--max-restarts=3", "--local-addr=127.0.0.1")
    staying = torchrun((*options, *meeting))
    time.sleep(1)  # whoever comes first keeps the store of the rendezvous, and it must not be the one that dies
    leaving = torchrun((*options, *meeting))
    leaving.wait_for(r"^fold \d  epoch 2/")
    (worker,) = leaving.workers().values()
    leaving.process.kill()
    os.kill(worker, signal.SIGKILL)
    assert staying.wait() == 0, staying.err.read_text()
    assert "processes: 24 clips" in staying.stdout() + leaving.stdout()
    assert "can't reach the others" in staying.err.read_text()
    assert_same_files(tmp_path / "assets", reference)


def test_more_processes_than_folds_hub_and_wandb_once(torchrun, server, tmp_path):
    """Every epoch, model and run is sent once, by whichever process; a process without a fold says so."""
    repo = f"{USER}/sounds"
    env = {**server.environment(tmp_path), "HF_MODEL_REPO_ID": repo, "WANDB_PROJECT": "p", "WANDB_MODE": "offline"}
    run = torchrun(("--nproc-per-node=3",), "--folds", "0,2", "--epochs", "2", env=env)
    assert run.wait() == 0, run.err.read_text()
    assert (
        len(re.findall(r"^process \d on .*: every fold has its process already, none is left", run.stdout(), re.M)) == 1
    )
    names = [name for name in server.files(repo) if name.endswith(".safetensors")]
    epochs = [f"checkpoints/fold_{fold}/epoch_{epoch}.safetensors" for fold in (0, 2) for epoch in (1, 2)]
    assert sorted(names) == sorted([*epochs, *(f"model_fold_{fold}_best.safetensors" for fold in (0, 2))])
    assert {"README.md", "results.json"} <= set(server.files(repo))
    runs = [path.name.rsplit("-", 3)[-3:] for path in (tmp_path / "assets" / "wandb").glob("offline-run-*")]
    assert sorted("-".join(parts).split("-", 1)[1] for parts in runs if parts[-2] == "fold") == ["fold-0", "fold-2"]
    assert len(runs) == 3
    assert run.stdout().count("Weights & Biases") == 1
    assert not [name for name in files_of(tmp_path / "assets") if "outbox" in name]


# --- Two processes on one machine as if on two: torchrun's variables, set by hand -----------------------------------


def two_nodes(tmp_path, data, *flags):
    """Run train.py as rank 0 and rank 1, each with its own flags; return [(exit status, stderr)]."""
    port = str(free_port())
    runs = []
    for rank in (0, 1):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "train.py", *TRAIN, "--processed_dir", data, *flags[rank]]
        env = {**ONE_THREAD, **place, "MASTER_PORT": port}
        runs.append(Started(tmp_path / f"node_{rank}", list(map(str, command)), env))
    return [(run.wait(), run.err.read_text()) for run in runs]


def test_a_node_that_does_not_see_the_folder_says_so_at_start(tmp_path, data):
    here, there = tmp_path / "here", tmp_path / "there"
    (status_0, error_0), (status_1, error_1) = two_nodes(
        tmp_path, data, ("--assets_dir", here), ("--assets_dir", there)
    )
    assert (status_0, status_1) == (2, 2)
    (line,) = error_1.strip().splitlines()
    assert re.match(r"error: process 1 on .* does not see what process 0 on .* writes in .*there/checkpoints", line)
    assert error_0 == ""
    assert not there.exists()
    assert files_of(here) == ["checkpoints/.lock"]


def test_a_node_with_other_settings_says_so_at_start(tmp_path, data):
    flags = ("--assets_dir", tmp_path / "assets")
    (status_0, error_0), (status_1, error_1) = two_nodes(tmp_path, data, flags, (*flags, "--seed", "7"))
    assert (status_0, status_1) == (2, 2)
    assert error_1.strip().endswith("has other settings than process 0: seed is 7 and not 0")
    assert error_0 == ""


# --- Alone ---------------------------------------------------------------------------------------------------------


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    team = processes.join()
    assert team is processes.ALONE
    with team:
        assert list(team.claim([3, 1])) == [3, 1]
        assert (team.gather("a"), team.once(lambda: 5), team.told("ab"), list(team.wait())) == (["a"], 5, {}, [])


def test_torchrun_says_who_a_process_is(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    team = processes.join()
    assert (team.rank, team.size, team.local_rank, team.is_first) == (5, 8, 1, False)
    assert team.device("cpu").type == "cpu"


def test_fresh_is_not_for_torchrun_whose_restarts_would_repeat_it(tmp_path):
    kept = tmp_path / "checkpoints" / "fold_0" / "epoch_1.pt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    paths = SimpleNamespace(checkpoints=tmp_path / "checkpoints")
    with pytest.raises(UserError, match="--fresh under torchrun would start again after every restart: use another"):
        train.start_again(paths, [0], {}, processes.Team(rank=0, size=2))
    assert kept.exists()
