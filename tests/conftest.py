"""What several test files share: a miniature data set, and running a script as a person would."""

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one for each of pytest's workers; a fork of a process with more would hang

import numpy as np
import pandas as pd
import pytest
from hub_server import HubServer
from warm_start import WarmScripts

import data_loader
import demo_data
from audio import AudioSettings

# A suite that a shell runs in the background inherits 'ignore Ctrl-C', and so would each script that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has them ignore

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The folder of a data set of 60 clips: 3 folds, 10 classes, 2 clips each, every format. Read it, don't write."""
    folder = tmp_path_factory.mktemp("miniature") / "data" / "UrbanSound8K"
    demo_data.make_miniature(folder, folds=3, clips_per_class=2)
    return folder


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    """Runs of scripts, as a person's but without the imports: scripts.run("predict", "clip.wav"). See warm_start.py."""
    with WarmScripts(tmp_path_factory.mktemp("printed")) as scripts:
        yield scripts


@pytest.fixture
def words_of_python(tmp_path):
    """Environment variables in which `python` prints the words after it, one a line, and does nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def random_data():
    """A function that writes the processed files of random clips of two classes, which differ in level."""

    def write(folder, n_folds=3, clips_per_fold=8):
        rng = np.random.default_rng(0)
        audio = AudioSettings()
        labels = np.arange(n_folds * clips_per_fold) % 2
        folds = np.repeat(np.arange(1, n_folds + 1), clips_per_fold)
        features = rng.normal(-30, 10, (len(labels), *audio.shape)).astype("float16")
        features[labels == 1, :40] += 4
        names = [f"{index}-{label}-0-0.wav" for index, label in enumerate(labels)]
        clips = pd.DataFrame({"slice_file_name": names, "fsID": range(len(labels)), "start": 0, "end": 4})
        clips = clips.assign(salience=1, fold=folds, classID=labels)
        clips["class"] = np.array(["dog_bark", "siren"])[labels]
        data_loader.save_processed(folder, features, clips, audio, "random")

    return write


@pytest.fixture(scope="session")
def data(tmp_path_factory, random_data):
    """The processed files of 24 random clips: 3 folds, 2 classes. Read it, don't write."""
    folder = tmp_path_factory.mktemp("data")
    random_data(folder)
    return folder


@pytest.fixture
def server():
    """A Hugging Face Hub on this machine."""
    with HubServer() as server:
        yield server
