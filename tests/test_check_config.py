"""config.py is edited by people: what they mistype must be named, with the nearest right name or value."""

import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import check_config
import config


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts whose config.py a test may edit."""
    for script in REPOSITORY.glob("*.py"):
        shutil.copy(script, tmp_path)
    return tmp_path


def run_with(project, old, new, script="check_config.py"):
    """Replace the start of a line in the copy's config.py and run one of its scripts."""
    path = project / "config.py"
    text = path.read_text()
    assert f"\n{old}" in text
    path.write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    return subprocess.run([sys.executable, project / script], capture_output=True, text=True)


def test_every_setting_has_a_rule():
    assert {name for name in vars(config) if name.isupper()} == set(check_config.RULES)


def test_the_projects_own_config_passes(run_script):
    done = run_script("check_config.py")
    assert done.returncode == 0, done.stderr
    assert "all in range" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("EPOCHS = 80", "EPOCHS = 0", "EPOCHS = 0 in config.py: it must be a whole number of at least 1"),
        ("EPOCHS = 80", 'EPOCHS = "80"', "EPOCHS = '80'"),
        ("LEARNING_RATE = 3e-3", "LEARNING_RATE = -1", "LEARNING_RATE = -1"),
        ("LEARNING_RATE = 3e-3", 'LEARNING_RATE = float("nan")', "LEARNING_RATE = nan"),
        ("BLOCK_DROPOUT = 0.1", "BLOCK_DROPOUT = 1.0", "just under 1"),
        ("HF_PRIVATE = True", 'HF_PRIVATE = "no"', "one of True, False"),
        ("N_MELS = 128", "N_MELS = 100", "a multiple of 8"),
        ("FINE_FRAMES = 2", "FINE_FRAMES = 3", "a divisor of HOP_LENGTH"),
        ("FINE_N_MELS = 32", "FINE_N_MELS = 2", "a multiple of 4"),
        ("F_MIN = 0.0", "F_MIN = 20_000.0", "F_MIN = 20000.0"),
        ("CROP_FRAMES = 96", "CROP_FRAMES = 7", "at least 16 frames"),
        ("VALIDATION = ", 'VALIDATION = "next" or ', "'next_fold'"),
        ("KEEP_EPOCHS = 2", "KEEP_EPOCHS = 0", "None, or at least 1"),
        ("SEED = 0", "SEED = 0\nLEARNING_RATES = 1e-4", "is it meant to be LEARNING_RATE?"),
        ("EPOCHS = 80", "EPOCH = 80", "config.py sets EPOCH, which nothing reads: is it meant to be EPOCHS?"),
        ("MODEL = ", "NETWORK = ", "config.py has no MODEL: is MODEL_DIR meant to be it?"),
    ],
)
def test_mistakes_are_named(project, old, new, named):
    done = run_with(project, old, new)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_every_script_checks_first(project):
    done = run_with(project, "BATCH_SIZE = 32", "BATCH_SIZE = 1", script="train.py")
    assert done.returncode == 2
    assert done.stderr == "error: BATCH_SIZE = 1 in config.py: it must be a whole number of at least 2\n"


def test_a_users_own_constant_is_fine(project):
    assert run_with(project, "SEED = 0", "SEED = 0\nMY_DISK = '/data'").returncode == 0
