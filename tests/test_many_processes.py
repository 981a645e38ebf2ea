"""Several processes on one folder, by torchrun and by hand: the result of one process, whoever is killed or stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from run_files import assert_same_files, epoch_lines, files_of

EPOCHS = 8  # of a tenth of a second: enough that a kill after the second comes in the middle
TRAIN = ("--epochs", str(EPOCHS), "--batch_size", "8", "--learning_rate", "0.01")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it: the last bits depend on the threads
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PATIENCE = 240  # s; only ends a run that waits for ever

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

    def wait_for(self, pattern):
        """Wait until the output has a pattern."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.out.read_text(), re.M):
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def wait(self):
        """Return the exit status."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def workers(self):
        """Return the process ids of torchrun's workers."""
        pid = self.process.pid
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [child for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]


@pytest.fixture
def start(tmp_path, data):
    """A function that starts train.py on one folder, behind other words: start(*TORCHRUN, ...) -> Started."""
    started = []

    def start(*program, flags=(), env=None):
        command = [*program, "train.py", *TRAIN, "--processed_dir", data, "--assets_dir", tmp_path / "assets", *flags]
        env = {**ONE_THREAD, **(env or {})}
        started.append(Started(tmp_path / f"started_{len(started)}", list(map(str, command)), env))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()


@needs_proc
def test_torchrun_with_a_killed_worker_then_ctrl_c_ends_as_one_process_would(start, reference, tmp_path):
    run = start(*TORCHRUN, "--nproc-per-node=2", "--max-restarts=3")
    run.wait_for(r"^fold \d  epoch 2/")
    os.kill(run.workers()[1], signal.SIGKILL)
    run.wait_for(r"^fold \d: resuming after epoch \d[\s\S]*^fold \d  epoch \d/")
    run.process.send_signal(signal.SIGINT)
    assert run.wait() != 0
    stopped = epoch_lines(run.out.read_text())
    assert len(set(stopped)) < 3 * EPOCHS
    assert len(stopped) <= len(set(stopped)) + 2  # each of the two was in the middle of one epoch at most
    again = start(sys.executable)
    assert again.wait() == 0, again.err.read_text()
    assert not set(stopped) & set(epoch_lines(again.out.read_text()))
    assert_same_files(tmp_path / "assets", reference)


def test_two_process_groups_one_of_which_dies_leave_what_one_process_leaves(start, reference, tmp_path):
    """As two nodes that share a folder: whoever is free takes the next fold, also that of a process that died."""
    dying, staying = start(sys.executable), start(sys.executable)
    dying.wait_for(r"^fold \d  epoch 2/")
    dying.process.kill()
    assert staying.wait() == 0, staying.err.read_text()
    printed = staying.out.read_text()
    assert re.search(r"^fold \d: resuming after epoch [2-8] of 8", printed, re.M)
    assert "3 of 3 folds, 24 of 24 clips: accuracy" in printed
    assert_same_files(tmp_path / "assets", reference)


def test_more_processes_than_folds_one_report_and_a_line_for_who_has_none(start, tmp_path):
    flags = ("--folds", "0,2", "--epochs", "2")
    run = start(*TORCHRUN, "--nproc-per-node=3", flags=flags)
    assert run.wait() == 0, run.err.read_text()
    printed = run.out.read_text()
    assert printed.count("2 of 3 folds, 16 of 24 clips: accuracy") == 1
    assert printed.count("in the hands of other processes; the last of them writes the report") == 2
    assert sorted(epoch_lines(printed)) == [(fold, epoch) for fold in (0, 2) for epoch in (1, 2)]


def test_process_with_different_settings_is_refused(start, tmp_path):
    first = start(sys.executable)
    first.wait_for(r"^fold \d  epoch 1/")
    second = start(sys.executable, flags=("--seed", "7"))
    assert second.wait() == 2
    assert "seed was 0 and is 7 now" in second.err.read_text()
    assert first.wait() == 0, first.err.read_text()


def test_fresh_under_torchrun_is_refused(start, tmp_path):
    run = start(sys.executable, flags=("--fresh",), env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    assert run.wait() == 2
    assert "--fresh is for one process" in run.err.read_text()
    assert not [name for name in files_of(tmp_path) if "checkpoints" in name]
