"""Pickles: what pickle and numpy write comes back the same; an untrusted file runs no code and takes little memory."""

import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

import safe_pickle
import utils
from utils import UserError

PROTOCOLS = (2, 3, 4, 5)
DTYPES = ("?", "i1", "i2", "i4", "i8", "u1", "u8", "f2", "f4", "f8", "c8", "c16", "S3", "U5", ">i2", ">f8", ">U2")


def load(data):
    return safe_pickle.load(io.BytesIO(data))


def written(path, data):
    path.write_bytes(data)
    return path


def same(a, b):
    """Equal in type, shape, dtype and value, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# --- What comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_load_arrays_of_every_dtype_order_and_shape_gives_the_same(dtype, protocol):
    numbers = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    arrays = [
        numbers,
        np.asfortranarray(numbers),
        numbers.transpose(1, 0, 2),  # one piece of memory, its axes in a different order
        numbers[:, ::2],  # memory with gaps
        numbers[1, 2, 3].reshape(()),
        numbers[:0],
        np.zeros((0, 5, 0), dtype),
        numbers.byteswap().view(numbers.dtype.newbyteorder()),
        np.resize(numbers, 3000),
    ]
    assert same(load(pickle.dumps(arrays, protocol)), arrays)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_load_numbers_text_and_containers_gives_the_same(protocol):
    shared = [1, 2]
    value = {
        "numbers": [0, 1, -1, 255, 256, 65_535, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1, True, False, None],
        "floats": (0.0, -0.0, 1.5, float("inf"), float("nan"), 5e-324),
        "text": ["", "dog_bark", "Straße", "犬", "🐕", "\ud800", "x" * 300],
        "bytes": [b"", b"b", b"\x00\xff", b"x" * 300, bytes(range(256)) * 400],
        "numpy": [np.float16(0.5), np.float64(2.5), np.int64(-3), np.uint8(3), np.bool_(True), np.str_("siren")],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, [], [[]], {"a": {1: [(2, {"b": 3})]}}),
        "twice": [shared, shared],
        "many": list(range(3000)),
        7: {1.5: "key", None: 1, np.int64(4): "numpy's"},
    }
    data = pickle.dumps(value, protocol)
    assert same(load(data), value)
    if protocol < 4:  # as numpy 1 writes them
        assert same(load(data.replace(b"numpy._core", b"numpy.core")), value)


@pytest.mark.parametrize("lengths", [(), (3, 1, 2)])
def test_array_writer_row_by_row_writes_what_pickle_reads(tmp_path, lengths):
    path = tmp_path / "a.pkl"
    rows = [np.random.default_rng(n).normal(0, 9, (n, 151, 5)).astype(np.float16) for n in lengths]
    with utils.array_writer(path, (151, 5), np.float16) as append:
        for part in rows:
            append(part)
    whole = np.concatenate([np.empty((0, 151, 5), np.float16), *rows])
    assert same(utils.load_pickle(path), whole)
    assert same(pickle.loads(path.read_bytes()), whole)
    with pytest.raises(ValueError, match="rows of"), utils.array_writer(path, (151, 4), np.float16) as append:
        append(whole)
    assert same(utils.load_pickle(path), whole)  # the file from before


@pytest.mark.parametrize("memory_map", [False, True])
def test_load_pickle_is_writable_and_leaves_the_file_as_it_is(tmp_path, memory_map):
    path = tmp_path / "a.pkl"
    large, small = np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, -1), np.arange(10)
    utils.save_pickle(path, {"large": large, "small": small})
    before = path.read_bytes()
    loaded = utils.load_pickle(path, memory_map)
    assert same(loaded, {"large": large, "small": small})
    loaded["large"] += 1
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match=r"a\.pkl is damaged"):
        utils.load_pickle(path, memory_map)


# --- Code -----------------------------------------------------------------------------------------------------------


class Call(str):
    """Unpickles as a call of os.system with this text."""

    def __reduce__(self):
        return os.system, (str(self),)


def text(value):
    """The instruction that pushes text."""
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def name(module, attribute):
    """The instructions that push a module's attribute."""
    return text(module) + text(attribute) + b"\x93"


