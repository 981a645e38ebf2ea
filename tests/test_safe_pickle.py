"""Pickles: what save_pickle writes comes back the same; whatever a stranger writes runs nothing and takes little."""

import contextlib
import copyreg
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from utils import UserError

PROTOCOLS = (3, 4, 5)
DTYPES = (
    *("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "S3", "U5"),
    *(">i2", ">f4", ">f8", ">c8", ">U2"),
)


def written(path, value, protocol=5):
    """The path of a pickle of a value; bytes are the pickle itself."""
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


def same(a, b):
    """Equal in type, shape, type of number and value, all the way down."""
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# --- What comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_type_order_and_shape(tmp_path, dtype, protocol):
    numbers = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    arrays = [
        numbers,
        np.asfortranarray(numbers),
        numbers.transpose(1, 0, 2),  # one piece of memory, its axes in another order
        numbers[:, ::2],  # memory with gaps
        numbers[1, 2, 3].reshape(()),
        numbers[:0],
        np.zeros((0, 5, 0), dtype),
        numbers.byteswap().view(numbers.dtype.newbyteorder()),
    ]
    assert same(utils.load_pickle(written(tmp_path / "a.pkl", arrays, protocol)), arrays)


def test_save_pickle_and_what_it_gives_back_can_be_written_to(tmp_path):
    features = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float16)
    utils.save_pickle(tmp_path / "new" / "features.pkl", features)
    loaded = utils.load_pickle(tmp_path / "new" / "features.pkl")
    assert same(loaded, features)
    loaded += 1  # its own memory
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["features.pkl"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
@pytest.mark.parametrize("lengths", [(), (1,), (3, 1, 2)])
def test_an_array_that_is_written_row_by_row(tmp_path, dtype, lengths):
    path = tmp_path / "a.pkl"
    rows = [np.random.default_rng(n).normal(0, 9, (n, 151, 5)).astype(dtype) for n in lengths]
    with utils.array_writer(path, (151, 5), dtype) as append:
        for part in rows:
            append(part)
    whole = np.concatenate([np.empty((0, 151, 5), dtype), *rows])
    assert same(utils.load_pickle(path), whole)
    assert same(pickle.loads(path.read_bytes()), whole)  # Python's own reads it too
    with pytest.raises(ValueError, match="rows of"), utils.array_writer(path, (151, 4), dtype) as append:
        append(whole)
    assert same(utils.load_pickle(path), whole)  # the file before


def test_a_mapped_array_stays_on_the_disk_and_is_not_written_to(tmp_path):
    path = tmp_path / "a.pkl"
    large, small = np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, -1), np.arange(10)
    utils.save_pickle(path, {"large": large, "small": small})
    before = path.read_bytes()
    mapped = utils.load_pickle(path, memory_map=True)
    assert same(mapped, {"large": large, "small": small})
    mapped["large"] += 1  # this process's copy
    assert path.read_bytes() == before
    assert same(utils.load_pickle(path, memory_map=True)["large"], large)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match=r"a\.pkl is damaged"):
        utils.load_pickle(path, memory_map=True)


