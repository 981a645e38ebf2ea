"""Does sound come out? Play the test tone, and say on which device.

    python test_playsound_app.py

Plays test_tone.wav of the current folder, which it makes where it is missing (create_test_tone.py makes other tones).
No loudspeaker or no PortAudio is one line with the remedy, exit status 2. This is not an automatic test, despite its
name: pytest collects the folder tests/ alone.
"""

import argparse
from pathlib import Path

import soundfile

import create_test_tone
import utils
from services import sound
from utils import UserError


def read_or_make_tone(path):
    """Return (samples, rate in Hz) of the test tone, written first where there is none. UserError if it is damaged."""
    if not path.exists():
        create_test_tone.write_tone(path, create_test_tone.tone(), create_test_tone.RATE)
        print(f"{path} made")
    try:
        samples, rate = soundfile.read(path, always_2d=True)  # (n, channels)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} can't be read ({error}): delete it, and it is made again") from error
    return samples.mean(axis=1), rate


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    path = Path(create_test_tone.FILE_NAME)
    samples, rate = read_or_make_tone(path)
    name, own_rate = sound.describe_device("output")
    print(f"playing {path} ({len(samples) / rate:.2f} s) on {name} ({own_rate:g} Hz)")
    sound.play(samples, rate)
    print("played. Nothing heard? Look at the volume, and at the output device in the system's sound settings")


if __name__ == "__main__":
    utils.run(main)