def code_pickles(marker):
    """{label: pickle} of programs that make the file `marker` when Python's own unpickler runs them."""
    shell = f"touch {marker}"
    call, start, argument = Call(shell), b"\x80\x04", text(shell)
    run = name("os", "system") + argument + b"\x85R"
    find = name("builtins", "getattr") + name("importlib", "import_module") + text("os") + b"\x85R" + text("system")
    state = b")\x81}" + text("__setstate__") + name("os", "system") + b"sb"
    return {
        **{f"os.system, protocol {protocol}": pickle.dumps(call, protocol) for protocol in range(6)},
        "object array": pickle.dumps(np.array([call], object)),
        "function by getattr": start + find + b"\x86R" + argument + b"\x85R.",
        "key of a dictionary": start + b"}" + run + b"Ns.",
        "dtype of an array": start + name("numpy", "dtype") + run + b"\x85R.",
        "__setstate__ by BUILD": start + name("types", "SimpleNamespace") + state + argument + b"b.",
    }


@pytest.mark.parametrize("label", code_pickles("x"))
def test_load_pickle_of_code_refuses_it_by_name_and_runs_nothing(tmp_path, label):
    marker = tmp_path / "m"
    data = code_pickles(marker)[label]
    with contextlib.suppress(Exception):  # what comes after the call may not fit
        pickle.loads(data)
    assert marker.exists()  # the program does work
    marker.unlink()
    with pytest.raises(UserError, match=r"evil\.pkl is refused: it holds [^,]"):
        utils.load_pickle(written(tmp_path / "evil.pkl", data))
    assert not marker.exists()


# --- What is not data, or takes much memory -------------------------------------------------------------------------

NDARRAY, DTYPE, SCALAR = name("numpy", "ndarray"), name("numpy", "dtype"), name("numpy._core.multiarray", "scalar")
ARRAY = name("numpy._core.multiarray", "_reconstruct") + NDARRAY + b"K\x00\x85C\x01b\x87R"
ENCODE, LATIN = name("_codecs", "encode"), text("latin1")
ALONE = "a part of an array without the array"


def dtype(code):
    return DTYPE + text(code) + b"\x89\x88\x87R"


def array(memory, shape):
    return name("numpy._core.numeric", "_frombuffer") + b"(" + memory + dtype("f4") + shape + text("C") + b"tR"


OTHER_INSTRUCTIONS = "PROTO", "PERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "DICT", "EMPTY_SET", "LONG"
FIELDS = b"(K\x03" + text("|") + b"N]}t"
NO_DATA = {
    "BUILD on a function": (SCALAR + b"}" + text("__code__") + b"Nsb", "attributes of a function"),
    "BUILD with a dict": (ARRAY + b"}" + text("array") + b"Nsb", "a _Dict as attributes of a _Array"),
    "BUILD with fields": (dtype("f4") + FIELDS + b"b", "a tuple as attributes of a Float32"),
    "call of a class": (NDARRAY + b")R", "a call of a type"),
    "encode by another codec": (ENCODE + text("a") + text("utf-7") + b"\x86R", "_codecs.encode"),
    "array without state": (b"}K\x01" + ARRAY + b"s", ALONE),
    "memory alone": (b"\x96\x01" + bytes(7) + b"x", ALONE),
    "long integer as a key": (b"}\x8a\x09" + bytes(8) + b"\x01Ns", "a int as a key"),
    "object array": (dtype("O8"), "an array of type 'O8'"),
    "items of 4 GB": (dtype("S4294967295"), "an array of type 'S4294967295'"),
    "name of a builtin": (name("builtins", "bytearray") + b")R", "it holds builtins.bytearray, and"),
    "name with a dot": (name("numpy", "dtype.type"), "it holds numpy.dtype.type, and"),
    "name with an escape": (name("a\x1b[2Jb", "c\td"), "it holds a\\x1b[2Jb.c\\td, and"),
    **{code: (b"N" + getattr(pickle, code), f"the pickle instruction {code}") for code in OTHER_INSTRUCTIONS},
    "something after its end": (b"N.N", "something after its end"),
    "long text": (b"X\x01\x04\x00\x00" + b"x" * 1025, "text of 1025 bytes"),
}


