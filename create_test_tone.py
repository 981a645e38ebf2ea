"""Write a test tone: something to hear, and to try a loudspeaker or predict.py with.

    python create_test_tone.py                                             # test_tone.wav: 440 Hz for 2 s
    python create_test_tone.py --frequency 1000 --seconds 5 --level -20
    python create_test_tone.py --rate 48000 --output tone_48k.wav

Writes a mono sine as 16-bit WAV and prints its path, frequency, length, level and rate. Both ends are faded, because a
sudden start or end clicks.
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
MAX_SECONDS = 600.0  # s
MIN_LEVEL = -80.0  # dBFS; below it, 16 bits leave a sine only a few steps
RATES = (8_000, 192_000)  # Hz; min and max


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--frequency", type=float, default=FREQUENCY, metavar="HZ", help=f"of the tone (default: {FREQUENCY:g})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"length of the tone (default: {SECONDS:g})")
    add("--level", type=float, default=LEVEL, metavar="DBFS", help=f"peak level, 0 at most (default: {LEVEL:g})")
    add("--rate", type=int, default=RATE, metavar="HZ", help=f"sampling rate of the file (default: {RATE})")
    add("--output", type=Path, default=Path(FILE_NAME), metavar="FILE", help=f"WAV file (default: {FILE_NAME})")
    return parser.parse_args()


def tone(frequency=FREQUENCY, seconds=SECONDS, level=LEVEL, rate=RATE):
    """Return a faded sine as float64 samples, shape (seconds · rate,). UserError for values out of range.

    frequency, rate: Hz; level: dBFS of the peak.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"--rate {rate} is outside {RATES[0]} to {RATES[1]} Hz: 44100 plays everywhere")
    if not 0 < frequency < rate / 2:
        raise UserError(
            f"--frequency {frequency:g} is outside 0 to {rate / 2:g} Hz, half the rate: lower it, or raise --rate"
        )
    if not 1 / rate <= seconds <= MAX_SECONDS:
        raise UserError(f"--seconds {seconds:g} is outside one sample to {MAX_SECONDS:g} s: change it")
    if not MIN_LEVEL <= level <= 0:
        raise UserError(f"--level {level:g} is outside {MIN_LEVEL:g} to 0 dBFS: 0 is the loudest")
    n = round(seconds * rate)
    samples = 10 ** (level / 20) * np.sin(2 * np.pi * frequency * np.arange(n) / rate)  # (n,)
    n_fade = min(round(FADE_SECONDS * rate), n // 2)
    fade = (1 - np.cos(np.pi * np.arange(n_fade) / max(n_fade, 1))) / 2  # (n_fade,) from 0 towards 1
    samples[:n_fade] *= fade
    samples[n - n_fade :] *= fade[::-1]
    return samples


def write_tone(path, samples, rate):
    """Write samples as a 16-bit WAV file, atomically. UserError if that fails, or the name has another ending."""
    path = Path(path)
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
    args = parse_args()
    samples = tone(args.frequency, args.seconds, args.level, args.rate)
    write_tone(args.output, samples, args.rate)
    print(f"{args.output}: {args.frequency:g} Hz, {args.seconds:g} s, {args.level:g} dBFS, sampled at {args.rate} Hz")


if __name__ == "__main__":
    utils.run(main)
