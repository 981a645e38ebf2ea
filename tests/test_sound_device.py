"""Playing and recording, on a sound card of files (alsa.py), and the one line where there is no sound."""

import importlib.metadata
import json
import os
import subprocess
import sys

import alsa
import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import check_setup
import create_test_tone

NO_PACKAGE = "import sys; sys.modules['sounddevice'] = None"
NO_PORTAUDIO = "import ctypes.util; ctypes.util.find_library = lambda name: None"


def run_python(program, env=None, **options):
    """Run a program that can import the project's files."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, **options)


def refusal(done):
    """The one line that a run without sound ends with."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def strongest_frequency(samples, rate):
    """Return the frequency in Hz of the largest line in the spectrum."""
    return np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)


# --- No sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        (NO_PACKAGE, "python -m pip install sounddevice"),
        pytest.param(
            NO_PORTAUDIO,
            "sudo apt install libportaudio2",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is in the package"),
        ),
    ],
)
def test_missing_package_or_library_is_one_line_with_the_remedy(missing, remedy, tmp_path):
    done = run_python(f"{missing}; import utils, test_playsound_app as app; utils.run(app.main)", cwd=tmp_path)
    assert remedy in refusal(done)
    assert done.stdout == "test_tone.wav made\n"


def test_no_device_is_one_line_with_the_remedy(run_script, tmp_path):
    env = alsa.no_sound_card(tmp_path)
    line = refusal(run_script("test_playsound_app.py", cwd=tmp_path, env=env))
    assert "no loudspeaker here: connect one" in line
    done = run_python("import utils, sound_device; utils.run(lambda: next(sound_device.record(22050)))", env)
    assert "no microphone here: connect one" in refusal(done)


def test_setup_without_portaudio_is_complete():
    assert check_setup.check_package("sounddevice") == (importlib.metadata.version("sounddevice"), None)


# --- Playing -----------------------------------------------------------------------------------------------------


def test_app_makes_the_tone_and_plays_it(run_script, tmp_path):
    env = alsa.sound_card(tmp_path)
    done = run_script("test_playsound_app.py", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    made, playing, played = done.stdout.splitlines()
    assert made == "test_tone.wav made"
    assert playing == "playing test_tone.wav (2.00 s) on default (48000 Hz)"
    assert played.startswith("played. ")
    tone = soundfile.read(tmp_path / "test_tone.wav")[0]
    heard = alsa.played(tmp_path)  # resampled to the card's rate
    assert strongest_frequency(heard, alsa.RATE) == pytest.approx(440, abs=0.5)
    assert np.abs(heard).max() == pytest.approx(np.abs(tone).max(), abs=0.002)


def test_app_plays_the_tone_that_is_there(run_script, tmp_path):
    env = alsa.sound_card(tmp_path)
    tone = create_test_tone.tone(1000, 0.5, -6, alsa.RATE)
    create_test_tone.write_tone(tmp_path / "test_tone.wav", tone, alsa.RATE)
    written = (tmp_path / "test_tone.wav").read_bytes()
    done = run_script("test_playsound_app.py", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "made" not in done.stdout
    assert (tmp_path / "test_tone.wav").read_bytes() == written
    heard = alsa.played(tmp_path)
    start = np.correlate(heard, tone, "valid").argmax()  # PortAudio begins with some silence, and dithers
    assert np.abs(heard[start : start + len(tone)] - tone).max() < 4 / 32768
    assert np.abs(heard[:start]).max(initial=0) < 4 / 32768
    assert np.abs(heard[start + len(tone) :]).max(initial=0) < 4 / 32768


def test_app_names_a_tone_that_can_not_be_read(run_script, tmp_path):
    (tmp_path / "test_tone.wav").write_text("no sound")
    line = refusal(run_script("test_playsound_app.py", cwd=tmp_path))
    assert "test_tone.wav can't be read" in line
    assert "delete it" in line


def test_pytest_finds_no_test_in_the_app():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "test_playsound_app.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 5, done.stdout  # pytest's status for no test
    assert run_python("import test_playsound_app").stdout == ""


# --- Recording ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [alsa.RATE, 22_050])
def test_microphone_gives_blocks_at_the_rate_asked_for(rate, tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(20 * alsa.RATE) / alsa.RATE)
    env = alsa.sound_card(tmp_path, heard=tone)
    program = (
        "import json, itertools, numpy as np, sound_device\n"
        f"blocks = list(itertools.islice(sound_device.record({rate}), 12))\n"
        "assert {block.dtype.name for block in blocks} == {'float32'}\n"
        "print(json.dumps([np.concatenate(blocks).tolist(), sound_device.describe_device('input')]))"
    )
    done = run_python(program, env)
    assert (done.returncode, done.stderr) == (0, "")
    heard, device = json.loads(done.stdout)
    assert device == ["default", alsa.RATE]
    assert len(heard) == pytest.approx(12 * rate / 4, abs=0.1 * rate)  # a quarter of a second each
    assert strongest_frequency(heard, rate) == pytest.approx(1000, abs=2)
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.01)
