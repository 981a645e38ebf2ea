"""Check config.py before any work: misspelt names, wrong types, values out of range.

    python check_config.py        # every script does this by itself when it starts

Prints 'config.py: n settings, all in range', or one line that names the setting, its value and what is wanted.
"""

import argparse
import difflib
import math
import re
from pathlib import Path

import config
import utils
from utils import UserError


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low):
    """A whole number of at least `low`."""
    return lambda value: is_whole(value) and value >= low, f"a whole number of at least {low}"


def between(low, high):
    """A number from `low` to just under `high`."""
    wanted = f"a number from {low} to just under {high}" if high < math.inf else f"a number of at least {low}"
    return lambda value: (is_whole(value) or isinstance(value, float)) and low <= value < high, wanted


def one_of(*values):
    return lambda value: value in values, "one of " + ", ".join(repr(value) for value in values)


def of_kind(kind, wanted):
    return lambda value: isinstance(value, kind), wanted


ABOVE_ZERO = 1e-12
TEXT = of_kind(str, "text in quotes")
REPOSITORY = (
    lambda value: isinstance(value, str) and re.fullmatch(r"([\w.-]+/[\w.-]+)?", value),
    '"owner/name", or "" for off',
)
RULES = {
    "ASSETS_BASE_DIR": of_kind((str, Path), "a path"),
    "DATASET_DIR": of_kind((str, Path), "a path"),
    "PROCESSED_DIR": of_kind((str, Path), "a path"),
    "CHECKPOINT_DIR": of_kind((str, Path), "a path"),
    "MODEL_DIR": of_kind((str, Path), "a path"),
    "RESULTS_DIR": of_kind((str, Path), "a path"),
    "SAMPLE_RATE": whole(1000),
    "CLIP_SECONDS": between(ABOVE_ZERO, math.inf),
    "N_FFT": whole(16),
    "HOP_LENGTH": whole(1),
    "N_MELS": (lambda value: is_whole(value) and value > 0 and value % 8 == 0, "a multiple of 8"),
    "FINE_FRAMES": (
        lambda value: is_whole(value) and value > 0 and config.HOP_LENGTH % value == 0,
        "a divisor of HOP_LENGTH",
    ),
    "FINE_N_FFT": whole(16),
    "FINE_N_MELS": (lambda value: is_whole(value) and value > 0 and value % 4 == 0, "a multiple of 4"),
    "F_MIN": (lambda value: 0 <= value < config.F_MAX, "at least 0 and under F_MAX"),
    "F_MAX": (lambda value: 0 < value <= config.SAMPLE_RATE / 2, "at most half of SAMPLE_RATE"),
    "TOP_DB": between(ABOVE_ZERO, math.inf),
    "SHORT_CLIPS": one_of("repeat", "silence"),
    "FEATURE_DTYPE": one_of("float16", "float32"),
    "MODEL": TEXT,
    "EPOCHS": whole(1),
    "BATCH_SIZE": whole(2),
    "QUICK_SHARE": between(0, 1),
    "LEARNING_RATE": between(ABOVE_ZERO, math.inf),
    "SCHEDULE": one_of("one_cycle", "constant"),
    "WARMUP_SHARE": between(0, 1),
    "WEIGHT_DECAY": between(0, math.inf),
    "LABEL_SMOOTHING": between(0, 1),
    "BLOCK_DROPOUT": between(0, 1),
    "HEAD_DROPOUT": between(0, 1),
    "SEED": whole(0),
    "CROP_FRAMES": (lambda value: value == 0 or (is_whole(value) and value >= 16), "0, or at least 16 frames"),
    "TIME_STRETCH": between(0, 10),
    "MIXUP_ALPHA": between(0, math.inf),
    "BAND_SHIFT": whole(0),
    "BAND_STRETCH": between(0, 10),
    "GAIN_DB": between(0, math.inf),
    "FILTER_DB": between(0, math.inf),
    "MASK_BANDS": whole(0),
    "MASK_FRAMES": whole(0),
    "VALIDATION": one_of("next_fold", "none", "test_fold"),
    "DEVICE": TEXT,
    "PRECISION": one_of("auto", "bfloat16", "float32"),
    "KEEP_EPOCHS": (lambda value: value is None or (is_whole(value) and value >= 1), "None, or at least 1"),
    "WORKERS": whole(1),
    "HF_REPO_ID": REPOSITORY,
    "HF_MODEL_REPO_ID": REPOSITORY,
    "HF_COMMIT_MINUTES": between(0.5, math.inf),
    "HF_PRIVATE": one_of(True, False),
    "WANDB_PROJECT": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[^/\\#?%:\s]{0,128}", value),
        'a project\'s name in quotes, or "" for off',
    ),
    "WANDB_ENTITY": TEXT,
}


def number_for(name):
    """Return an argparse type for the flag of a number in config.py, under the same rule."""
    is_right, wanted = RULES[name]

    def parse(text):
        try:
            value = int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else float(text)
            right = is_right(value)
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def check_config():
    """Raise a UserError that names the first setting of config.py that can't be right, and what would be.

    A setting of its own that a user adds is fine, unless it looks like a misspelt one.
    """
    for name in vars(config):
        if name.isupper() and name not in RULES and (near := difflib.get_close_matches(name, RULES, 1, cutoff=0.8)):
            raise UserError(f"config.py sets {name}, which nothing reads: is it meant to be {near[0]}?")
    for name, (is_right, wanted) in RULES.items():
        value = getattr(config, name)
        try:
            right = is_right(value)
        except TypeError:  # a comparison of text with a number
            right = False
        if not right:
            raise UserError(f"{name} = {value!r} in config.py: it must be {wanted}")


def main():
    utils.make_parser(__doc__).parse_args()
    print(f"config.py: {len(RULES)} settings, all in range")


if __name__ == "__main__":
    utils.run(main)