def laughs(start, end):
    """Instructions for 60 containers, each of which holds the one before twice."""
    twice = (start + b"h" + bytes([n]) + b"h" + bytes([n]) + end + b"\x94" for n in range(60))
    return b"(" + start + end + b"\x94" + b"".join(twice) + b"t"


def many_calls(function, arguments):
    """Instructions for a list of 30,000 calls with the same two arguments."""
    return b"](" + function + b"\x94" + arguments + b"\x86\x94R" + b"h\x00h\x01R" * 30_000 + b"e"


def bombs():
    """{label: (instructions, part of the reason, empty if the file opens)}: short files that ask for much."""
    huge = struct.pack("<Q", 2**62)
    page = b"B" + struct.pack("<I", 50_000) + bytes(50_000) + b"\x94"  # memo 0
    buffer = b"\x96" + struct.pack("<Q", 20_000_000) + bytes(20_000_000)
    scalar = dtype("U256") + b"B\x00\x04\x00\x00" + "😀".encode("utf-32-le") * 256
    latin = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + LATIN
    emoji = b"X" + struct.pack("<I", 40_000_000) + b"a" * 39_999_996 + "😀".encode()
    return {
        "memo index of 4 billion": (b"K\x01r\xff\xff\xff\xff", ""),
        "memory of 4 exabytes": (b"\x96" + huge, "EOFError"),
        "name without end": (b"c" + b"a" * 10_000_000, "it holds aaaa"),
        "array larger than its memory": (array(b"C\x04abcd", b"\x8a\x08" + huge + b"\x85"), "cannot reshape"),
        "lists, 45,000 deep": (b"]" * 45_000 + b"a" * 44_999, "RecursionError"),
        "10 million lists": (b"]" * 10_000_000, "more than 200000"),
        "laughs, tuples": (laughs(b"(", b"t"), "more than 200000"),
        "laughs as a key": (b"}" + laughs(b"(", b"t") + b"Ns", "a tuple as a key"),
        "laughs as an index": (array(b"C\x04abcd", b"K\x01\x85") + laughs(b"](", b"e") + b"Ns", "TypeError"),
        "one page, many times": (page + b"](" + b"h\x00" * 45_000 + b"e\x86", ""),
        "one scalar, many times": (many_calls(SCALAR, scalar), ""),
        "one encoding, many times": (many_calls(ENCODE, latin), ""),
        "memory as arguments": (DTYPE + buffer + b"R", "a call of a function with a memoryview"),
        "memory as a shape": (array(b"C\x00", buffer), "without type or shape"),
        "text that grows fourfold": (ENCODE + emoji + LATIN + b"\x86R", "text of 40000000 bytes"),
    }


# Loads each file in a process of its own. Prints what that adds to the peak of its memory (MB), and the error.
LOADER = """
import json, os, resource, sys, utils

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    before, error = peak(), ""
    try:
        value = utils.load_pickle(path, memory_map=sys.argv[1] == "map")
    except utils.UserError as refusal:
        error = str(refusal)
    print(json.dumps([peak() - before, error]), flush=True)
    os._exit(0)
"""


