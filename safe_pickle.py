"""Reads pickles without running code: arrays, lists, tuples, dictionaries, numbers and text, and nothing else.

A pickle is a program, and a data file may come from an untrusted source. This is Python's own unpickler with only the
instructions that such data needs. It looks up no name: those that numpy writes for an array stand for functions of this
file. No more is read than the file has, and MAX_STEPS bounds everything else.
"""

import io
import pickle
import pickletools
import re
import types

import numpy as np

MAX_STEPS = 200_000  # reads from the file, and items of containers; an array takes about 100 whatever its size
MAX_TEXT = 1024  # bytes of one string
MAX_KEY = 64  # bits of an integer; so few of these share a hash that no dictionary gets slow
MIN_MAPPED = 1 << 20  # bytes; smaller arrays are read

DTYPES = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,4}")
KEYS = (str, int, float, type(None), np.integer, np.floating, np.bool_)  # quick to hash and compare
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

    memory_map: leave large arrays on the disk, to be read as they are used. Writing changes this process's copy alone.

    Refused names what is not plain data; any other exception means that the file is damaged. Memory stays below five
    times the file's size plus 100 MB; for the arrays of `utils.save_pickle` it is the file's size.
    """
    return _Unpickler(file, memory_map).load()


class _Array:
    """Stands for an array while the file is read: BUILD may come after others refer to it."""

    array = None

    def fill(self, memory, dtype, shape, order, axes=()):
        if not isinstance(dtype, np.dtype) or not type(shape) is type(axes) is tuple:  # a list could unfold to millions
            raise Refused("an array without type or shape")
        self.array = np.frombuffer(memory, dtype).reshape(shape, order="C" if axes else order)
        if axes:  # in a different order than in memory
            self.array = self.array.transpose(axes)
        return self


def _dtype(code, _align, _copy):
    if not DTYPES.fullmatch(code) or np.dtype(code).itemsize > MAX_TEXT:
        raise Refused(f"an array of type {code[:80]!a}")
    return np.dtype(code, copy=True)  # BUILD sets its byte order in place


def _encode(text, encoding):
    """Return the bytes that protocol 2 writes as Latin-1 text. Long text is bytes already: see load_binunicode."""
    if encoding != "latin1":
        raise Refused("a call of _codecs.encode for something other than bytes")
    return text if type(text) is bytes else text.encode("latin1")


NAMES = {  # what they stand for; numpy 1 writes numpy.core
    "numpy.ndarray": _Array,  # an argument only
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray.scalar": lambda dtype, memory: _Array().fill(memory, dtype, (), "C").array[()],
    "numpy._core.numeric._frombuffer": lambda *parts: _Array().fill(*parts),
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",
}


class _Dict(dict):
    def __setitem__(self, key, value):
        if not isinstance(key, KEYS) or (type(key) is int and key.bit_length() > MAX_KEY):
            raise Refused(f"a {type(key).__name__} as a key")
        super().__setitem__(key, value)


class _Instructions(dict):
    def __missing__(self, code):
        opcode = pickletools.code2op.get(chr(code))
        raise Refused(f"the pickle instruction {opcode.name if opcode else code}")


class _Unpickler(pickle._Unpickler):
    dispatch = _Instructions()  # {code: method}, filled below

    def __init__(self, file, memory_map):
        super().__init__(types.SimpleNamespace(read=self.take, readline=lambda: file.readline(MAX_TEXT)))
        self.file, self.memory_map, self.steps = file, memory_map, 0
        self.size = file.seek(0, io.SEEK_END)  # bytes
        file.seek(0)

    def load(self):
        code, protocol = self.take(2)
        if code != pickle.PROTO[0] or not 2 <= protocol <= 5:
            raise Refused("no pickle of protocol 2 to 5")
        value = super().load()
        if self.stack or self.metastack or self.file.read(1):
            raise Refused("something after its end")
        return self.plain(value)

    def plain(self, value):
        """Return a copy of `value` with its arrays in place. Shared parts count each time: a small file stays small."""
        self.step()
        if type(value) is _Dict:
            return {key: self.plain(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.plain(item) for item in value)
        if type(value) is _Array and value.array is not None:
            return value.array
        if not isinstance(value, (*KEYS, bytes, np.generic)):
            raise Refused("a part of an array without the array")
        return value

    def step(self):
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Refused(f"more than {MAX_STEPS} instructions and items")

    def take(self, n):
        """Read n bytes, or what is left: then pickle finds no next instruction, which is an EOFError."""
        self.step()
        return self.file.read(min(n, self.size))

    def load_frame(self):
        self.read(8)  # frames say how much to read at once, and the file is buffered

    def load_binunicode(self):
        text = self.read(int.from_bytes(self.read(4), "little"))
        if len(text) <= MAX_TEXT:
            self.append(str(text, "utf-8", "surrogatepass"))
        elif self.stack[-1:] == [_encode] and np.frombuffer(text, np.uint8).max() <= 0xC3:
            self.append(text.decode().encode("latin1"))  # an array's memory in protocol 2: a str of 1 byte a character
        else:
            raise Refused(f"text of {len(text)} bytes")

    def load_bytearray8(self):
        """Push memory that an array can write to, in large pages where numpy has them, or mapped from the file."""
        n = min(int.from_bytes(self.read(8), "little"), self.size)
        if self.memory_map and n >= MIN_MAPPED:
            start = self.file.tell()
            memory = np.memmap(self.file, np.uint8, "c", start, n)
            self.file.seek(start + n)
        else:
            memory = np.empty(n, np.uint8)
            self.file.readinto(memory)
        self.append(memoryview(memory))

    def load_empty_dictionary(self):
        self.append(_Dict())

    def find_class(self, module, name):
        if (function := NAMES.get(f"{module}.{name}".replace("numpy.core.", "numpy._core."))) is None:
            raise Refused(ascii(f"{module}.{name}"[:80])[1:-1])  # printable, whatever the file says
        return function

    def load_reduce(self):
        function, arguments = self.stack[-2:]
        if type(function) is not types.FunctionType or type(arguments) is not tuple:  # others could unfold to millions
            raise Refused(f"a call of a {type(function).__name__} with a {type(arguments).__name__}")
        super().load_reduce()

    def load_build(self):
        """Set a dtype's byte order, or an array's memory."""
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, np.dtype) and type(state) is tuple and state[2:5] == (None, None, None):  # no fields
            instance.__setstate__(instance.newbyteorder(state[1]).__reduce__()[2])  # numpy's state, not the file's
        elif type(instance) is _Array and type(state) is tuple:
            _version, shape, dtype, is_fortran, memory = state
            instance.fill(memory, dtype, shape, "F" if is_fortran else "C")
        else:
            raise Refused(f"a {type(state).__name__} as attributes of a {type(instance).__name__}")


for _name in INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Unpickler.dispatch[_code] = getattr(_Unpickler, pickle._Unpickler.dispatch[_code].__name__)
