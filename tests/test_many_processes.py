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

import checkpoint
import utils

EPOCHS = 8  # of a tenth of a second: enough that a kill after the second comes in the middle
TRAIN = ("--epochs", str(EPOCHS), "--batch_size", "8", "--learning_rate", "0.01")
PATIENCE = 240  # s; only ends a run that waits for ever


@pytest.fixture
def start(scripts, data, tmp_path):
    """A function that starts train.py on one folder: start("--folds", 0) -> Run."""
    return lambda *flags, **options: scripts.start(
        "train", *TRAIN, "--processed_dir", data, "--assets_dir", tmp_path / "assets", *flags, **options
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data, scripts):
    """The assets folder of a training by one process. Read it, don't write."""
    assets = tmp_path_factory.mktemp("reference")
    done = scripts.run("train", *TRAIN, "--processed_dir", data, "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    return assets


def wait_for(pattern, printed, ended):
    """Wait until what printed() returns has a pattern."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, printed(), re.M):
        assert not ended() and time.monotonic() < deadline, printed()
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc")
def test_torchrun_with_a_killed_worker_then_ctrl_c_ends_as_one_process_would(start, reference, data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", "train.py"]
    command += [*TRAIN, "--processed_dir", data, "--assets_dir", tmp_path / "assets"]
    with open(tmp_path / "out", "w") as out, subprocess.Popen(command, stdout=out, cwd=REPOSITORY) as run:
        printed, ended = (tmp_path / "out").read_text, lambda: run.poll() is not None
        wait_for(r"^fold \d  epoch 2/", printed, ended)
        children = map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())
        workers = [child for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
        os.kill(workers[1], signal.SIGKILL)
        wait_for(r"^fold \d: resuming after epoch \d[\s\S]*^fold \d  epoch \d/", printed, ended)
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE) != 0
    stopped = epoch_lines(printed())
    assert len(set(stopped)) < 3 * EPOCHS
    assert len(stopped) <= len(set(stopped)) + 2  # each of the two was in the middle of one epoch at most
    again = start().wait()
    assert again.returncode == 0, again.stderr
    assert not set(stopped) & set(epoch_lines(again.stdout))
    assert_same_files(tmp_path / "assets", reference)


def test_two_process_groups_one_of_which_dies_leave_what_one_process_leaves(start, reference, tmp_path):
    """As two nodes that share a folder: whoever is free takes the next fold, also that of a process that died.

    A third with different settings is refused.
    """
    dying, staying = start(), start()
    wait_for(r"^fold \d  epoch 2/", dying.printed, dying.ended)
    assert dying.kill() and dying.wait().returncode == -signal.SIGKILL
    different = start("--seed", "7").wait()
    assert different.returncode == 2 and "seed was 0 and is 7 now" in different.stderr
    done = staying.wait()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fold \d: resuming after epoch [2-8] of 8", done.stdout, re.M)
    assert "3 of 3 folds, 24 of 24 clips: accuracy" in done.stdout
    assert_same_files(tmp_path / "assets", reference)


def test_process_that_finds_every_fold_taken_says_so(start, tmp_path):
    with utils.try_lock(checkpoint.lock_path(tmp_path / "assets" / "checkpoints", 0)):  # as one that trains it
        done = start("--folds", "0").wait()
    assert (done.returncode, epoch_lines(done.stdout)) == (0, [])
    assert "in the hands of other processes; the last of them writes the report" in done.stdout


def test_fresh_under_torchrun_is_refused(start, tmp_path):
    done = start("--fresh", env={**os.environ, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}).wait()
    assert done.returncode == 2 and "--fresh is for one process" in done.stderr
    assert not [name for name in files_of(tmp_path) if "checkpoints" in name]