def load_measured(how, paths):
    """[(peak in MB, error or "")] that loading each file adds."""
    if sys.platform != "linux":
        pytest.skip("memory is in Linux' units")
    command = [sys.executable, "-c", LOADER, how, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_load_pickle_of_no_data_refuses_it_in_five_times_the_file_and_100_mb(tmp_path):
    cases = {**NO_DATA, **bombs()}
    paths = [written(tmp_path / f"{n}.pkl", b"\x80\x05" + data + b".") for n, (data, _) in enumerate(cases.values())]
    measured = load_measured("read", paths)
    for (label, (_, reason)), path, (peak, error) in zip(cases.items(), paths, measured, strict=True):
        assert peak < 5 * path.stat().st_size / 1e6 + 100, label
        assert reason in error if reason else not error, f"{label}: {error}"
        assert error.isprintable()


def test_load_pickle_of_an_array_takes_the_memory_of_its_file_or_none_if_mapped(tmp_path):
    features = np.random.default_rng(0).integers(0, 99, (20_000, 1000)).astype(np.float16)  # 40 MB
    paths = [written(tmp_path / f"{protocol}.pkl", pickle.dumps(features, protocol)) for protocol in PROTOCOLS]
    peaks = [peak for peak, _ in load_measured("read", paths)]
    assert min(peaks) > 38 and peaks[0] < 200 and max(peaks[1:]) < 48
    assert load_measured("map", paths[-1:])[0][0] < 10


# --- Damage ---------------------------------------------------------------------------------------------------------

HONEST = [
    pickle.dumps([{0: "a"}, np.arange(3), (1.5, None, b"b"), np.float32(2), np.ones((2, 3, 1)).T], protocol)
    for protocol in PROTOCOLS
]
DAMAGE = (EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error)


NO_PICKLE = [(b"", "damaged"), (HONEST[0][:-1], "damaged"), (b"\x80\x06N.", "protocol 2"), (b"<!DOCTYPE", "protocol 2")]


@pytest.mark.parametrize(("data", "reason"), NO_PICKLE)
def test_load_pickle_of_no_whole_pickle_names_the_file(tmp_path, data, reason):
    path = written(tmp_path / "a.pkl", data)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is .*{reason}"):
        utils.load_pickle(path)
    with pytest.raises(UserError, match=f"can't read {re.escape(str(tmp_path))}"):
        utils.load_pickle(tmp_path)


def instructions_of(data):
    """A pickle's instructions as bytes."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


SEEDS = [instructions_of(data) for data in [*HONEST * 8, *code_pickles("x").values()]]
SEEDS += [[b"\x80\x05", data, b"."] for data, _ in NO_DATA.values()]
POOL = [part for seed in SEEDS for part in seed]
EVENTS = []  # what would be code: the names of its audit events


def audit(event, _):
    if event.startswith(("import", "open", "exec", "compile", "pickle.", "os.", "subprocess.", "ctypes.", "socket.")):
        EVENTS.append(event)


def mutated(rng):
    """A random pickle: the instructions of one, changed in a few instructions or bytes."""
    parts = list(rng.choice(SEEDS))
    for _ in range(rng.choice((0, 1, 3, 9))):
        start = 1 + rng.randrange(len(parts))
        parts[start : start + rng.randrange(2)] = rng.choices(POOL, k=rng.randrange(3))
    data = bytearray(b"".join(parts))
    for _ in range(rng.choice((0, 0, 1, 4))):
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(3)] = rng.randbytes(1)
    return bytes(data)


def test_load_of_mutated_pickles_gives_plain_data_or_raises(n_cases=4000):
    sys.addaudithook(audit)
    rng, n_opened = random.Random(0), 0
    for _ in range(n_cases):
        data, value = mutated(rng), None
        EVENTS.clear()
        with contextlib.suppress(safe_pickle.Refused, pickle.PickleError, RecursionError, *DAMAGE):
            value = load(data)
        assert not EVENTS, (data, EVENTS)
        assert same(load(pickle.dumps(value, 4)), value), data
        n_opened += value is not None
    assert n_opened > n_cases / 14