# Prints by how many kB the process's own memory grows when it loads and reads an array.
OWN_MEMORY = """
import re, sys
import utils

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = own()
array = utils.load_pickle(sys.argv[1], memory_map=bool(sys.argv[2]))
array.sum()
print(own() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_a_mapped_array_takes_no_memory_of_its_own(tmp_path):
    path = tmp_path / "a.pkl"
    utils.save_pickle(path, np.ones(100 << 20, np.uint8))
    used = {}
    for memory_map in (True, False):
        command = [sys.executable, "-c", OWN_MEMORY, str(path), "1" if memory_map else ""]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
        used[memory_map] = int(done.stdout) / 1024  # MB
    assert used[True] < 20 < 90 < used[False]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_text_and_containers(tmp_path, protocol):
    shared = [1, 2]
    value = {
        "numbers": [0, 1, -1, 255, 256, 65_535, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1, True, False, None],
        "floats": (0.0, -0.0, 1.5, float("inf"), float("nan"), 5e-324),
        "text": ["", "dog_bark", "Straße", "犬", "🐕", "\ud800", "x" * 300],
        "bytes": [b"", b"\x00\xff", b"x" * 300],
        "numpy": [np.float16(0.5), np.float64(2.5), np.int64(-3), np.uint8(3), np.bool_(True), np.str_("siren")],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, [], [[]], {"a": {1: [(2, {"b": 3})]}}),
        "twice": [shared, shared],
        "many": list(range(3000)),
        7: {1.5: "key", None: 1, np.int64(4): "numpy's"},
    }
    if protocol > 3:  # in protocol 3 a set is a call of builtins.set
        value["sets"] = [set(), {1, "a"}, frozenset({2.5})]
    assert same(utils.load_pickle(written(tmp_path / "a.pkl", value, protocol)), value)


@pytest.mark.parametrize("core", ["core", "_core"])  # numpy 1 and 2
def test_files_of_numpy_1(tmp_path, core):
    data = pickle.dumps([np.arange(6).reshape(2, 3), np.float32(2)], 3)
    data = data.replace(b"numpy._core", b"numpy." + core.encode())
    assert same(utils.load_pickle(written(tmp_path / "a.pkl", data)), [np.arange(6).reshape(2, 3), np.float32(2)])


keys = st.one_of(st.integers(-(2**63), 2**63), st.text(max_size=5), st.none(), st.floats(allow_nan=False))
values = st.recursive(
    st.one_of(
        keys,
        st.booleans(),
        st.floats(),
        st.binary(max_size=20),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)).map(
            lambda array: np.arange(np.prod(array[1], dtype=int)).astype(array[0]).reshape(array[1])
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=4),
    ),
    max_leaves=12,
)
fixed = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(fixed, max_examples=100)
@given(values, st.sampled_from((4, 5)))
def test_whatever_is_plain_comes_back(tmp_path, value, protocol):
    assert same(utils.load_pickle(written(tmp_path / "a.pkl", pickle.dumps(value, protocol))), value)


# --- What is refused: code ---------------------------------------------------------------------------------------


class Call:
    """Unpickles as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def text(value):
    """The instruction that pushes text."""
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def name(module, attribute):
    """The instructions that push what a module calls so."""
    return text(module) + text(attribute) + b"\x93"


def code_pickles(marker):
    """{label: pickle} of programs that make the marker's file when Python's own unpickler runs them."""
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    call, evaluate = Call(os.system, shell), Call(eval, python)
    pickles = {f"os.system, protocol {protocol}": pickle.dumps(call, protocol) for protocol in range(6)}
    pickles |= {f"builtins.eval, protocol {protocol}": pickle.dumps(evaluate, protocol) for protocol in range(6)}
    for protocol in PROTOCOLS:
        pickles[f"in an object array, protocol {protocol}"] = pickle.dumps(np.array([call], object), protocol)
        pickles[f"beside an array, protocol {protocol}"] = pickle.dumps([np.zeros(3), {"a": (call,)}], protocol)
    system = b"\x80\x04" + name("os", "system")
    argument = b"\x8c" + bytes([len(shell)]) + shell.encode()
    namespace = name("types", "SimpleNamespace") + b")\x81"
    return pickles | {
        "nested reduce": pickle.dumps(Call(list, Call(map, os.system, [shell]))),
        "the function by getattr": b"\x80\x04"
        + name("builtins", "getattr")
        + name("importlib", "import_module")
        + text("os")
        + b"\x85R"
        + text("system")
        + b"\x86R"
        + argument
        + b"\x85R.",
        "as a key": b"\x80\x04}" + system[2:] + argument + b"\x85RNs.",
        "as the shape of an array": b"\x80\x04" + name("numpy", "zeros") + system[2:] + argument + b"\x85R\x85R.",
        "as the type of an array": b"\x80\x04" + name("numpy", "dtype") + system[2:] + argument + b"\x85R\x85R.",
        "from the memo": system + b"\x94" + argument + b"\x85\x94" + b"00h\x00h\x01R.",
        "under a dotted name": b"\x80\x04" + name("shutil", "os.system") + argument + b"\x85R.",
        "by the old name of builtins": b"\x80\x02c__builtin__\neval\nX"
        + struct.pack("<I", len(python))
        + python.encode()
        + b"\x85R.",
        "by BUILD with a __setstate__ of its own": b"\x80\x04"
        + namespace
        + b"}"
        + text("__setstate__")
        + system[2:]
        + b"sb"
        + argument
        + b"b.",
        "by INST": b"(S" + repr(shell).encode() + b"\nios\nsystem\n.",
        "by OBJ": b"\x80\x02(" + b"cos\nsystem\n" + b"X" + struct.pack("<I", len(shell)) + shell.encode() + b"o.",
        "by an extension code": b"\x80\x04\x82\xf0" + argument + b"\x85R.",
        "numpy's own exec": b"\x80\x04" + name("numpy.testing._private.utils", "runstring") + text(python) + b"}\x86R.",
    }


