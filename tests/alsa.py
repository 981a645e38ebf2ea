"""A sound card of files, for machines with PortAudio and without sound: ALSA's own file and null devices.

The card works at 48 kHz alone, as many a real one does, and does not wait: seconds of sound pass at once.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

RATE = 48_000  # Hz; the card's only one

CONFIG = """
pcm.nothing {{ type null }}
pcm.card {{ type file, slave.pcm nothing, format "raw", file "{played}", infile "{heard}" }}
pcm.default {{ type plug, slave {{ pcm card, rate {rate}, format S16_LE, channels 1 }} }}
"""


def sound_card(folder, heard=()):
    """Return the environment variables of a card whose microphone hears mono samples at RATE, full scale 1.

    Skips the test where there is no PortAudio. `played` returns what the loudspeaker has played.
    """
    names = {name: folder / f"{name}.raw" for name in ("played", "heard")}
    names["heard"].write_bytes((np.asarray(heard) * 32767).astype("<i2").tobytes())
    (folder / "asound.conf").write_text(CONFIG.format(rate=RATE, **names))
    env = {"ALSA_CONFIG_PATH": str(folder / "asound.conf")}
    need_portaudio(env)
    return env


def no_sound_card(folder):
    """Return the environment variables of a machine with PortAudio and no sound card. Skips as `sound_card` does."""
    (folder / "asound.conf").write_text("pcm.broken { type empty }\n")
    env = {"ALSA_CONFIG_PATH": str(folder / "asound.conf")}
    need_portaudio(env)
    return env


def need_portaudio(env):
    """Skip the test where sounddevice finds no PortAudio."""
    if not sys.platform.startswith("linux"):
        pytest.skip("ALSA's file device is Linux's")
    command = [sys.executable, "-c", "import sounddevice"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no PortAudio here ({done.stderr.splitlines()[-1]})")


def played(folder):
    """Return what the card's loudspeaker has played: mono samples at RATE, full scale 1, shape (n,)."""
    return np.fromfile(folder / "played.raw", "<i2") / 32768
