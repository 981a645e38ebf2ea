"""app.py through its page's API, on loopback. Skipped where Gradio is not installed (requirements-app.txt)."""

import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -r requirements-app.txt")
from gradio_client import Client, handle_file

import app
import classifier

READY = REPOSITORY / "models" / "urban_sounds.onnx"


@pytest.fixture(scope="module")
def page():
    """A gradio_client.Client of the running page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-u", "app.py", "--model_dir", READY, "--port", port]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if "http" in line)
            yield Client(re.search(r"http://127\.0\.0\.1:\d+", line)[0], verbose=False)
        finally:
            process.kill()


def test_recording_is_answered_with_bars_picture_and_table(page, tmp_path):
    soundfile.write(tmp_path / "a b.wav", np.random.default_rng(0).normal(0, 0.1, 6 * 22_050), 22_050)
    text, bars, picture, table, link = page.predict(handle_file(tmp_path / "a b.wav"), api_name="/classify")
    assert bars["label"] in text and len(bars["confidences"]) == 10
    assert picture and table["data"][0][2] == bars["label"] and "data:text/csv" in link


def test_recording_that_is_too_long_is_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "MAX_MINUTES", 0.2)
    soundfile.write(tmp_path / "long.flac", np.zeros(1000 * 13), 1000)
    assert "longer than 0.2 minutes" in app.describe(tmp_path / "long.flac", classifier.load(READY))[0]


def test_what_is_no_audio_is_a_text_and_no_traceback(page, tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    text, *others = page.predict(handle_file(tmp_path / "a.wav"), api_name="/classify")
    assert "a.wav can't be decoded as audio" in text and str(tmp_path) not in text and "/" not in text.split("(")[0]
    assert others[1] is None