LABELS = list(code_pickles("x"))


@pytest.fixture
def extension():
    """Extension code 240 stands for os.system, as a program that pickles much may have it."""
    copyreg.add_extension(os.system.__module__, "system", 240)
    yield
    copyreg.remove_extension(os.system.__module__, "system", 240)


@pytest.mark.parametrize("label", LABELS)
def test_code_is_never_run_and_is_named(tmp_path, extension, label):
    marker = tmp_path / "m"
    data = code_pickles(marker)[label]
    with contextlib.suppress(Exception):  # what comes after the call may not fit
        pickle.loads(data)
    assert marker.exists()  # the program does work
    marker.unlink()
    path = written(tmp_path / "evil.pkl", data)
    with pytest.raises(UserError, match=r"evil\.pkl is refused: it holds [^,]") as caught:
        utils.load_pickle(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


NAMES = [
    *(("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "set")),
    *(("subprocess", "Popen"), ("pty", "spawn"), ("runpy", "run_path"), ("importlib", "import_module")),
    *(("operator", "attrgetter"), ("functools", "partial"), ("_codecs", "encode"), ("copyreg", "_reconstructor")),
    *(("torch.storage", "_load_from_bytes"), ("torch.jit.unsupported_tensor_ops", "execWrapper")),
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch._dynamo.guards", "GuardBuilder.get")),
    *(("torch.serialization", "load"), ("torch.hub", "load"), ("pandas", "eval"), ("joblib", "load")),
    *(("numpy", "load"), ("numpy", "memmap"), ("numpy", "fromfile"), ("numpy", "frombuffer"), ("numpy", "array")),
    *(("numpy.ctypeslib", "load_library"), ("numpy._core.multiarray", "fromstring"), ("numpy", "dtype.type")),
    *(("numpy._core.numeric", "_frombuffer.__globals__"), ("numpy.f2py", "os.system"), ("collections", "OrderedDict")),
    *(("utils", "UserError"), ("safe_pickle", "_Array"), ("__main__", "main"), ("", ""), ("numpy dtype", "")),
    ("a\x1b[2Jb", "c\nd"),
]


@pytest.mark.parametrize("how", ["STACK_GLOBAL", "GLOBAL"])
@pytest.mark.parametrize("module, attribute", NAMES)
def test_other_names_are_refused_by_name_and_never_looked_up(tmp_path, module, attribute, how):
    if how == "STACK_GLOBAL":
        push = name(module, attribute)
    else:
        module, attribute = module.replace("\n", ""), attribute.replace("\n", "")
        push = f"c{module}\n{attribute}\n".encode()
    path = written(tmp_path / "a.pkl", b"\x80\x04" + push + b")R.")
    loaded = set(sys.modules)
    with pytest.raises(UserError) as caught:
        utils.load_pickle(path)
    shown = f"{module}.{attribute}".encode("unicode_escape").decode()
    assert f"{path} is refused: it holds {shown}, and" in str(caught.value)
    assert str(caught.value).isprintable()
    assert set(sys.modules) == loaded


FUNCTION, TYPE = name("numpy._core.multiarray", "_reconstruct"), name("numpy", "dtype")
ARRAY = FUNCTION + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
FLOAT = TYPE + text("f4") + b"\x89\x88\x87R"
MACHINE_TRICKS = {
    "BUILD on a function": (FUNCTION + b"}" + text("__code__") + b"Nsb", "attributes for a function"),
    "BUILD on a function, by slots": (FUNCTION + b"N}" + text("__code__") + b"Ns\x86b", "attributes for a function"),
    "BUILD on a list": (b"]}b", "attributes for a list"),
    "BUILD on the array class": (name("numpy", "ndarray") + b"(NNNNNtb", "attributes for a type"),
    "BUILD with a dict": (ARRAY + b"}" + text("value") + b"Nsb", "a dict as arguments"),
    "call of the array class": (name("numpy", "ndarray") + b")R", "a call of a type"),
    "call of text": (text("os.system") + b")R", "a call of a str"),
    "call of an array": (ARRAY + b")R", "a call of a _Array"),
    "NEWOBJ": (name("numpy", "ndarray") + b")\x81", "NEWOBJ"),
    "NEWOBJ_EX": (name("numpy", "ndarray") + b")}\x92", "NEWOBJ_EX"),
    "persistent id": (b"K\x01Q", "BINPERSID"),
    "persistent id in text": (b"Pid\n", "PERSID"),
    "EXT1": (b"\x82\xf0", "EXT1"),
    "EXT4": (b"\x84\xf0\x00\x00\x00", "EXT4"),
    "memory from elsewhere": (b"\x97", "NEXT_BUFFER"),
    "POP": (b"K\x01K\x020", "POP"),
    "DUP": (b"K\x012\x86", "DUP"),
    "a second PROTO": (b"\x80\x04N", "PROTO"),
    "an instruction that does not exist": (b"\xff", "255"),
    "the type alone": (FLOAT, "a part of an array without the array"),
    "the array class alone": (name("numpy", "ndarray"), "a part of an array without the array"),
    "the function alone": (b"]" + FUNCTION + b"a", "a part of an array without the array"),
    "an array that is never filled": (b"}K\x01" + ARRAY + b"s", "a part of an array without the array"),
    "memory alone": (b"\x96\x01" + bytes(7) + b"x", "a part of an array without the array"),
    "an array as a key": (b"}" + ARRAY + b"Ns", "a _Array as a key"),
    "a tuple as a key": (b"})Ns", "a tuple as a key"),
    "bytes in a set": (b"\x8f(C\x01a\x90", "a bytes as a key"),
    "items for a tuple": (b")K\x01a", "items for a tuple"),
    "items for a number": (b"K\x01(K\x01e", "items for a int"),
    "a name of numbers": (b"K\x01K\x02\x93", "a name that is not text"),
    "object array": (TYPE + text("O8") + b"\x89\x88\x87R", "an array of type O8"),
    "structured array": (TYPE + text("V8") + b"\x89\x88\x87R", "an array of type V8"),
    "array of dates": (TYPE + text("M8") + b"\x89\x88\x87R", "an array of type M8"),
    "type that is no text": (TYPE + b"]\x85R", "an array of type list"),
    "type with fields": (FLOAT + b"(K\x03" + text("|") + b"N]}t" + b"b", "an array type with parts of its own"),
    "more behind its end": (b"N.N", "something behind its end"),
}


@pytest.mark.parametrize("label", MACHINE_TRICKS)
def test_tricks_with_the_machine_are_refused(tmp_path, label):
    instructions, reason = MACHINE_TRICKS[label]
    path = written(tmp_path / "a.pkl", b"\x80\x05" + instructions + b".")
    with pytest.raises(UserError) as caught:
        utils.load_pickle(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "value, named",
    [
        (np.array([{}], object), "type O8"),
        (np.zeros(2, [("a", "f4")]), "type V4"),
        (np.zeros(2, "M8[s]"), "type M8"),
        (np.zeros(2, np.longdouble), "type f16"),
        (np.ma.zeros(2), "numpy.ma"),
        (np.dtype("f4"), "part of an array"),
        (np.ndarray, "part of an array"),
        (np.random.default_rng(0), "numpy.random"),
        (types.SimpleNamespace(a=1), "types.SimpleNamespace"),
        (1j, "builtins.complex"),
        (2**100, "13 bytes"),
        (bytearray(b"x"), "part of an array"),
        ("x" * 70_000, "70000 bytes"),
        ({(1, 2): 3}, "a tuple as a key"),
        (list(range(100_000)), "more than 100000"),
    ],
)
def test_what_is_not_plain_is_named(tmp_path, value, named):
    path = written(tmp_path / "a.pkl", value)
    with pytest.raises(UserError, match=r"a\.pkl is refused: it holds .*") as caught:
        utils.load_pickle(path)
    assert named in str(caught.value)


# --- What is refused: memory and time without bound --------------------------------------------------------------


def laughs(start, end):
    """Instructions for 60 containers, each of which holds the one before twice."""
    twice = (start + b"h" + bytes([n]) + b"h" + bytes([n]) + end + b"\x94" for n in range(60))
    return b"(" + start + end + b"\x94" + b"".join(twice) + b"t"


def bombs():
    """{label: (instructions, part of the reason, None if the file may open)}: short files that ask for much."""
    long = struct.pack("<Q", 2**62)
    page = b"B" + struct.pack("<I", 50_000) + bytes(50_000) + b"\x94"  # memo 0
    buffer = b"\x96" + struct.pack("<Q", 20_000_000) + bytes(20_000_000)
    scalar = TYPE + text("U256") + b"\x89\x88\x87R\x94" + b"B" + struct.pack("<I", 1024) + b"a\0\0\0" * 256
    scalar += b"\x86\x94" + name("numpy._core.multiarray", "scalar") + b"\x94"  # memo 0 type, 1 arguments, 2 function
    key = b"X" + struct.pack("<I", 65_000) + b"a" * 65_000 + b"\x94"
    emoji = b"X" + struct.pack("<I", 65_000) + b"a" * 64_996 + "😀".encode()
    collide = b"".join(b"\x8a\x09" + (n * (2**61 - 1)).to_bytes(9, "little") + b"N" for n in range(1000))
    frombuffer = name("numpy._core.numeric", "_frombuffer")
    shape = b"\x8a\x09" + (2**62).to_bytes(9, "little")
    return {
        "memo index of 4 billion": (b"K\x01r\xff\xff\xff\xff", "memo index 4294967295"),
        "memory of 4 exabytes": (b"\x96" + long, "4611686018427387904 bytes are wanted"),
        "bytes of 4 exabytes": (b"\x8e" + long, "4611686018427387904 bytes are wanted"),
        "bytes of 4 GB": (b"B\xff\xff\xff\xff", "4294967295 bytes are wanted"),
        "text of 4 exabytes": (b"\x8d" + long, "4611686018427387904 bytes"),
        "frame of 4 exabytes": (b"\x95" + long, "a frame of 4611686018427387904 bytes"),
        "number of 2 GB": (b"\x8b\xff\xff\xff\x7f", "LONG4"),
        "number of 255 bytes": (b"\x8a\xff" + bytes(255), "255 bytes"),
        "number in text": (b"I" + b"9" * 100_000 + b"\n", "INT"),
        "array larger than its memory": (
            frombuffer + b"(C\x04abcd" + FLOAT + shape + b"\x85" + text("C") + b"tR",
            "cannot reshape",
        ),
        "array of no memory": (frombuffer + b"(C\x00" + FLOAT + shape + b"\x85" + text("C") + b"tR", "cannot reshape"),
        "array of 100 dimensions": (
            frombuffer + b"(C\x04abcd" + FLOAT + b"(" + b"K\x01" * 100 + b"t" + text("C") + b"tR",
            "dimension",
        ),
        "items of 4 GB": (TYPE + text("S4294967295") + b"\x89\x88\x87R", "an array of type S4294967295"),
        "lists, 45,000 deep": (b"]" * 45_000 + b"a" * 44_999, "deeper than 50"),
        "tuples, 90,000 deep": (b")" + b"\x85" * 90_000, "deeper than 50"),
        "tuples by marks, 45,000 deep": (b"(" * 45_000 + b"t" * 45_000, "deeper than 50"),
        "10 million lists": (b"]" * 10_000_000, "more than 100000"),
        "laughs, lists": (laughs(b"](", b"e"), "more than 100000"),
        "laughs, tuples": (laughs(b"(", b"t"), "more than 100000"),
        "laughs, tuples as a key": (b"}" + laughs(b"(", b"t") + b"Ns", "a tuple as a key"),
        "laughs, frozensets": (laughs(b"(", b"\x91"), "a frozenset as a key"),
        "list inside itself": (b"]\x94h\x00a", "deeper than 50"),
        "dictionary inside itself": (b"}\x94K\x01h\x00s", "deeper than 50"),
        "tuple inside itself": (b"]\x94h\x00\x85a", "deeper than 50"),
        "sets": (b"](" + b"\x8f" * 49_000 + b"e", None),
        "sets, too many": (b"](" + b"\x8f" * 99_000 + b"e", "more than 100000"),
        "small memories": (b"](" + (b"\x96\x01" + bytes(7) + b"x") * 98_000 + b"e", "part of an array"),
        "memo of everything": (b"}" + b"\x94" * 99_000, None),
        "one page, many times": (page + b"](" + b"h\x00" * 45_000 + b"e\x86", None),
        "many pages as a type": (page + b"](" + b"h\x00" * 50_000 + b"e" + b"\x94" + TYPE + b"h\x01\x85R", "type list"),
        "one text as numpy's, many times": (b"](" + scalar + b"h\x02h\x01R" * 30_000 + b"e", "part of an array"),
        "memory as arguments": (TYPE + buffer + b"R", "a memoryview as arguments"),
        "memory as a state": (ARRAY + buffer + b"b", "a memoryview as arguments"),
        "memory as a shape": (frombuffer + b"(C\x00" + FLOAT + buffer + text("C") + b"tR", "without a shape"),
        "keys that collide": (b"}(" + collide * 48 + b"u", None),
        "long keys that are equal": (key + key + b"}(" + b"h\x00Nh\x01N" * 24_000 + b"u\x87", None),
        "text that grows fourfold": (b"](" + emoji * 200 + b"e", None),
    }


# Loads each file in a process of its own, and prints what its peak of memory adds (MB), and the error.
LOADER = """
import json, os, pathlib, resource, sys
import utils

def status(word):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(word + ":")[1].split()[0]) / 1e3

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    before, error = status("VmHWM"), None
    try:
        utils.load_pickle(path)
    except utils.UserError as refusal:
        error = str(refusal)
    print(json.dumps([status("VmHWM") - before, error]), flush=True)
    os._exit(0)
"""


def load_measured(paths):
    """[(peak in MB, error or None)] of loading each file."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of memory is read from Linux' /proc")
    command = [sys.executable, "-c", LOADER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_memory_stays_below_five_times_the_file_and_100_mb(tmp_path):
    cases = bombs()
    paths = [
        written(tmp_path / f"{n}.pkl", b"\x80\x05" + instructions + b".")
        for n, (instructions, _) in enumerate(cases.values())
    ]
    for label, path, (peak, error) in zip(cases, paths, load_measured(paths), strict=True):
        assert peak < 5 * path.stat().st_size / 1e6 + 100, label
        reason = cases[label][1]
        assert (error is None) == (reason is None), f"{label}: {error}"
        assert reason is None or (reason in error and str(path) in error), f"{label}: {error}"


def test_an_array_takes_the_memory_of_its_file(tmp_path):
    features = np.random.default_rng(0).integers(0, 99, (20_000, 1000)).astype(np.float16)  # 40 MB
    paths = [written(tmp_path / f"{protocol}.pkl", features, protocol) for protocol in PROTOCOLS]
    for peak, error in load_measured(paths):
        assert error is None
        assert 38 < peak < 48


# --- Damage ------------------------------------------------------------------------------------------------------

HONEST = [
    pickle.dumps(value, protocol)
    for protocol in PROTOCOLS
    for value in (
        {0: "air_conditioner", 3: "dog_bark"},
        np.arange(12, dtype=np.float16).reshape(3, 4),
        [np.arange(3), (1.5, None, "x", {"a": b"bytes"}), np.float32(2), np.arange(6).reshape(2, 3).T],
    )
]


@pytest.mark.parametrize("n", range(len(HONEST)))
def test_truncated_anywhere(tmp_path, n):
    for end in range(len(HONEST[n])):
        path = written(tmp_path / "a.pkl", HONEST[n][:end])
        with pytest.raises(UserError, match=r"a\.pkl is (damaged|refused)"):
            utils.load_pickle(path)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "damaged"),
        (bytes(1000), "refused"),
        (b"\x80", "damaged"),
        (b"\x80\x05", "damaged"),
        (b"\x80\x05.", "damaged"),
        (b"\x80\x06N.", "protocol 3, 4 or 5"),
        (b"\x80\x02N.", "protocol 3, 4 or 5"),
        (b"\x80\x05NN.", "damaged"),
        (b"\x80\x05(.", "damaged"),
        (b"\x80\x05h\x07.", "damaged"),
        (b"\x80\x05\x8c\x02\xff\xfe.", "damaged"),
        (b"\x80\x05}(K\x01u.", "damaged"),
        (b"slice_file_name,fsID\n", "protocol 3, 4 or 5"),
        (b"<!DOCTYPE html><html></html>", "protocol 3, 4 or 5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "protocol 3, 4 or 5"),
        (b"\x93NUMPY\x01\x00", "protocol 3, 4 or 5"),
        (b"PK\x03\x04", "protocol 3, 4 or 5"),
    ],
)
def test_what_is_no_whole_pickle(tmp_path, data, reason):
    path = written(tmp_path / "a.pkl", data)
    with pytest.raises(UserError, match=reason) as caught:
        utils.load_pickle(path)
    assert str(path) in str(caught.value)


def test_file_that_is_not_there_and_folder(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UserError, match="can't read") as caught:
            utils.load_pickle(path)
        assert str(path) in str(caught.value)


def opened_or_refused(path):
    """Nothing but a value or a UserError that names the file comes out."""
    try:
        return utils.load_pickle(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@settings(fixed, max_examples=800)
@given(st.integers(0, 2**32))
def test_bits_and_bytes_that_change(tmp_path, seed):
    rng = random.Random(seed)
    data = bytearray(rng.choice(HONEST))
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(data))
        change = rng.randrange(4)
        if change == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[start] = rng.randrange(256)
        elif change == 2:
            del data[start : start + rng.randrange(1, 9)]
        else:
            data[start:start] = data[rng.randrange(len(data)) :][: rng.randrange(1, 30)]
        data = data or bytearray(b".")
    opened_or_refused(written(tmp_path / "a.pkl", bytes(data)))


instructions = st.one_of(
    st.sampled_from([bytes([code]) for code in b"NK\x01()]}\x8ftaesu\x85\x86\x87\x90\x91\x94Rb\x93"]),
    st.sampled_from([FUNCTION, TYPE, ARRAY, FLOAT, name("numpy._core.multiarray", "scalar"), text("C"), text("<")]),
    st.sampled_from([name("numpy._core.numeric", "_frombuffer"), b"C\x04abcd", b"\x96\x04" + bytes(11), b"K\x02\x85"]),
    st.integers(0, 9).map(lambda n: b"h" + bytes([n])),
    st.binary(min_size=1, max_size=2),
)


@settings(fixed, max_examples=800)
@given(st.lists(instructions, max_size=25))
def test_programs_of_any_instructions(tmp_path, program):
    path = written(tmp_path / "a.pkl", b"\x80\x05" + b"".join(program) + b".")
    value = opened_or_refused(path)
    assert same(utils.load_pickle(written(path, pickle.dumps(value, 4))), value)  # and it is plain
