"""Loudspeaker and microphone: the only file that knows sounddevice, which plays and records through PortAudio.

    python -m sounddevice        # the devices that PortAudio finds; * or > and < mark the default ones

Sound is optional here: no package, no PortAudio or no device is a UserError of one line with the remedy, and what calls
this file goes on without sound where it can. Always the system's default devices: its sound settings choose them.
"""

import contextlib
import queue

import numpy as np
import soxr

from utils import UserError

BLOCK_SECONDS = 0.25  # s; what the microphone hands over at a time
MOST_BLOCKS = 40  # kept for a reader that is late; what comes after is lost, rather than memory
PATIENCE_SECONDS = 5.0  # s without a block until the microphone counts as gone
WORDS = {"output": ("loudspeaker", "plays"), "input": ("microphone", "records")}


def load_library():
    """Import and return sounddevice. UserError if it or PortAudio is missing."""
    try:
        import sounddevice
    except ImportError as error:
        raise UserError("sound needs the package sounddevice: python -m pip install sounddevice") from error
    except Exception as error:  # OSError without PortAudio, its own PortAudioError where that can't start
        raise UserError(
            f"sound needs PortAudio ({error}): sudo apt install libportaudio2 (Debian, Ubuntu), or your system's "
            "package of PortAudio"
        ) from error
    return sounddevice


def describe_device(kind):
    """Return (name, its own sampling rate in Hz) of the default device; kind: "output" or "input".

    UserError if there is none.
    """
    library = load_library()
    try:
        device = library.query_devices(kind=kind)
    except (library.PortAudioError, ValueError) as error:
        what, does = WORDS[kind]
        raise UserError(
            f"no {what} here: connect one and choose it in the system's sound settings (python -m sounddevice lists "
            f"what {does} here)"
        ) from error
    return device["name"], device["default_samplerate"]


def usable_rate(kind, rate):
    """Return `rate` if the default device takes it, else the device's own rate (Hz)."""
    library = load_library()
    own_rate = describe_device(kind)[1]
    check = library.check_output_settings if kind == "output" else library.check_input_settings
    try:
        check(samplerate=rate, channels=1)
    except library.PortAudioError:
        return own_rate
    return rate


@contextlib.contextmanager
def device_errors(kind):
    """Turn what PortAudio says of a device into a UserError."""
    library = load_library()
    try:
        yield library
    except library.PortAudioError as error:
        what = WORDS[kind][0]
        raise UserError(f"the {what} can't be used ({error}): close what else uses it, or choose another") from error


def play(samples, rate):
    """Play mono samples to their end on the default loudspeaker. UserError if that can't be.

    samples: (n,), full scale 1; rate: Hz.
    """
    device_rate = usable_rate("output", rate)
    if device_rate != rate:
        samples = soxr.resample(samples, rate, device_rate)
    with device_errors("output") as library:
        library.play(np.asarray(samples, np.float32), device_rate, blocking=True)


def record(rate):
    """Yield what the default microphone hears, without end: mono float32 blocks, shape (about rate / 4,).

    rate: Hz. UserError if there is no microphone, or it stops.
    """
    device_rate = usable_rate("input", rate)
    resampler = None if device_rate == rate else soxr.ResampleStream(device_rate, rate, 1, dtype="float32")
    blocks = queue.Queue(MOST_BLOCKS)

    def keep(block, *_):  # PortAudio calls this from a thread of its own, which must not wait
        with contextlib.suppress(queue.Full):
            blocks.put_nowait(block[:, 0].copy())  # (frames, channels): the one channel

    settings = {"samplerate": device_rate, "channels": 1, "dtype": "float32", "callback": keep}
    with (
        device_errors("input") as library,
        library.InputStream(**settings, blocksize=round(device_rate * BLOCK_SECONDS)),
    ):
        while True:
            try:
                block = blocks.get(timeout=PATIENCE_SECONDS)
            except queue.Empty as error:
                raise UserError("the microphone sends nothing any more: connect it again") from error
            yield block if resampler is None else resampler.resample_chunk(block)
