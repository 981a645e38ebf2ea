"""Loudspeaker and microphone: the only file that knows sounddevice, which plays and records through PortAudio.

    python -m sounddevice        # the devices that PortAudio finds; * or > and < mark the default ones

Sound is optional: no package, no PortAudio or no device is a UserError of one line with the remedy, and callers work
without sound where they can. Always the system's default devices, at their own rates: its sound settings choose them.
"""

import collections
import contextlib
import queue

import numpy as np
import soxr

from reports import answers
from utils import UserError

BLOCK_SECONDS = 0.25  # s; what the microphone hands over at a time
MAX_BLOCKS = 40  # kept for a reader that is late; what comes after is lost, rather than memory
PATIENCE_SECONDS = 5.0  # s without a block until the microphone counts as gone
HOP_SECONDS = 1.0  # s from one line of `listen` to the next
SMOOTHING = 4  # decisions that a line is the mean of, so that one odd second does not change it

# --- Devices -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sound_library():
    """Give the module sounddevice; its errors, a missing package and a missing PortAudio become UserErrors."""
    try:
        import sounddevice
    except ImportError as error:
        raise UserError("sound needs the package sounddevice: python -m pip install sounddevice") from error
    except Exception as error:  # OSError without PortAudio, its own PortAudioError where that can't start
        raise UserError(
            f"sound needs PortAudio ({error}): sudo apt install libportaudio2 (Debian, Ubuntu), or your system's "
            "package of PortAudio"
        ) from error
    try:
        yield sounddevice
    except sounddevice.PortAudioError as error:
        raise UserError(f"the device can't be used ({error}): close what else uses it, or choose another") from error


def describe_device(kind):
    """Return (name, its own sampling rate in Hz) of the default device; kind: "output" or "input".

    UserError if there is none.
    """
    with sound_library() as library:
        try:
            device = library.query_devices(kind=kind)
        except (library.PortAudioError, ValueError) as error:
            what = {"output": "loudspeaker", "input": "microphone"}[kind]
            raise UserError(
                f"no {what} here: connect one and choose it in the system's sound settings (python -m sounddevice "
                "lists the devices)"
            ) from error
    return device["name"], device["default_samplerate"]


def play(samples, rate):
    """Play mono samples to their end on the default loudspeaker. UserError if that can't be.

    samples: (n,), full scale 1; rate: Hz.
    """
    device_rate = describe_device("output")[1]
    samples = soxr.resample(samples, rate, device_rate)
    with sound_library() as library:
        library.play(np.asarray(samples, np.float32), device_rate, blocking=True)


def record(rate):
    """Yield what the default microphone hears, without end: mono float32 blocks, shape (about rate / 4,).

    rate: Hz. UserError if there is no microphone, or it stops.
    """
    device_rate = describe_device("input")[1]
    resampler = soxr.ResampleStream(device_rate, rate, 1, dtype="float32")
    blocks = queue.Queue(MAX_BLOCKS)

    def keep(block, *_):  # PortAudio calls this from a thread of its own, which must not wait
        with contextlib.suppress(queue.Full):
            blocks.put_nowait(block[:, 0].copy())  # (frames, channels): the one channel

    settings = {"samplerate": device_rate, "channels": 1, "dtype": "float32", "callback": keep}
    with sound_library() as library, library.InputStream(**settings, blocksize=round(device_rate * BLOCK_SECONDS)):
        while True:
            try:
                block = blocks.get(timeout=PATIENCE_SECONDS)
            except queue.Empty as error:
                raise UserError("the microphone sends nothing any more: connect it again") from error
            yield resampler.resample_chunk(block)


# --- predict.py --mic --------------------------------------------------------------------------------------------


def listen_to_microphone(classify, info):
    """Print a line a second of what the default microphone hears, until Ctrl-C. UserError if there is none.

    classify: function from samples (n,) to probabilities (classes,); info: a model's metadata.
    """
    rate, seconds = info["audio"]["sample_rate"], info["audio"]["clip_seconds"]
    print(f"listening to {describe_device('input')[0]}; Ctrl-C ends it")
    listen(record(rate), classify, info["class_names"], rate, seconds)


def listen(blocks, classify, class_names, rate, seconds):
    """Print a line a second of sound, until the blocks end: time, class, probability and a bar.

    blocks: iterable of mono samples at `rate` Hz; classify: as above; seconds: length of a decision.
    """
    recent = collections.deque(maxlen=SMOOTHING)  # decisions, (classes,) each
    for time, window in last_seconds(blocks, rate, seconds):
        clock = f"{int(time) // 60:3d}:{int(time) % 60:02d}"
        if not window.any():
            recent.clear()
            print(f"{clock}  silence: every sample is zero. Is the microphone muted?", flush=True)
            continue
        recent.append(classify(window))
        mean = np.mean(recent, axis=0)  # (classes,)
        best = int(mean.argmax())
        name = f"{class_names[best]:<{max(map(len, class_names))}}"
        print(f"{clock}  {name}  {mean[best]:6.1%}  {answers.bar(mean[best])}".rstrip(), flush=True)


def last_seconds(blocks, rate, seconds):
    """Yield (time in s, the last `seconds` of sound, shape (n,)) after every HOP_SECONDS of sound.

    blocks: iterable of mono samples at `rate` Hz, of any lengths. The first windows are shorter: all there is so far.
    """
    length, hop = round(seconds * rate), round(HOP_SECONDS * rate)
    waiting = window = np.zeros(0, np.float32)  # waiting: heard, and not yet in a window
    n_heard = 0
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        while len(waiting) >= hop:
            window, waiting = np.concatenate([window, waiting[:hop]])[-length:], waiting[hop:]
            n_heard += hop
            yield n_heard / rate, window
