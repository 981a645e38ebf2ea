"""config.py is edited by people: what they mistype is named, with the right name or type."""

import shutil
import subprocess
import sys
import typing

import pytest
from conftest import REPOSITORY

import config

SCRIPT = "import config, utils\nutils.run(lambda: print(config.EPOCHS, config.MODEL))"


def run_with(folder, old, new):
    """Replace the start of a line in a copy's config.py, and run a script beside it."""
    for name in ("config.py", "utils.py", "safe_pickle.py"):
        shutil.copy(REPOSITORY / name, folder)
    text = (folder / "config.py").read_text(encoding="utf-8")
    assert text.count(f"\n{old}") == 1
    (folder / "config.py").write_text(text.replace(f"\n{old}", f"\n{new}"), encoding="utf-8")
    return subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, capture_output=True, text=True)


def test_every_setting_has_a_type():
    assert {name for name in vars(config) if name.isupper()} == set(typing.get_type_hints(config))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("EPOCHS: int = 80", 'EPOCHS: int = "80"', "EPOCHS = '80' in config.py: it must be a whole number"),
        ("EPOCHS: int = 80", "EPOCHS: int = True", "EPOCHS = True in config.py: it must be a whole number"),
        (
            "LEARNING_RATE: float = 3e-3",
            "LEARNING_RATE: float = None",
            "LEARNING_RATE = None in config.py: it must be a",
        ),
        (
            "HF_PRIVATE: bool = True",
            'HF_PRIVATE: bool = "no"',
            "HF_PRIVATE = 'no' in config.py: it must be True or False",
        ),
        ("KEEP_EPOCHS: int | None = 2", "KEEP_EPOCHS: int | None = 2.5", "it must be a whole number or None"),
        ("DATASET_DIR: str | Path = ", "DATASET_DIR: str | Path = 5 or ", "it must be text in quotes or a path"),
        (
            'SHORT_CLIPS: Literal["repeat", "silence"] = ',
            "SHORT_CLIPS: Literal['repeat', 'silence'] = 'r' or ",
            "or 's",
        ),
        ("SEED: int = 0", "SEED: int = 0\nLEARNING_RATES = 1e-4", "is it meant to be LEARNING_RATE?"),
        ("EPOCHS: int = 80", "EPOCH = 80", "config.py has no EPOCHS: is EPOCH meant to be it?"),
        ("MODEL: str", "NETWORK: str", "config.py has no MODEL: is MODEL_DIR meant to be it?"),
        ("SEED: int = 0", "SEED: int = 0\nMY_DISK = '/data'", None),  # a user's own constant
        ("LEARNING_RATE: float = 3e-3", "LEARNING_RATE: float = 1", None),  # a whole number is a number
        ("KEEP_EPOCHS: int | None = 2", "KEEP_EPOCHS: int | None = None", None),
    ],
)
def test_mistake_is_named_and_what_is_right_runs(tmp_path, old, new, named):
    done = run_with(tmp_path, old, new)
    if named is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert named in done.stderr
