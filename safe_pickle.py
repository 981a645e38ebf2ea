"""Reads pickles without running code: arrays, lists, tuples, dictionaries, numbers and text, and nothing else.

A pickle is a program, and a data file may come from an untrusted source. This is Python's own unpickler with only the
instructions that such data needs. It looks up no name: the few that numpy writes for an array stand for functions of
this file. Each length is checked against the file before memory is taken, and MAX_STEPS bounds everything else.
"""

import io
import pickle
import pickletools
import re
import types

import numpy as np

MAX_STEPS = 200_000  # reads from the file, and items of containers; an array takes about 100 whatever its size
MAX_DEPTH = 50  # containers inside each other
MAX_TEXT = 1024  # bytes of one string or numpy scalar
MAX_INTEGER = 64  # bits; so few such integers share a hash that no dictionary gets slow
MIN_MAPPED = 1 << 20  # bytes; smaller arrays are read

DTYPES = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,5}")
KEYS = (str, int, float, type(None), np.integer, np.floating, np.bool_)
VALUES = (*KEYS, bytes, np.generic, np.ndarray)
INSTRUCTIONS = """
    FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
"""


class Refused(Exception):
    """The file holds what a data file must not; the message names it."""


def load(file, memory_map=False):
    """Return what a pickle (a file open for reading, protocol 2 to 5) holds.

    memory_map: leave large arrays on the disk; the system reads them as they are used, once for all processes. Writing
    to them changes this process's copy alone.

    Refused names what is not plain data; any other exception means that the file is damaged. Memory stays below five
    times the file's size plus 100 MB; for the arrays of `utils.save_pickle` it is the file's size.
    """
    unpickler = _Unpickler(file, memory_map)
    return unpickler.plain(unpickler.load())


# --- What numpy's names stand for. REDUCE makes a dtype or an array, and BUILD sets its state. ----------------------


class _Dtype:
    def __init__(self, code, _align, _copy):
        if not DTYPES.fullmatch(code):
            raise Refused(f"an array of type {code[:80]!a}")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        _version, byte_order, *fields = state[:5]
        if any(field is not None for field in fields):
            raise Refused("an array type with fields")
        self.value = self.value.newbyteorder(byte_order)


class _Array:
    def __init__(self, _class, _shape, _code):
        self.value = self  # which is no plain data: refused if the state never comes

    def __setstate__(self, state):
        _version, shape, dtype, is_fortran, memory = state
        self.value = _frombuffer(memory, dtype, shape, "F" if is_fortran else "C")


def _frombuffer(memory, dtype, shape, order, axes=None):
    if type(memory) not in (bytes, memoryview) or type(dtype) is not _Dtype:
        raise Refused("an array without memory of its own")
    if type(shape) is not tuple or type(axes) not in (tuple, type(None)):  # numpy would copy a longer sequence
        raise Refused("an array without a shape")
    array = np.frombuffer(memory, dtype.value)
    if order == "K" and axes:  # axes in a different order than in memory
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order=order)


def _scalar(dtype, memory):
    array = _frombuffer(memory, dtype, (), "C")
    if array.nbytes > MAX_TEXT:
        raise Refused(f"a numpy scalar of {array.nbytes} bytes")
    return array[()]


def _encode(text, encoding):
    """Return the bytes that protocol 2 writes as Latin-1 text. Long text is bytes already: see load_binunicode."""
    if type(text) is bytes:
        return text
    if type(text) is not str or len(text) > MAX_TEXT or encoding != "latin1":
        raise Refused("a call of _codecs.encode for something other than bytes")
    return text.encode("latin1")


NAMES = {
    "numpy ndarray": object(),  # an argument only
    "numpy dtype": _Dtype,
    **{f"numpy.{core}.multiarray _reconstruct": _Array for core in ("core", "_core")},  # numpy 1 and 2
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _frombuffer for core in ("core", "_core")},
    "_codecs encode": _encode,
    "__builtin__ bytes": lambda: b"",
}


# --- The unpickler --------------------------------------------------------------------------------------------------


class _Instructions(dict):
    def __missing__(self, code):
        opcode = pickletools.code2op.get(chr(code))
        raise Refused(f"the pickle instruction {opcode.name if opcode else code}")


