"""listen.py: windows and smoothing fed with blocks, and `predict.py --mic` on a sound card of files (alsa.py)."""

import os
import signal
import subprocess
import sys

import alsa
import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from test_sound_device import NO_PORTAUDIO, refusal, run_python
from untrained import write_model

import audio_reader
import data_loader
import predict
from model import load_model
from reports.answers import BAR_WIDTH
from services import listen
from utils import UserError

RATE = 100  # Hz; enough for what is tested without a network
NAMES = ["air_conditioner", "siren"]


def printed(capsys, blocks, classify):
    """Return the lines that listen prints for windows of 4 s."""
    listen.listen(blocks, classify, NAMES, RATE, 4)
    return capsys.readouterr().out.splitlines()


@given(st.lists(st.integers(0, 350), max_size=12))
def test_windows_are_the_last_seconds_whatever_the_blocks(lengths):
    samples = np.arange(sum(lengths), dtype=np.float32)
    blocks = np.split(samples, np.cumsum(lengths)[:-1]) if lengths else []
    windows = list(listen.cut_windows(blocks, RATE, 4))
    assert [time for time, _ in windows] == list(range(1, len(samples) // RATE + 1))
    for second, window in windows:
        end = int(second) * RATE
        assert np.array_equal(window, samples[max(0, end - 4 * RATE) : end])


def test_line_is_the_mean_of_the_last_decisions(capsys):
    sirens = [0.9, 0.2, 0.8, 0.7, 0.0, 0.1]
    answers = (np.array([1 - siren, siren]) for siren in sirens)
    lines = printed(capsys, [np.ones(RATE * len(sirens))], lambda window: next(answers))
    assert len(lines) == len(sirens)
    for second, line in enumerate(lines, start=1):
        siren = np.mean(sirens[max(0, second - listen.SMOOTHING) : second])
        name, share = ("siren", siren) if siren > 0.5 else ("air_conditioner", 1 - siren)
        clock, shown, per_cent, bar = line.split()
        assert (clock, shown) == (f"0:0{second}", name)
        assert float(per_cent.rstrip("%")) == pytest.approx(100 * share, abs=0.06)
        assert len(bar) == pytest.approx(share * BAR_WIDTH, abs=0.51)


def test_silence_is_told_and_forgets_what_was_before(capsys):
    answers = iter([np.array([0.0, 1.0])] * 4 + [np.array([1.0, 0.0])])
    blocks = [np.ones(RATE), np.zeros(4 * RATE), np.ones(RATE)]
    lines = printed(capsys, blocks, lambda window: next(answers))
    assert [line.split()[1] for line in lines[:4]] == ["siren"] * 4
    assert "silence" in lines[4]
    assert "muted" in lines[4]
    assert lines[5].split()[1:3] == ["air_conditioner", "100.0%"]  # this decision alone


def test_minutes_and_numbers_that_are_none(capsys):
    lines = printed(capsys, [np.ones(RATE)] * 61, lambda window: np.array([0.25, 0.75]))
    assert lines[-1].split()[:3] == ["1:01", "siren", "75.0%"]
    with pytest.raises(UserError, match="gives no probabilities"):
        printed(capsys, [np.ones(RATE)], lambda window: np.array([np.nan, np.nan]))


def test_blocks_of_a_real_file_through_a_network(miniature, tmp_path, capsys):
    network, info = load_model(write_model(tmp_path, 0))
    audio = data_loader.AudioSettings(**info["audio"])
    files = sorted((miniature / "audio" / "fold1").glob("*.wav"))[:3]
    samples = np.concatenate([audio_reader.read_audio(path, audio.sample_rate) for path in files])
    blocks = np.array_split(samples, 37)
    listen.listen(
        blocks, lambda window: predict.predict(network, info, window), info["class_names"], audio.sample_rate, 4
    )
    lines = capsys.readouterr().out.splitlines()
    decisions = []
    for second, line in enumerate(lines, start=1):
        end = second * audio.sample_rate
        window = samples[max(0, end - audio.clip_samples) : end]
        decisions.append(predict.predict(network, info, window))
        mean = np.mean(decisions[-listen.SMOOTHING :], axis=0)
        assert line.split()[1] == info["class_names"][mean.argmax()]
        assert float(line.split()[2].rstrip("%")) == pytest.approx(100 * mean.max(), abs=0.06)
    assert len(lines) == len(samples) // audio.sample_rate > 4


# --- The command line --------------------------------------------------------------------------------------------


def test_microphone_until_ctrl_c(miniature, tmp_path):
    path = write_model(tmp_path, 0)
    files = sorted((miniature / "audio" / "fold1").glob("*.wav"))[:4]
    samples = np.concatenate([audio_reader.read_audio(file, alsa.RATE) for file in files])
    env = alsa.sound_card(tmp_path, heard=samples)
    command = [sys.executable, str(REPOSITORY / "predict.py"), "--mic", "--model_dir", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env={**os.environ, **env}) as run:
        lines = [run.stdout.readline() for _ in range(4)]
        run.send_signal(signal.SIGINT)
        rest, errors = run.communicate()
    assert lines[0] == "listening to default; Ctrl-C ends it\n"
    assert [line.split()[0] for line in lines[1:]] == ["0:01", "0:02", "0:03"]
    assert all("%" in line for line in lines[1:])
    assert run.returncode == 130
    assert errors.strip() == "Stopped by Ctrl-C."
    assert "Traceback" not in rest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PortAudio is in the package")
def test_microphone_without_portaudio_is_one_line(tmp_path):
    path = write_model(tmp_path, 0)
    flags = ["--mic", "--model_dir", str(path)]
    program = f"import sys, predict, utils; sys.argv = ['predict.py', *{flags}]; utils.run(predict.main)"
    done = run_python(f"{NO_PORTAUDIO}; {program}")
    assert "sudo apt install libportaudio2" in refusal(done)
    assert done.stdout == ""


def test_microphone_and_a_file_exclude_each_other(run_script):
    for arguments in ([], ["--mic", "recording.wav"]):
        done = run_script("predict.py", *arguments)
        assert done.returncode == 2
        assert done.stderr.endswith("name either recordings or --mic\n")
