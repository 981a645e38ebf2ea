"""What a training leaves and prints, in a form that two of them can be compared in."""

import json
import re

import torch

import checkpoint


def files_of(assets):
    return sorted(str(path.relative_to(assets)) for path in assets.rglob("*") if path.is_file())


def contents(assets, pattern=""):
    """{relative path: contents} of a run's files whose path has the pattern, without the run's random id."""
    found = {}
    for name in files_of(assets):
        path = assets / name
        if not re.search(pattern, name) or path.suffix == ".lock":
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".pt":
            found[name] = plain({**checkpoint.read_pt(path), "run_id": None})
        elif path.name == "training_state.json":
            found[name] = {**json.loads(found[name]), "run_id": None}
    return found


def plain(value):
    """A nested value with its tensors as bytes, so that == compares them bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def assert_same_files(assets, expected, pattern=""):
    ours, theirs = contents(assets, pattern), contents(expected, pattern)
    assert sorted(ours) == sorted(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == [], [
        (ours[name], theirs[name]) for name in different if name.endswith((".json", ".csv", ".md"))
    ]


def epoch_lines(text):
    """[(fold, epoch)] of the epochs that a run says it trained."""
    return [(int(fold), int(epoch)) for fold, epoch in re.findall(r"^fold (\d)  epoch (\d+)/", text, re.M)]
