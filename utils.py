"""What every stage needs: errors for people, atomic files, pickles that can't run code, seeds, the device.

Imports neither torch nor pandas at the top: `python predict.py --help` and the preprocessing workers do not wait for
what they do not use.
"""

import argparse
import contextlib
import ctypes
import difflib
import errno
import functools
import glob
import hashlib
import importlib
import json
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import tempfile
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import config
import safe_pickle

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """Something a person can fix. The message names the value at fault and the remedy; no traceback is shown."""


# --- Command lines -----------------------------------------------------------------------------------------------


MAX_FOLDS = 10  # of a data set: fold numbers have one digit, 0 to 9
NO_FOLD = "none"  # in place of a number: all clips train, and none tests
ALL_FOLDS = (*range(MAX_FOLDS), NO_FOLD)
REMEDIES = {  # for what a disk or a path answers
    errno.ENOSPC: "make room on the disk, or name a folder on another with --assets_dir",
    errno.EDQUOT: "your disk quota is used up: make room, or name another folder with --assets_dir",
    errno.EFBIG: "the disk, or ulimit -f, allows no file of that size: raise the limit, or use another disk",
    errno.EROFS: "the disk is read-only: name a folder that can be written with --assets_dir",
    errno.EACCES: "change its permissions, or name a folder of your own with --assets_dir",
    errno.EPERM: "change its permissions, or name a folder of your own with --assets_dir",
}
# What flock and fsync answer on a disk that has none.
NOT_THERE = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def run(main):
    """Call `main()` as a script: exit status 0, 2 for what a person can fix (one line on stderr), 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):  # None where a caller has closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    # A log file or a pipe shows each line when it is written; a terminal without Unicode shows '?' for what it lacks.
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as set for the time of the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):  # what schedulers and closed terminals send ends like Ctrl-C; not under nohup
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        check_config()
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(fail(error))
    except BrokenPipeError:  # the reader of our output (head, less) has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:  # the output itself: Python would try to write the rest again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        remedy = REMEDIES.get(error.errno, "check that path and its disk")
        sys.exit(fail(f"{one_line(error.filename or 'the output')}: {error.strerror}: {remedy}, then run it again"))
    except MemoryError as error:
        sys.exit(fail(f"the memory is used up ({one_line(error) or 'no more to be had'}): close other programs"))
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'Stopped.'}", file=sys.stderr)
        sys.exit(130)


def check_config():
    """Raise a UserError that names a setting of config.py that is misspelt, missing or of the wrong type.

    The annotations of config.py say which settings there are and their types. Ranges are checked where a value is used.
    """
    types = typing.get_type_hints(config)
    for name in [name for name in vars(config) if name.isupper() and name not in types]:
        if near := difflib.get_close_matches(name, types, 1, cutoff=0.9):
            raise UserError(f"config.py sets {name}, which nothing reads: is it meant to be {near[0]}?")
    for name, kind in types.items():
        value = getattr(config, name)
        if not is_of_type(value, kind):
            choices = " or ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ""
            raise UserError(f"{name} = {value!r} in config.py: it must be {choices or kind_in_words(kind)}")


def is_of_type(value, kind):
    """Return whether a value is of an annotated type; a whole number is a float too, and True is no number."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    kinds = typing.get_args(kind) or (kind,)  # those of a union
    kinds += (int,) if float in kinds else ()
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def kind_in_words(kind):
    names = {"int": "a whole number", "float": "a number", "str": "text in quotes", "bool": "True or False"}
    kinds = typing.get_args(kind) or (kind,)
    return " or ".join("None" if each is type(None) else names.get(each.__name__, "a path") for each in kinds)


