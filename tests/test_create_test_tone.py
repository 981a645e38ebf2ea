"""create_test_tone.py: what the file holds, measured, and what is refused."""

import subprocess

import numpy as np
import pytest
import soundfile

import create_test_tone
from utils import UserError


def strongest_frequency(samples, rate):
    """Return the frequency in Hz of the largest line in the spectrum."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * len(samples)))
    return spectrum.argmax() * rate / (4 * len(samples))


def peak_level(samples):
    """Return the peak in dBFS."""
    return 20 * np.log10(np.abs(samples).max())


def test_default_tone_lies_in_the_current_folder(run_script, tmp_path):
    done = run_script("create_test_tone.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "test_tone.wav: 440 Hz, 2 s, -12 dBFS, sampled at 44100 Hz\n"
    assert [path.name for path in tmp_path.iterdir()] == ["test_tone.wav"]
    info = soundfile.info(tmp_path / "test_tone.wav")
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("WAV", "PCM_16", 1, 44_100)
    samples, rate = soundfile.read(tmp_path / "test_tone.wav")
    assert len(samples) == 2 * rate
    assert strongest_frequency(samples, rate) == pytest.approx(440, abs=0.3)
    assert peak_level(samples) == pytest.approx(-12, abs=0.01)


def test_flags_change_the_tone_and_the_file(run_script, tmp_path):
    path = tmp_path / "new folder" / "low.WAV"
    flags = ("--frequency", 123.4, "--seconds", 0.75, "--level", -40, "--rate", 8000, "--output", path)
    done = run_script("create_test_tone.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: 123.4 Hz, 0.75 s, -40 dBFS, sampled at 8000 Hz\n"
    samples, rate = soundfile.read(path)
    assert (len(samples), rate) == (6000, 8000)
    assert strongest_frequency(samples, rate) == pytest.approx(123.4, abs=0.5)
    assert peak_level(samples) == pytest.approx(-40, abs=0.1)


def test_ends_are_faded_against_clicks():
    tone = create_test_tone.tone(443.7, 1, 0, 44_100)  # ends in the middle of a cycle
    bare = np.sin(2 * np.pi * 443.7 * np.arange(44_100) / 44_100)
    far = np.fft.rfftfreq(44_100, 1 / 44_100) > 5000  # Hz; where a click is heard and the tone is not
    clicks = [np.square(np.abs(np.fft.rfft(samples))[far]).sum() for samples in (tone, bare)]
    assert clicks[0] < clicks[1] / 1000
    assert tone[0] == 0
    assert abs(tone[-1]) < 1e-4
    middle = slice(441, -441)  # the fades are 10 ms
    assert np.array_equal(tone[middle], bare[middle])


@pytest.mark.parametrize("n_samples", [1, 2, 3, 100])
def test_tone_shorter_than_its_fades(n_samples):
    tone = create_test_tone.tone(1000, n_samples / 44_100, 0, 44_100)
    assert tone.shape == (n_samples,)
    assert np.abs(tone).max() <= 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"frequency": 4000, "rate": 8000}, "4000 Hz can't be sampled at 8000 Hz"),
        ({"frequency": 0}, "0 Hz can't be sampled"),
        ({"frequency": -440}, "-440 Hz can't be sampled"),
        ({"frequency": float("nan")}, "nan Hz can't be sampled"),
        ({"seconds": 0}, "0 s is no length"),
        ({"seconds": float("nan")}, "nan s is no length"),
        ({"seconds": 1e9}, "1e+09 s is no length"),
        ({"level": 0.1}, "0.1 dBFS is outside -80 to 0"),
        ({"level": -81}, "-81 dBFS is outside -80 to 0"),
        ({"level": float("nan")}, "nan dBFS is outside -80 to 0"),
        ({"rate": 7999}, "7999 Hz is outside 8000 to 192000"),
        ({"rate": 192_001}, "192001 Hz is outside 8000 to 192000"),
    ],
)
def test_impossible_values_are_named(values, named):
    with pytest.raises(UserError) as refused:
        create_test_tone.tone(**values)
    assert named in str(refused.value)


def refusal(done):
    """The one line that a refused run ends with."""
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_file_that_can_not_be_written_is_named(run_script, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for name, why in (("tone.mp3", "does not end in .wav"), ("folder.wav", "can't write"), ("a.wav/b.wav", "can't")):
        (tmp_path / "a.wav").write_text("a file")
        line = refusal(run_script("create_test_tone.py", "--output", name, cwd=tmp_path))
        assert name in line
        assert why in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "folder.wav"]
    line = refusal(run_script("create_test_tone.py", "--frequency", 30_000, cwd=tmp_path))
    assert "half the rate" in line
    assert not (tmp_path / "test_tone.wav").exists()
