"""create_test_tone.py: the file measured, and what is refused."""

import os

import numpy as np
import pytest
import soundfile

import create_test_tone
from utils import UserError


@pytest.mark.parametrize(
    "flags, name, frequency, seconds, level, rate",
    [
        ("", "test_tone.wav", 440, 2, -12, 44_100),
        (
            "--frequency=123.4 --seconds=0.75 --level=-40 --rate=8000 --output=a/b.WAV",
            "a/b.WAV",
            123.4,
            0.75,
            -40,
            8000,
        ),
    ],
)
def test_flags_decide_tone_and_file(scripts, tmp_path, flags, name, frequency, seconds, level, rate):
    done = scripts.run("create_test_tone", *flags.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{name}: {frequency} Hz, {seconds} s, {level} dBFS, sampled at {rate} Hz\n"
    info = soundfile.info(tmp_path / name)
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("WAV", "PCM_16", 1, rate)
    samples, _ = soundfile.read(tmp_path / name)
    assert len(samples) == seconds * rate
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * len(samples)))
    assert spectrum.argmax() * rate / (4 * len(samples)) == pytest.approx(frequency, abs=0.5)
    assert 20 * np.log10(np.abs(samples).max()) == pytest.approx(level, abs=0.1)


def test_ends_are_faded_against_clicks():
    tone = create_test_tone.tone(443.7, 1, 0, 44_100)  # ends in the middle of a cycle
    bare = np.sin(2 * np.pi * 443.7 * np.arange(44_100) / 44_100)
    is_high = np.fft.rfftfreq(44_100, 1 / 44_100) > 5000  # Hz; where only a click is heard
    clicks = [np.square(np.abs(np.fft.rfft(samples))[is_high]).sum() for samples in (tone, bare)]
    assert clicks[0] < clicks[1] / 1000
    assert np.allclose(tone[442:-442], bare[442:-442])  # the fades take 10 ms
    assert create_test_tone.tone(1000, 0.001).shape == (44,)


@pytest.mark.parametrize(
    "name, value",
    [("frequency", 22_050), ("frequency", float("nan")), ("seconds", 0), ("level", 0.1), ("rate", 7999)],
)
def test_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=f"--{name} {value:g} is outside"):
        create_test_tone.tone(**{name: value})


def test_home_folder_behind_an_equals_sign_is_found(scripts, tmp_path):
    env = {**os.environ, "HOME": str(tmp_path)}
    done = scripts.run("create_test_tone", "--output=~/tone.wav", cwd=tmp_path, env=env)
    assert done.returncode == 0 and (tmp_path / "tone.wav").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("output, words", [("tone.mp3", "end in .wav"), ("folder.wav", "can't write")])
def test_unwritable_file_is_one_line(scripts, tmp_path, output, words):
    (tmp_path / "folder.wav").mkdir()
    done = scripts.run("create_test_tone", "--output", output, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and output in done.stderr and words in done.stderr