def one_line(value, longest=200):
    """Return untrusted text as one printable line of bounded length: what comes from outside may hold anything."""
    text = " ".join(str(value)[: 4 * longest].split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def fail(error):
    """Print one error line (a line for each recording of several) and return exit status 2."""
    text = "".join(character if character.isprintable() or character == "\n" else "?" for character in str(error))
    print(f"error: {text}", file=sys.stderr)
    return 2


def make_parser(script_doc):
    """Return an ArgumentParser whose help page is the script's docstring, with `--assets_dir` on it."""
    parser = argparse.ArgumentParser(
        description=script_doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--assets_dir",
        type=home_path,
        default=home_path(config.ASSETS_BASE_DIR),
        metavar="DIR",
        help=f"folder of data, checkpoints, models and results (default: {config.ASSETS_BASE_DIR})",
    )
    return parser


def home_path(text):
    """Return a path, its ~ replaced by the home folder: a shell does not do that within --flag=~/x. Also a type."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no home folder for {text}: write the path in full") from error


def folder(flag, assets_dir, below):
    """Return the folder that a flag names, else `below` (a `..._DIR` of config.py) under the assets folder."""
    return home_path(flag) if flag else Path(assets_dir) / home_path(below)


def output_path(text, name, is_folder=False):
    """Return the file that a flag's path stands for: `name` in it, if it is a folder or has to be one."""
    path = home_path(text)
    return path / name if is_folder or text.endswith(("/", os.sep)) or path.is_dir() else path


def run_folders(args):
    """Return a run's folders, .processed, .checkpoints, .models and .results, by its flags or else by config.py."""
    return SimpleNamespace(
        processed=folder(getattr(args, "processed_dir", None), args.assets_dir, config.PROCESSED_DIR),
        checkpoints=folder(None, args.assets_dir, config.CHECKPOINT_DIR),
        models=folder(getattr(args, "model_dir", None), args.assets_dir, config.MODEL_DIR),
        results=folder(getattr(args, "results_dir", None), args.assets_dir, config.RESULTS_DIR),
    )


def positive_int(text):
    """argparse type: a whole number of at least 1."""
    if not re.fullmatch(r"\s*\d{1,18}\s*", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text):
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fold_or_word(text):
    """argparse type: a fold number, "all" or "none"."""
    if not re.fullmatch("-?[0-9]{1,9}|all|none", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fold number, all or none")
    return text if text in ("all", NO_FOLD) else int(text)


def parse_folds(text):
    """Return the sorted 0-indexed folds in a list such as "0,3-5" -> [0, 3, 4, 5]; "none" -> [NO_FOLD]."""
    if text == NO_FOLD:
        return [NO_FOLD]
    folds = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d)(?:\s*-\s*(\d))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} is not a fold; folds are 0 to 9, as in 0,3-5, or none")
        folds.update(range(first, last + 1))
    return sorted(folds)


