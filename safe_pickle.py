"""Pickles that can't run code: arrays, plain containers, numbers and text, and nothing else.

A pickle is a program for a small machine, and the processed files may come from a stranger. Python's own machine can
do anything; this one knows only the instructions that pickle and numpy write for such data, so there is nothing in it
to be turned against us. No name in the file is ever looked up: the few that numpy writes for an array stand for
functions below. Each length is checked against the file before memory is taken, and MAX_STEPS bounds the rest.
"""

import io
import pickle
import pickletools
import re
import struct
from types import FunctionType

import numpy as np

MAX_STEPS = 100_000  # instructions, and items of containers; an array takes about 60 whatever its size
MAX_DEPTH = 50  # containers inside each other
MAX_TEXT = 65_536  # bytes of one string
MAX_INTEGER = 9  # bytes of one number; every 64-bit number fits
MAX_SCALAR = 1024  # bytes of one numpy scalar
LEAST_MAPPED = 1 << 20  # bytes; smaller arrays are read

ARRAY_KINDS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,5}")
KEY_TYPES = (str, int, float, type(None), np.integer, np.floating, np.bool_)  # quick to hash, whoever chose the values
VALUE_TYPES = (*KEY_TYPES, bytes, np.generic, np.ndarray)


class Refused(Exception):
    """The file holds what a data file must not; the message names it."""


def load(file, memory_map=False):
    """Return what a pickle (a file open for reading, protocol 3 to 5) holds.

    memory_map: leave large arrays on the disk, which the system reads as they are used and keeps once for all processes
    of a machine. Writing to them changes this process's copy alone.

    Refused names what it will not build; any other exception means that the file is damaged. Memory stays below five
    times the file's size and 100 MB; for the arrays of `utils.save_pickle` it is the file's size.
    """
    return _Machine(file, memory_map).run()


# --- What numpy writes for an array -------------------------------------------------------------------------------


class _Dtype:
    """An array's type, whose byte order comes after it."""

    def __init__(self, code, *_align_and_copy):
        if type(code) is not str or not ARRAY_KINDS.fullmatch(code):
            raise Refused(f"an array of type {quoted(code)}")
        self.value = np.dtype(code)

    def set_state(self, _version, byte_order, *nested):
        if type(byte_order) is not str or any(part is not None for part in nested[:3]):
            raise Refused("an array type with parts of its own")
        self.value = self.value.newbyteorder(byte_order)


class _Array:
    """An array as protocols 3 and 4 (and 5, where its memory has gaps) write it: empty, then its state."""

    value = None

    def set_state(self, _version, shape, dtype, is_fortran, memory):
        self.value = _frombuffer(memory, dtype, shape, "F" if is_fortran else "C")


def _new_dtype(*parts):
    return _Dtype(*parts)


def _new_array(*_type_shape_and_code):
    return _Array()


def _frombuffer(memory, dtype, shape, order, axes=None):
    if type(memory) not in (bytes, memoryview) or type(dtype) is not _Dtype:
        raise Refused("an array without memory of its own")
    if type(shape) is not tuple or type(order) is not str or type(axes) not in (tuple, type(None)):
        raise Refused("an array without a shape")
    array = np.frombuffer(memory, dtype.value)
    if order == "K" and axes:  # axes in another order than in memory
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order=order)


def _new_scalar(dtype, memory):
    if type(memory) in (bytes, memoryview) and len(memory) > MAX_SCALAR:
        raise Refused(f"a number or string of {len(memory)} bytes")
    return _frombuffer(memory, dtype, (), "C")[()]


CALLS = {
    "numpy dtype": _new_dtype,
    "numpy ndarray": _Array,  # what the array is to be: an argument only, which can't be called
    **{f"numpy.{core}.multiarray _reconstruct": _new_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _frombuffer for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _new_scalar for core in ("core", "_core")},
}


# --- The machine --------------------------------------------------------------------------------------------------

NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}  # type of their length
MEMORIES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"}
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
CONTAINERS = {pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}  # items
FILLED_BY = {  # what an instruction may add items to
    pickle.APPEND: list,
    pickle.APPENDS: list,
    pickle.SETITEM: dict,
    pickle.SETITEMS: dict,
    pickle.ADDITEMS: set,
}
PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}


class _Machine:
    def __init__(self, file, memory_map):
        self.file, self.memory_map = file, memory_map
        self.left = file.seek(0, io.SEEK_END)  # bytes
        file.seek(0)
        self.steps = 0
        self.memo = {}
        self.stack, self.below = [], []  # the values since the last MARK, and those before it

    def run(self):
        if self.take(1) != pickle.PROTO or not 3 <= self.take(1)[0] <= 5:
            raise Refused("no pickle of protocol 3, 4 or 5")
        while (code := self.take(1)) != pickle.STOP:
            self.count(1)
            if not (self.push(code) or self.gather(code) or self.build(code)):
                raise Refused(f"the pickle instruction {name_of(code)}")
        (value,) = self.stack
        if self.below or self.left:
            raise Refused("something behind its end")
        return self.plain(value)

    def count(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Refused(f"more than {MAX_STEPS} instructions and items")

    def reserve(self, n):
        """Count n bytes of the file as read. EOFError, before memory is taken for them, if they are not there."""
        if n > self.left:
            raise EOFError(f"{n} bytes are wanted and {self.left} are left")
        self.left -= n

    def take(self, n):
        self.reserve(n)
        return self.file.read(n)

    def take_short(self, n, most):
        if n > most:
            raise Refused(f"a number or string of {n} bytes")
        return self.take(n)

    def take_number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take_line(self):
        line = self.file.readline(MAX_TEXT)
        self.reserve(len(line))
        return line.decode().rstrip("\n")

    def take_memory(self, n):
        """Return the next n bytes as memory that an array can write to, in large pages where numpy has them."""
        self.reserve(n)
        if self.memory_map and n >= LEAST_MAPPED:
            start = self.file.tell()
            memory = memoryview(np.memmap(self.file, np.uint8, "c", start, n))
            self.file.seek(start + n)
            return memory
        memory = memoryview(np.empty(n, np.uint8))
        done = 0
        while done < n and (step := self.file.readinto(memory[done:])):  # Linux reads 2 GB at once at most
            done += step
        return memory[:done]

    def push(self, code):
        """Put a constant, a number, text, memory, an empty container or a value met before on the stack."""
        if code in CONSTANTS:
            value = CONSTANTS[code]
        elif code in NUMBERS:
            value = self.take_number(NUMBERS[code])
        elif code == pickle.LONG1:
            value = int.from_bytes(self.take_short(self.take_number("<B"), MAX_INTEGER), "little", signed=True)
        elif code in TEXTS:
            value = self.take_short(self.take_number(TEXTS[code]), MAX_TEXT).decode("utf-8", "surrogatepass")
        elif code in MEMORIES:
            value = self.take(self.take_number(MEMORIES[code]))
        elif code == pickle.BYTEARRAY8:
            value = self.take_memory(self.take_number("<Q"))
        elif code in CONTAINERS:
            value = CONTAINERS[code]()
        elif code in GETS:
            value = self.memo[self.take_number(GETS[code])]
        else:
            return False
        self.stack.append(value)
        return True

    def gather(self, code):
        """Make a container of values on the stack, or add them to one; remember the value on top."""
        if code == pickle.MARK:
            self.below.append(self.stack)
            self.stack = []
        elif code in TUPLES:
            items = tuple(self.stack.pop() for _ in range(TUPLES[code]))
            self.stack.append(items[::-1])
        elif code == pickle.TUPLE:
            items = tuple(self.since_mark())
            self.stack.append(items)
        elif code == pickle.FROZENSET:
            items = frozenset(map(as_key, self.since_mark()))
            self.stack.append(items)
        elif code in FILLED_BY:
            self.fill(code)
        elif code == pickle.MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in PUTS:
            if (index := self.take_number(PUTS[code])) > self.steps:  # others' machines take memory up to the index
                raise Refused(f"memo index {index}")
            self.memo[index] = self.stack[-1]
        elif code == pickle.FRAME:
            if (length := self.take_number("<Q")) > self.left:
                raise EOFError(f"a frame of {length} bytes, and {self.left} are left")
        else:
            return False
        return True

    def since_mark(self):
        items, self.stack = self.stack, self.below.pop()
        return items

    def fill(self, code):
        if code == pickle.APPEND:
            items = [self.stack.pop()]
        elif code == pickle.SETITEM:
            items = [self.stack.pop(), self.stack.pop()][::-1]
        else:
            items = self.since_mark()
        container = self.stack[-1]
        if type(container) is not FILLED_BY[code]:
            raise Refused(f"items for a {type(container).__name__} by {name_of(code)}")
        if type(container) is list:
            container.extend(items)
        elif type(container) is set:
            container.update(map(as_key, items))
        else:
            container.update(zip(map(as_key, items[::2]), items[1::2], strict=True))

    def build(self, code):
        """Work the instructions by which numpy's arrays, and everything harmful, come about."""
        if code == pickle.GLOBAL:
            self.stack.append(call_of(self.take_line(), self.take_line()))
        elif code == pickle.STACK_GLOBAL:
            name, module = self.stack.pop(), self.stack.pop()
            self.stack.append(call_of(module, name))
        elif code == pickle.REDUCE:
            arguments, function = self.stack.pop(), self.stack.pop()
            if type(function) is not FunctionType:  # the functions of CALLS are the only ones ever on the stack
                raise Refused(f"a call of a {type(function).__name__}")
            self.stack.append(function(*as_tuple(arguments)))
        elif code == pickle.BUILD:
            state = self.stack.pop()
            if type(self.stack[-1]) not in (_Array, _Dtype):
                raise Refused(f"attributes for a {type(self.stack[-1]).__name__}")
            self.stack[-1].set_state(*as_tuple(state))
        else:
            return False
        return True

    def plain(self, value, depth=0):
        """Return a copy of `value` with its arrays in place. Shared parts count each time: a small file stays small."""
        self.count(1)
        if depth > MAX_DEPTH:
            raise Refused(f"containers inside each other, deeper than {MAX_DEPTH}")
        if type(value) is _Array and value.value is not None:
            return value.value
        if type(value) is dict:
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.plain(item, depth + 1) for item in value)
        if isinstance(value, VALUE_TYPES):
            return value
        raise Refused("a part of an array without the array")


def call_of(module, name):
    """Return the function that stands for a name of numpy's."""
    if type(module) is not str or type(name) is not str:
        raise Refused("a name that is not text")
    if (call := CALLS.get(f"{module} {name}")) is None:
        raise Refused(quoted(f"{module}.{name}"))
    return call


def as_tuple(value):
    """Return the arguments of a call, if they are that: anything else could unfold to millions."""
    if type(value) is not tuple:
        raise Refused(f"a {type(value).__name__} as arguments")
    return value


def as_key(value):
    """Return a key of a dictionary or member of a set, if a file can't make it slow to hash."""
    if not isinstance(value, KEY_TYPES):
        raise Refused(f"a {type(value).__name__} as a key")
    return value


def name_of(code):
    """Return an instruction's name."""
    opcode = pickletools.code2op.get(code.decode("latin-1"))
    return opcode.name if opcode else f"{code[0]}"


def quoted(value):
    """Return a value of the file as short text that a terminal shows and does nothing else with."""
    text = value if type(value) is str else type(value).__name__
    return text[:80].encode("unicode_escape").decode("ascii")
