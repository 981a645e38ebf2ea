"""Write a test tone: something to hear, and to try a loudspeaker or predict.py with.

    python create_test_tone.py                                             # test_tone.wav: 440 Hz for 2 s
    python create_test_tone.py --frequency 1000 --seconds 5 --level -20

Writes a mono sine as 16-bit WAV, both ends faded against clicks, and prints what is in the file.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import soundfile

import utils
from utils import UserError

FILE_NAME = "test_tone.wav"
FREQUENCY = 440.0  # Hz; the a' that orchestras tune to
SECONDS = 2.0  # s
LEVEL = -12.0  # dBFS; peak; 0 is the loudest that a file can hold
RATE = 44_100  # Hz; every sound card plays it
FADE_SECONDS = 0.01  # s; at each end


def tone(frequency=FREQUENCY, seconds=SECONDS, level=LEVEL, rate=RATE):
    """Return (seconds · rate,) float64 samples of a faded sine; level is its peak's. UserError: value out of range."""
    for name, value, low, high in (
        ("rate", rate, 8_000, 192_000),
        ("frequency", frequency, 1, rate / 2 - 1),  # at half the rate, a sine is silence
        ("seconds", seconds, 0.001, 600),
        ("level", level, -80, 0),  # below it, 16 bits leave a sine only a few steps
    ):
        if not low <= value <= high:
            raise UserError(f"--{name} {value:g} is outside {low:g} to {high:g}: change it")
    time = np.arange(round(seconds * rate)) / rate  # (n,) s
    to_end = np.minimum(time, time[-1] - time)  # (n,) s to the nearer end
    fade = np.sin(np.pi / 2 * np.minimum(to_end / FADE_SECONDS, 1)) ** 2  # (n,) 0 to 1
    return 10 ** (level / 20) * np.sin(2 * np.pi * frequency * time) * fade


def write_tone(path, samples, rate):
    """Write samples as a 16-bit WAV file, atomically. UserError if that fails, or the name has another ending."""
    if path.suffix.lower() != ".wav":
        raise UserError(f"{path} does not end in .wav: the tone is written as WAV")
    wav = io.BytesIO()  # soundfile prints tracebacks of its own when a Python file is full
    soundfile.write(wav, samples, rate, subtype="PCM_16", format="WAV")
    try:
        with utils.atomic_write(path) as file:
            file.write(wav.getbuffer())
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}): name another file with --output") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--frequency", type=float, default=FREQUENCY, metavar="HZ", help=f"of the tone (default: {FREQUENCY:g})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"length of the tone (default: {SECONDS:g})")
    add("--level", type=float, default=LEVEL, metavar="DBFS", help=f"peak level, 0 at most (default: {LEVEL:g})")
    add("--rate", type=int, default=RATE, metavar="HZ", help=f"sampling rate of the file (default: {RATE})")
    add(
        "--output",
        type=utils.home_path,
        default=Path(FILE_NAME),
        metavar="FILE",
        help=f"WAV file (default: {FILE_NAME})",
    )
    args = parser.parse_args()
    write_tone(args.output, tone(args.frequency, args.seconds, args.level, args.rate), args.rate)
    print(f"{args.output}: {args.frequency:g} Hz, {args.seconds:g} s, {args.level:g} dBFS, sampled at {args.rate} Hz")


if __name__ == "__main__":
    utils.run(main)