# --- Files: a reader sees the old file or the new one, never half of one ------------------------------------------


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`, renamed to `path` when the block ends well; else `path` stays as it was.

    Survives kill -9 and, through fsync of file and folder, power loss. Each process has a temporary name of its own, so
    that two writers of one file never mix. What is no regular file, as /dev/stdout, is written to, never replaced.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    encoding = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe, such as /dev/stdout
        with naming(path), open(path, mode, **encoding) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with naming(path), open(temporary, mode, **encoding) as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path):
    """Add a path to an OSError that has none: a write, unlike an open, does not say to what."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def temporary_path(path):
    """Return this process's temporary name for a path, and remove those that dead processes of this machine left."""
    short = os.fsdecode(os.fsencode(path.name)[:150])  # a name has 255 bytes at most
    beginning = f"{short}.{platform.node()[:60]}-"
    for old in path.parent.glob(f"{glob.escape(beginning)}*.tmp"):
        process_id = old.name[len(beginning) : -len(".tmp")]  # or the rest of another machine's name
        if os.name == "posix" and re.fullmatch("[0-9]{1,9}", process_id) and not is_running(int(process_id)):
            old.unlink(missing_ok=True)
    return path.with_name(f"{beginning}{os.getpid()}.tmp")


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def sync_folder(path):
    """Make the renames in a folder survive power loss, where the system can: some disks have no fsync of folders."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


def sync(descriptor):
    """Make an open file's contents survive power loss, where the disk can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def need_space(folder, needed, reason):
    """Raise a UserError that ends in `reason` if a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free{reason}")


@contextlib.contextmanager
def only_one(folder, script):
    """Hold a folder for this process while the block runs. UserError if another process works in it."""
    with try_lock(folder / ".lock") as is_ours, open(folder / ".lock", "a+", errors="replace") as file:
        if not is_ours:
            file.seek(0)
            raise UserError(
                f"{one_line(file.read()) or 'another process'} is at work in {folder}: wait for it to end, or use "
                "another --assets_dir"
            )
        with naming(folder / ".lock"):
            file.truncate(0)
            print(f"{script} (process {os.getpid()})", file=file, flush=True)
        yield


@contextlib.contextmanager
def try_lock(path, wait=False):
    """Hold a file's lock while the block runs, unless another process has it: gives whether this one has it now.

    wait: until the other process frees it. The system frees the lock of a process that ends, however that ends. Where
    locks do not work, a single process continues with a note, and several are refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            if not fcntl:  # Windows
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_ours = True
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            if error.errno not in NOT_THERE:
                error.filename = str(path)
                raise
            note_no_locks(path.parent)
            is_ours = True
        yield is_ours


@functools.cache
def note_no_locks(folder):
    """Print once that a folder's disk has no locks. UserError where several processes were started."""
    if process_count() > 1:
        raise UserError(f"{folder} is on a disk without locks (flock): start one process alone, or use another disk")
    print(f"note: {folder} is on a disk without locks (flock): start no second process in it", file=sys.stderr)


def process_count():
    """Return how many processes share this work: those of torchrun, or the tasks of a Slurm array; 1 by default."""
    texts = (os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT"))
    return max([1, *(int(text) for text in texts if re.fullmatch(r"[0-9]{1,6}", text))])


def digest(data):
    """Return a short hash of bytes, 16 hexadecimal digits: it finds damage and differences, not forgery."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_digest(path):
    """Return the digest of a file's contents, or None if there is no such file."""
    return digest(path.read_bytes()) if path.is_file() else None


def save_json(path, value):
    """Write JSON, atomically. NaN and infinity are refused: other programs can't read them."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def load_json(path):
    """Read JSON. UserError names a file that is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): make it again") from error


def save_pickle(path, value):
    """Write a pickle, atomically. Protocol 5 writes an array's own memory, without a copy."""
    with atomic_write(path) as file:
        pickle.dump(value, file, protocol=5)


@contextlib.contextmanager
def array_writer(path, row_shape, dtype):
    """Pickle an array row by row, atomically: gives a function that appends rows, of shape (n, *row_shape).

    Until the end the rows are in a file without a name on the same disk, so that memory stays at the rows'.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryFile(dir=path.parent) as file:
        shape = 0, *row_shape

        def append(rows):
            nonlocal shape
            rows = np.asarray(rows, dtype)
            if rows.shape[1:] != tuple(row_shape):
                raise ValueError(f"rows of {rows.shape[1:]}, and the array's have {tuple(row_shape)}")
            file.write(rows.tobytes())
            shape = shape[0] + len(rows), *row_shape

        yield append
        file.flush()
        array = np.memmap(file, dtype, "r+", shape=shape) if shape[0] else np.empty(shape, dtype)
        save_pickle(path, np.asarray(array))


def load_pickle(path, memory_map=False):
    """Return what a pickle of protocol 2 to 5 holds, if that is arrays, lists, tuples, dicts, numbers and text alone.

    memory_map: leave large arrays on the disk until they are used (see safe_pickle.load).
    Anything else in the file is refused by name with a UserError, and never run (safe_pickle.py). Memory stays below
    five times the file's size plus 100 MB, whoever made the file.
    """
    try:
        with open(path, "rb") as file:
            return safe_pickle.load(file, memory_map)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except safe_pickle.Refused as error:
        raise UserError(f"{path} is refused: it holds {error}, and data files hold arrays, numbers and text") from error
    except MemoryError as error:
        raise UserError(f"{path} is larger than the memory that is free") from error
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): make or fetch it again") from error


# --- Seeds, device, versions --------------------------------------------------------------------------------------


def derive_seed(*parts):
    """Return a 63-bit seed for parts such as (seed, fold, epoch): the same everywhere, unrelated between parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pick_device(name=config.DEVICE):
    """Return the torch.device for a name; "auto" takes cuda, else mps, else cpu. UserError if it is not there.

    Of several processes on a machine, each takes the GPU of its LOCAL_RANK.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and rank.isdigit() and torch.cuda.device_count():
        name = f"cuda:{int(rank) % torch.cuda.device_count()}"
    try:
        torch.empty(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:  # a device without data is a RuntimeError
        raise UserError(f"device {name!r} can't be used here ({one_line(error)}); try --device auto") from error


def computes_in_bfloat16(device):
    """Return whether a device's processor computes in bfloat16, rather than emulating it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device, precision=config.PRECISION):
    """Return the context in which the network runs: bfloat16 where the processor computes in it, else float32."""
    import torch

    enabled = precision == "bfloat16" or (precision == "auto" and computes_in_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def keep_freed_memory():
    """Tell glibc's allocator to keep freed memory for the next step rather than give it back to the system.

    Activations of 50 MB are freed and needed again in every training step on a CPU; page faults for fresh memory took a
    fifth of it. Elsewhere than glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes: larger requests get pages of their own
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes: free memory at the top that is given back


def need(module, why, remedy="bash 01_setup.sh"):
    """Import and return a module that only some runs need. UserError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{why} needs {module}, which is not installed: {remedy}") from error