class _Unpickler(pickle._Unpickler):
    dispatch = _Instructions()  # {code: method}, filled below

    def __init__(self, file, memory_map):
        super().__init__(types.SimpleNamespace(read=self.take, readline=self.take_line))
        self.file, self.memory_map = file, memory_map
        self.left = file.seek(0, io.SEEK_END)  # bytes
        file.seek(0)
        self.steps = 0

    def load(self):
        code, protocol = self.take(2)
        if code != pickle.PROTO[0] or not 2 <= protocol <= 5:
            raise Refused("no pickle of protocol 2 to 5")
        value = super().load()
        if self.stack or self.metastack or self.left:
            raise Refused("something after its end")
        return value

    def plain(self, value, depth=0):
        """Return a copy of `value` with its arrays in place. Shared parts count each time: a small file stays small."""
        self.step()
        if depth > MAX_DEPTH:
            raise Refused(f"containers inside each other, deeper than {MAX_DEPTH}")
        if type(value) is dict:
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.plain(item, depth + 1) for item in value)
        if type(value) is _Array:
            value = value.value
        if not isinstance(value, VALUES):
            raise Refused("a part of an array without the array")
        return value

    def step(self, n=0):
        """Count a step, which reads n bytes. EOFError, before memory is taken, if they are not there."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Refused(f"more than {MAX_STEPS} instructions and items")
        if n > self.left:
            raise EOFError(f"{n} bytes expected, {self.left} left")
        self.left -= n

    def take(self, n):
        self.step(n)
        return self.file.read(n)

    def take_line(self):
        line = self.file.readline(MAX_TEXT)
        self.step(len(line))
        return line

    def number(self, n_bytes):
        return int.from_bytes(self.read(n_bytes), "little")

    def load_frame(self):
        """Only check the length: frames say how much to read at once, and the file is buffered."""
        if (n := self.number(8)) > self.left:
            raise EOFError(f"a frame of {n} bytes, {self.left} left")

    def load_long1(self):
        super().load_long1()
        if (bits := self.stack[-1].bit_length()) > MAX_INTEGER:
            raise Refused(f"an integer of {bits} bits")

    def load_binunicode(self):
        n = self.number(4)
        if n <= MAX_TEXT:
            self.append(str(self.read(n), "utf-8", "surrogatepass"))
            return
        if not self.stack or self.stack[-1] is not _encode:
            raise Refused(f"text of {n} bytes")
        data = self.read(n)  # the memory of an array, in protocol 2
        if np.frombuffer(data, np.uint8).max() > 0xC3:  # to decode more than Latin-1 could take six times the memory
            raise Refused(f"text of {n} bytes")
        self.append(data.decode().encode("latin1"))

    def load_bytearray8(self):
        """Push memory that an array can write to, in large pages where numpy has them, or mapped from the file."""
        n = self.number(8)
        self.step(n)
        if self.memory_map and n >= MIN_MAPPED:
            start = self.file.tell()
            memory = np.memmap(self.file, np.uint8, "c", start, n)
            self.file.seek(start + n)
        else:
            memory = np.empty(n, np.uint8)
            self.file.readinto(memory)
        self.append(memoryview(memory))

    def load_long_binput(self):
        if (index := self.number(4)) > len(self.memo):
            raise Refused(f"memo index {index}")
        self.memo[index] = self.stack[-1]

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def set_items(self, items):
        """Add keys and values to the dictionary on the stack. Keys are quick to hash and compare."""
        for key in items[::2]:
            if not isinstance(key, KEYS):
                raise Refused(f"a {type(key).__name__} as a key")
        dict.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))  # TypeError if it is no dictionary

    def find_class(self, module, name):
        if f"{module} {name}" not in NAMES:
            raise Refused(ascii(f"{module}.{name}"[:80])[1:-1])  # printable, whatever the file says
        return NAMES[f"{module} {name}"]

    def load_reduce(self):
        function, arguments = self.stack[-2:]
        if type(function) not in (type, types.FunctionType):  # all that are ever on the stack are those of NAMES
            raise Refused(f"a call of a {type(function).__name__}")
        if type(arguments) is not tuple:  # anything else could unfold to millions
            raise Refused(f"a {type(arguments).__name__} as arguments")
        super().load_reduce()

    def load_build(self):
        instance, state = self.stack[-2:]
        if type(instance) not in (_Array, _Dtype) or type(state) is not tuple:
            raise Refused(f"a {type(state).__name__} as attributes of a {type(instance).__name__}")
        super().load_build()


for _name in INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Unpickler.dispatch[_code] = getattr(_Unpickler, pickle._Unpickler.dispatch[_code].__name__)
