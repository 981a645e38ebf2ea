"""app.py through its page's API, on loopback. Skipped where Gradio is not installed (requirements-app.txt)."""

import importlib.util
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import app
import classifier
from utils import UserError

# Not imported where it is not used: it takes seconds.
if not importlib.util.find_spec("gradio"):
    pytest.skip("Gradio is not installed: pip install -r requirements-app.txt", allow_module_level=True)

READY = REPOSITORY / "models" / "urban_sounds.onnx"


@pytest.fixture(scope="module")
def page():
    """A function that gives the running page a recording and returns what it answers."""
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-u", "app.py", "--model_dir", READY, "--port", port]
    env = {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0"}  # left over: the page must not listen to the network
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if "http" in line)
            client = Client(re.search(r"http://127\.0\.0\.1:\d+", line)[0], verbose=False)
            yield lambda path: client.predict(handle_file(path), api_name="/classify")
        finally:
            process.kill()


def test_recording_is_answered_with_bars_picture_and_table(page, tmp_path):
    soundfile.write(tmp_path / "a b.wav", np.random.default_rng(0).normal(0, 0.1, 6 * 22_050), 22_050)
    text, bars, picture, table, link = page(tmp_path / "a b.wav")
    assert bars["label"] in text and len(bars["confidences"]) == 10
    assert picture and table["data"][0][2] == bars["label"] and "data:text/csv" in link


def test_names_that_look_like_markdown_are_shown_as_they_are(tmp_path):
    model = classifier.load(READY)
    model.info["class_names"] = names = [f"<img src=x> [{number}](u)" for number in range(10)]
    escaped = r"\<img src=x\> \[%s\](u)"
    gradio = pytest.importorskip("gradio")
    page = app.build_page(gradio, model)
    assert escaped % 9 in next(block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown))
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 22_050), 22_050)
    text, bars, *_ = app.describe(tmp_path / "a.wav", model)
    assert escaped % names.index(max(bars, key=bars.get)) in text
    assert r"\<b\>.wav" in app.describe(tmp_path / "<b>.wav", model)[0]


@pytest.mark.parametrize("port", ["0", "70000"])
def test_port_out_of_range_is_refused(monkeypatch, capsys, port):
    monkeypatch.setattr("sys.argv", ["app.py", "--port", port])
    with pytest.raises(SystemExit):
        app.parse_args()
    assert f"argument --port: '{port}' is" in capsys.readouterr().err


def test_taken_port_is_named_with_the_remedy(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["app.py", "--model_dir", str(READY), "--port", port])
        with pytest.raises(UserError, match=f"port .*{port}.*--port"):
            app.main()


def test_recording_that_is_too_long_is_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "MAX_MINUTES", 0.2)
    soundfile.write(tmp_path / "long.flac", np.zeros(1000 * 13), 1000)
    assert "longer than 0.2 minutes" in app.describe(tmp_path / "long.flac", classifier.load(READY))[0]


def test_what_is_no_audio_is_a_text_and_no_traceback(page, tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    text, *others = page(tmp_path / "a.wav")
    assert "a.wav can't be decoded as audio" in text and str(tmp_path) not in text and "/" not in text.split("(")[0]
    assert others[1] is None
