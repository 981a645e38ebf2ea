"""Full disks, folders that can't be written, two processes at once: one line each, and nothing lost."""

import contextlib
import os
import re
import shutil
import subprocess
import time

import pytest
import torch

import utils
from checkpoint import checkpoint_epochs

TRAIN = ("train", "--folds", "0", "--epochs", "4", "--batch_size", "8", "--validation", "none")


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder on a disk of so many MB; skips where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(megabytes):
        options = f"size={megabytes}m" + (",remount" if folder.is_mount() else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk to fill: mount says {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def one_line(done):
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def fill_to(folder, free):
    """Leave `free` bytes on a disk, or none where training writes to it at the same moment."""
    space = os.statvfs(folder)
    with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
        file.write(bytes(max(space.f_bavail * space.f_frsize - free, 0)))


def test_disk_that_fills_during_training_costs_one_epoch(small_disk, data, scripts):
    folder = small_disk(100)
    command = (*TRAIN, "--processed_dir", data, "--assets_dir", folder)
    run = scripts.start(*command)
    while "epoch 1/4" not in run.printed() and not run.ended():
        time.sleep(0.02)
    fill_to(folder, 1_500_000)
    stopped = run.wait()
    assert stopped.returncode == 2 and stopped.stderr.count("\n") == 1, stopped.stderr
    assert "No space left on device" in stopped.stderr
    fold = folder / "checkpoints" / "fold_0"
    newest = checkpoint_epochs(fold)[0]
    assert torch.load(fold / f"epoch_{newest}.pt", weights_only=True)["epoch"] == newest
    assert not list(folder.rglob("*.tmp"))

    (folder / "filler").unlink()
    done = scripts.run(*command)
    assert done.returncode == 0, done.stderr
    assert f"resuming after epoch {newest} of 4" in done.stdout


@pytest.mark.parametrize("free", [1_500_000, 4_000_000, 7_000_000])  # bytes: full at the rows, at the features; not
def test_preprocessing_again_on_a_full_disk_leaves_the_old_files(free, small_disk, data, miniature, scripts):
    folder = small_disk(40)
    shutil.copytree(data, folder / "data")
    old = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    fill_to(folder, free)
    flags = ("--data_dir", miniature, "--assets_dir", folder, "--overwrite", "--workers", 1)
    done = scripts.run("preprocess_data", *flags)
    new = {path.name: path.read_bytes() for path in (folder / "data").iterdir() if path.name != ".lock"}
    if free == 7_000_000:
        assert done.returncode == 0 and utils.load_json(folder / "data" / "features.json")["clips"] == 60
    else:
        assert "No space left on device" in one_line(done) and str(folder / "data") in done.stderr
        assert new == old


def test_a_full_disk_leaves_the_old_file(small_disk):
    folder = small_disk(1)
    utils.save_json(folder / "state.json", {"epoch": 1})
    with pytest.raises(OSError, match="No space left") as caught:
        utils.save_pickle(folder / "state.json", b"x" * 2_000_000)
    assert caught.value.filename == str(folder / "state.json")
    assert utils.load_json(folder / "state.json") == {"epoch": 1}
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def test_read_only_disk(small_disk, data, scripts):
    folder = small_disk(60)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    line = one_line(scripts.run(*TRAIN, "--processed_dir", data, "--assets_dir", folder))
    assert "Read-only file system" in line
    assert str(folder) in line


def make_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("a file"), "File exists|Not a directory"),
        (lambda path: path.symlink_to(path.parent / "gone"), "File exists|No such file or directory"),
        (make_loop, "File exists|Too many levels of symbolic links"),
        (lambda path: path.mkdir(mode=0o500), "Permission denied"),
    ],
)
@pytest.mark.parametrize("name", ["assets/below", "assets/" + "x" * 300])
def test_assets_folder_that_can_not_be_is_one_line(make, reason, name, tmp_path, miniature, scripts):
    if reason == "Permission denied" and os.geteuid() == 0:
        pytest.skip("the administrator may write everywhere")
    make(tmp_path / "assets")
    done = scripts.run("preprocess_data", "--data_dir", miniature, "--assets_dir", tmp_path / name, "--workers", 1)
    assert re.search(f"{reason}|File name too long", one_line(done)) and "assets" in done.stderr


def test_second_preprocessing_in_the_same_folder_is_refused(tmp_path, miniature, scripts):
    with utils.only_one(tmp_path / "data", "preprocess_data.py"):
        line = one_line(scripts.run("preprocess_data", "--data_dir", miniature, "--assets_dir", tmp_path))
    assert f"preprocess_data.py (process {os.getpid()}) is at work in {tmp_path / 'data'}" in line
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]
