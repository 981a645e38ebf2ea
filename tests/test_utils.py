"""What every stage needs: exit statuses, flags, files that are old or new and never half, locks, seeds."""

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

import utils
from utils import UserError


def command(code, *arguments):
    return [sys.executable, "-c", "import os, signal, sys, time, utils\n" + code, *map(str, arguments)]


def run(code, *arguments, **options):
    """Run a few lines of Python beside the scripts; output as text."""
    options = {"capture_output": True, **options}
    return subprocess.run(command(code, *arguments), text=True, cwd=REPOSITORY, **options)


def start(code, *arguments):
    return subprocess.Popen(
        command(code, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


# --- Exit statuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "status", "output", "errors"),
    [
        ("print('well')", 0, "well\n", ""),
        ("raise utils.UserError('no clip here: bring one')", 2, "", "error: no clip here: bring one\n"),
        (r"raise utils.UserError('\x1b[31m.wav: no such file')", 2, "", r"error: \?\[31m.wav: no such file\n"),
        ("1 / 0", 1, "", "Traceback .*ZeroDivisionError.*"),  # a fault of our own keeps its traceback
    ],
)
def test_exit_status_is_by_how_it_ends(main, status, output, errors):
    done = run(f"def main(): {main}\nutils.run(main)")
    assert (done.returncode, done.stdout) == (status, output)
    assert re.fullmatch(errors, done.stderr, re.DOTALL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_what_schedulers_send_end_in_one_line(number):
    process = start("def main(): print('ready'); time.sleep(60)\nutils.run(main)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "\nStopped.\n"


def test_reader_that_goes_away_ends_it_quietly():
    process = start("def main():\n  while True: print('x' * 1000)\nutils.run(main)")
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141
    assert errors == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
def test_output_to_a_full_disk_says_what_to_do():
    with open("/dev/full", "w") as full:
        done = run("utils.run(lambda: print('x'))", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the output: No space left on device: make room")


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the output")
def test_closed_output_is_no_error(tmp_path):
    code = "def main(): print('x'); sys.stderr.write('y'); open(sys.argv[1], 'w').write('done')\nutils.run(main)"
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command(code, tmp_path / "a")], cwd=REPOSITORY)
    assert done.returncode == 0
    assert (tmp_path / "a").read_text() == "done"


def test_terminal_without_unicode_shows_a_question_mark():
    done = run("utils.run(lambda: print('█ 50 %'))", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "? 50 %\n")


# --- Flags and texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "values", "refused", "reason"),
    [
        (
            utils.parse_folds,
            {"0": [0], "0,3-5": [0, 3, 4, 5], "9,3-5,4-6": [3, 4, 5, 6, 9], " 1 , 2 - 3 ": [1, 2, 3], "4-4,4": [4]},
            ["", "10", "-1", "5-3", "1,,2", "a", "1-", "1.0", "1;2", "0 1", "0-10"],
            "is not a fold; folds are 0 to 9, as in 0,3-5",
        ),
        (
            utils.positive_int,
            {"1": 1, " 32 ": 32, "007": 7},
            ["0", "-1", "1.5", "", "two", "1e3", "²", "1_0", "9" * 5000],
            "is not a whole number of at least 1",
        ),
        (
            utils.positive_float,
            {"1": 1, "3e-3": 0.003, ".5": 0.5, "1e300": 1e300},
            ["0", "-0.1", "", "fast", "nan", "inf", "1e999", "1,5"],
            "is not a number above 0",
        ),
    ],
)
def test_value_of_a_flag_is_parsed_or_refused(parse, values, refused, reason):
    assert {text: parse(text) for text in values} == values
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            parse(text)


def test_folder_is_the_flags_or_below_the_assets():
    assert utils.folder(None, "/assets", "data") == utils.folder("", "/assets", "data") == Path("/assets/data")
    assert utils.folder("here", "/assets", "data") == Path("here")
    assert utils.folder("~/a", "/assets", "data") == utils.folder(None, "/assets", "~/a") == Path.home() / "a"
    assert utils.make_parser("").parse_args(["--assets_dir=~/a"]).assets_dir == Path.home() / "a"
    with pytest.raises(UserError, match="no home folder for ~nobody-of-this-name/a: write the path in full"):
        utils.folder("~nobody-of-this-name/a", "/assets", "data")
    assert utils.folder(None, "/assets", "/elsewhere") == Path("/elsewhere")  # an absolute ..._DIR of config.py


def test_flags_are_not_abbreviated(capsys):
    parser = utils.make_parser("What it does.\n\n    python it.py")
    assert parser.parse_args(["--assets_dir", "a b"]).assets_dir == Path("a b")
    assert "What it does.\n\n    python it.py" in parser.format_help()
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--assets", "a"])
    assert exit.value.code == 2
    assert "--assets" in capsys.readouterr().err


def test_one_line_makes_untrusted_text_printable():
    assert utils.one_line("a\n b\t\x1b[2J\u202e") == "a b ?[2J?"
    assert utils.one_line({"a": 1}) == "{'a': 1}"
    assert utils.one_line("x" * 10**6) == "x" * 199 + "…"
    assert utils.one_line("x " * 50, longest=10) == "x x x x x…"


# --- Files: old or new, never half -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.txt", f"{'é' * 125}.txt"])  # of 254 bytes
def test_atomic_write_leaves_one_file_also_after_a_killed_process(name, tmp_path):
    path = tmp_path / "a" / "b" / name
    path.parent.mkdir(parents=True)
    stale = utils.temporary_path(path).name.replace(f"-{os.getpid()}.", "-4194305.")  # of no such process
    (path.parent / stale).write_bytes(b"what a killed process has left")
    for content in ("first", "second: Straße\r\n"):
        with utils.atomic_write(path, "w") as file:
            file.write(content)
        assert path.read_bytes() == content.encode()
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_leaves_the_temporary_file_of_a_machine_with_a_longer_name(tmp_path):
    other = tmp_path / utils.temporary_path(tmp_path / "a").name.replace(f"-{os.getpid()}.", "-2-4194305.")
    other.touch()
    utils.save_json(tmp_path / "a", 1)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", other]


def test_disk_without_fsync_is_written_to(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    utils.save_json(tmp_path / "a", 1)
    assert utils.load_json(tmp_path / "a") == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_the_block_leaves_the_old_file(tmp_path, error):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old")
    for path in (old, new):
        with pytest.raises(error), utils.atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


WRITE_OFTEN = """
for number in range(200):
    utils.save_json(sys.argv[1], [number] * 500)
"""


def test_atomic_write_to_a_pipe_or_a_link_leaves_it_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        with utils.atomic_write(tmp_path / "pipe", "w") as file:
            file.write("text")
        assert reader.communicate()[0] == "text" and (tmp_path / "pipe").is_fifo()
    with utils.atomic_write(tmp_path / "link", "w") as file:
        file.write("text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_writers_of_one_file_at_once_never_mix(tmp_path):
    writers = [start(WRITE_OFTEN, tmp_path / "a.json") for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "a.json").exists():
            assert len(set(utils.load_json(tmp_path / "a.json"))) == 1
    assert [writer.communicate()[1] for writer in writers] == ["", "", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


KILLED_AT = """
def die(): os.kill(os.getpid(), signal.SIGKILL)
path, moment = sys.argv[1:]
with utils.atomic_write(path) as file:
    if moment == "opened": die()
    file.write(bytes(1 << 20))
    if moment == "half": file.flush(); die()
    file.write(bytes(1 << 20))
    if moment == "before the rename": os.replace = lambda *names: die()
if moment == "written": die()
"""


@pytest.mark.parametrize("moment", ["opened", "half", "before the rename", "written"])
def test_kill_at_each_moment_leaves_old_or_new(tmp_path, moment):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    assert run(KILLED_AT, path, moment).returncode == -signal.SIGKILL
    assert path.read_bytes() == (bytes(2 << 20) if moment == "written" else b"old")
    assert bool([*tmp_path.glob("a.*.tmp")]) == (moment != "written")
    assert run(KILLED_AT, path, "never").returncode == 0
    assert path.read_bytes() == bytes(2 << 20)
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back_as_saved_or_leaves_the_old_file(tmp_path):
    value = {"a": [1, 2.5, None, True, "犬"], "b": {"c": -1}}
    utils.save_json(tmp_path / "a.json", value)
    for refused in (float("nan"), {"a": [-float("inf")]}, object()):
        with pytest.raises((ValueError, TypeError)):
            utils.save_json(tmp_path / "a.json", refused)
    assert utils.load_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1,}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json is not JSON .*make it again"):
        utils.load_json(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"can't read .*none\.json: No such file"):
        utils.load_json(tmp_path / "none.json")


# --- Locks -------------------------------------------------------------------------------------------------------

HOLD = """
from pathlib import Path
with utils.try_lock(Path(sys.argv[1]) / ".lock") as is_ours: print(is_ours, flush=True); time.sleep(60)
"""


def test_lock_of_a_killed_process_is_free(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "True\n"
    with utils.try_lock(tmp_path / ".lock") as is_ours:
        assert not is_ours
    holder.kill()
    holder.communicate()
    with utils.try_lock(tmp_path / ".lock") as is_ours:
        assert is_ours
        with utils.try_lock(tmp_path / ".lock") as again:
            assert not again


WAIT = """
from pathlib import Path
print("waits", flush=True)
with utils.try_lock(Path(sys.argv[1]) / ".lock", wait=True) as is_ours:
    print(is_ours, Path(sys.argv[1], "a").read_text())
"""


def test_waiting_lock_comes_after_the_other(tmp_path):
    with utils.try_lock(tmp_path / ".lock"):
        process = start(WAIT, tmp_path)
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)
        (tmp_path / "a").write_text("written before")
    assert process.communicate() == ("True written before\n", "")


def test_only_one_names_the_other(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe\x00" * 100)  # whatever an earlier process left
    with (
        utils.only_one(tmp_path, "a.py"),
        pytest.raises(UserError, match=rf"a\.py \(process {os.getpid()}\) is at work in .*: wait for it to end"),
        utils.only_one(tmp_path, "b.py"),
    ):
        pass


WITHOUT_LOCKS = """
import errno, fcntl
from pathlib import Path
errors = iter([errno.ENOLCK, errno.EINVAL])
def flock(*_): raise OSError(next(errors), "No locks available")
fcntl.flock = flock
def main():
    for name in "ab":
        with utils.try_lock(Path(sys.argv[1]) / name) as is_ours: print(is_ours)
utils.run(main)
"""


def test_disk_without_locks_is_for_one_process(tmp_path):
    done = run(WITHOUT_LOCKS, tmp_path)
    note = f"note: {tmp_path} is on a disk without locks (flock): start no second process in it\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", note)
    done = run(WITHOUT_LOCKS, tmp_path, env={**os.environ, "WORLD_SIZE": "2"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} is on a disk without locks (flock): start one process alone")


@pytest.mark.parametrize(
    ("world_size", "array", "count"), [("", "", 1), ("4", "", 4), ("", "10", 10), ("2", "10", 10), ("x", "-3", 1)]
)
def test_processes_are_those_of_torchrun_or_slurm(monkeypatch, world_size, array, count):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", array)
    assert utils.process_count() == count


# --- Seeds, device -----------------------------------------------------------------------------------------------


def test_seeds_are_the_same_for_ever_and_differ():
    assert utils.derive_seed(0, 0, 0) == 3150921512212191848
    assert utils.derive_seed("weights", 0, 3) == 8860297453657526871
    assert utils.derive_seed("miniature", 0, "900001-0-0-0.wav") == 8010183076377183417
    seeds = {utils.derive_seed(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), ("0", 0), (10,), (1, 0, 0)]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


def test_device_that_is_not_there_is_named():
    assert utils.pick_device("cpu").type == "cpu"
    assert utils.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu", ""):
        with pytest.raises(UserError, match=rf"device '{re.escape(name)}' can't be used here .*--device auto"):
            utils.pick_device(name)


def test_missing_module_says_how_to_install_it():
    with pytest.raises(UserError, match=r"the Hub needs no_such_module_1, which is not installed: bash 01_setup\.sh"):
        utils.need("no_such_module_1", "the Hub")
    assert utils.need("json", "reading") is json
