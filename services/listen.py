"""The loop behind `python predict.py --mic`: blocks of sound in, a line a second out.

Each line is the time, the class that the last seconds were most like, its probability and a bar. A decision takes
4 s of sound, as in training, and the last few decisions are averaged, so that one odd second does not change the line.
"""

import collections

import numpy as np

from reports import answers
from services import sound_device
from utils import UserError

HOP_SECONDS = 1.0  # s from one line to the next
SMOOTHING = 4  # decisions that a line is the mean of


def cut_windows(blocks, rate, seconds):
    """Yield (time in s, the last `seconds` of sound, shape (n,)) after every HOP_SECONDS of sound.

    blocks: iterable of mono samples at `rate` Hz, of any lengths. The first windows are shorter: all there is so far.
    """
    length, hop = round(seconds * rate), round(HOP_SECONDS * rate)
    waiting = np.zeros(0, np.float32)  # heard, and not yet in a window
    window = np.zeros(0, np.float32)
    heard = 0
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        while len(waiting) >= hop:
            window = np.concatenate([window, waiting[:hop]])[-length:]
            waiting = waiting[hop:]
            heard += hop
            yield heard / rate, window


def describe(seconds, window, recent, classify, class_names):
    """Return the line for a window; recent: deque of the last decisions, (classes,) each, which it adds to."""
    time = f"{int(seconds) // 60:3d}:{int(seconds) % 60:02d}"
    if not window.any():
        recent.clear()
        return f"{time}  silence: not one sample differs from zero. Is the microphone muted?"
    recent.append(classify(window))
    mean = np.mean(recent, axis=0)  # (classes,)
    if not np.isfinite(mean).all():
        raise UserError("the model gives no probabilities for this sound: train or fetch it again")
    best = int(mean.argmax())
    bar = answers.bar(mean[best])
    return f"{time}  {class_names[best]:<{max(map(len, class_names))}}  {mean[best]:6.1%}  {bar}".rstrip()


def listen(blocks, classify, class_names, rate, seconds):
    """Print a line a second of sound, until the blocks end.

    blocks: iterable of mono samples at `rate` Hz; classify: function from samples (n,) to probabilities (classes,);
    seconds: length of a decision.
    """
    recent = collections.deque(maxlen=SMOOTHING)
    for time, window in cut_windows(blocks, rate, seconds):
        print(describe(time, window, recent, classify, class_names), flush=True)


def listen_to_microphone(classify, info):
    """Print a line a second of what the default microphone hears, until Ctrl-C. UserError if there is none.

    classify: as in `listen`; info: a model's metadata.
    """
    rate, seconds = info["audio"]["sample_rate"], info["audio"]["clip_seconds"]
    print(f"listening to {sound_device.describe_device('input')[0]}; Ctrl-C ends it")
    listen(sound_device.record(rate), classify, info["class_names"], rate, seconds)
