"""Playing, recording and listening, on a sound card of files, and the one line where there is no sound.

The card is ALSA's own file and null devices: it works at 48 kHz alone, as many a real one does, and does not wait, so
that seconds of sound pass at once. Without PortAudio these tests are skipped.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from untrained import write_model

from audio import read_audio
from services import sound

CARD_RATE = 48_000  # Hz
CARD = """
pcm.nothing {{ type null }}
pcm.card {{ type file, slave.pcm nothing, format "raw", file "{played}", infile "{heard}" }}
pcm.default {{ type plug, slave {{ pcm card, rate {rate}, format S16_LE, channels 1 }} }}
"""
NO_CARD = "pcm.broken {{ type empty }}\n"
NO_PACKAGE = "import sys; sys.modules['sounddevice'] = None"
NO_PORTAUDIO = "import ctypes.util; ctypes.util.find_library = lambda name: None"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PortAudio is in the package")


def sound_card(folder, heard=(), card=CARD):
    """Return the environment with a card whose microphone hears mono samples at CARD_RATE, full scale 1."""
    names = {name: folder / f"{name}.raw" for name in ("played", "heard")}
    names["heard"].write_bytes((np.asarray(heard) * 32767).astype("<i2").tobytes())
    (folder / "asound.conf").write_text(card.format(rate=CARD_RATE, **names))
    env = {**os.environ, "ALSA_CONFIG_PATH": str(folder / "asound.conf")}
    if sys.platform != "linux":
        pytest.skip("ALSA is Linux's")
    if (done := run_python("import sounddevice", env)).returncode:
        pytest.skip(done.stderr.splitlines()[-1])
    return env


def played(folder):
    """Return what the card's loudspeaker has played: mono samples at CARD_RATE, full scale 1, shape (n,)."""
    return np.fromfile(folder / "played.raw", "<i2") / 32768


def run_python(program, env=None, **options):
    """Run a program that can import the project's files."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, **options)


def refusal(done):
    """Return the one line that a refused run ends with."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def strongest_frequency(samples, rate):
    """Return the frequency in Hz of the largest line in the spectrum."""
    return np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)


# --- Without sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [(NO_PACKAGE, "pip install sounddevice"), pytest.param(NO_PORTAUDIO, "apt install libportaudio2", marks=ON_LINUX)],
)
def test_app_without_library_is_one_line_with_the_remedy(missing, remedy, tmp_path):
    done = run_python(f"{missing}; import utils, test_playsound_app as app; utils.run(app.main)", cwd=tmp_path)
    assert remedy in refusal(done)
    assert done.stdout == "test_tone.wav made\n"


def test_no_device_is_one_line_with_the_remedy(scripts, tmp_path):
    env = sound_card(tmp_path, card=NO_CARD)
    assert "no loudspeaker here: connect one" in refusal(scripts.run("test_playsound_app", cwd=tmp_path, env=env))
    done = run_python("import utils; from services import sound; utils.run(lambda: next(sound.record(22050)))", env)
    assert "no microphone here: connect one" in refusal(done)


# --- Playing and recording ---------------------------------------------------------------------------------------


def test_app_makes_the_tone_and_plays_it(scripts, tmp_path):
    env = sound_card(tmp_path)
    done = scripts.run("test_playsound_app", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    made, playing, ended = done.stdout.splitlines()
    assert (made, playing) == ("test_tone.wav made", "playing test_tone.wav (2.00 s) on default (48000 Hz)")
    assert ended.startswith("played. ")
    heard, tone = played(tmp_path), soundfile.read(tmp_path / "test_tone.wav")[0]
    assert strongest_frequency(heard, CARD_RATE) == pytest.approx(440, abs=0.5)  # resampled to the card's rate
    assert np.abs(heard).max() == pytest.approx(np.abs(tone).max(), abs=0.002)


def test_app_names_a_tone_that_can_not_be_read(scripts, tmp_path):
    (tmp_path / "test_tone.wav").write_text("no sound")
    assert "test_tone.wav can't be read" in refusal(scripts.run("test_playsound_app", cwd=tmp_path))


@pytest.mark.parametrize("rate", [CARD_RATE, 22_050])
def test_microphone_gives_blocks_at_the_rate_asked_for(rate, tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(20 * CARD_RATE) / CARD_RATE)
    env = sound_card(tmp_path, heard=tone)
    program = (
        "import json, itertools, numpy as np; from services import sound\n"
        f"blocks = list(itertools.islice(sound.record({rate}), 12))\n"
        "assert {block.dtype.name for block in blocks} == {'float32'}\n"
        "print(json.dumps([np.concatenate(blocks).tolist(), sound.describe_device('input')]))"
    )
    done = run_python(program, env)
    assert (done.returncode, done.stderr) == (0, "")
    heard, device = json.loads(done.stdout)
    assert device == ["default", CARD_RATE]
    assert len(heard) == pytest.approx(12 * rate / 4, abs=0.1 * rate)  # a quarter of a second each
    assert strongest_frequency(heard, rate) == pytest.approx(1000, abs=2)
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.01)


# --- Listening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[], [350], [1] * 250, [99, 1, 640, 0, 12]])
def test_windows_are_the_last_seconds_whatever_the_blocks(lengths):
    rate = 100  # Hz
    samples = np.arange(sum(lengths), dtype=np.float32)
    windows = list(sound.last_seconds(np.split(samples, np.cumsum(lengths)[:-1]), rate, 4))
    assert [time for time, _ in windows] == list(range(1, len(samples) // rate + 1))
    for second, window in windows:
        end = int(second) * rate
        assert np.array_equal(window, samples[max(0, end - 4 * rate) : end])


def test_line_is_the_mean_of_the_last_decisions_since_silence(capsys):
    sirens = [0.9, 0.2, 0.8, 0.7, 0.0, 0.1, 0.0, 0.0, 0.0, 0.25]
    decisions = (np.array([1 - siren, siren]) for siren in sirens)
    blocks = [np.ones(600), np.zeros(400), np.ones(100)]  # at 100 Hz, in windows of 4 s: the tenth is silent
    sound.listen(blocks, lambda window: next(decisions), ["dog_bark", "siren"], 100, 4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"0:{second:02d}" for second in range(1, 12)]
    assert [line[1] for line in lines[:6]] == ["siren"] * 4 + ["dog_bark"] * 2
    assert [line[2] for line in lines[:6]] == ["90.0%", "55.0%", "63.3%", "65.0%", "57.5%", "60.0%"]
    assert lines[9][1] == "silence:"
    assert lines[10][1:3] == ["dog_bark", "75.0%"]


def test_microphone_until_ctrl_c(miniature, tmp_path):
    path = write_model(tmp_path, 0)
    files = sorted((miniature / "audio" / "fold1").glob("*.wav"))[:4]
    env = sound_card(tmp_path, heard=np.concatenate([read_audio(file, CARD_RATE) for file in files]))
    command = [sys.executable, str(REPOSITORY / "predict.py"), "--mic", "--model_dir", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=env) as run:
        lines = [run.stdout.readline() for _ in range(4)]
        run.send_signal(signal.SIGINT)
        errors = run.communicate()[1]
    assert lines[0] == "listening to default; Ctrl-C ends it\n"
    assert [line.split()[0] for line in lines[1:]] == ["0:01", "0:02", "0:03"]
    assert all("%" in line for line in lines[1:])
    assert (run.returncode, errors.strip()) == (130, "Stopped.")
