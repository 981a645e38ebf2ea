"""A model file without the training: random weights, and metadata as training writes it."""

import dataclasses

import torch

import demo_data
import model
import model_file
from audio import AudioSettings

SETTINGS = {"model": "AudioCNN", "block_dropout": 0.0, "head_dropout": 0.0, "fast_blocks": False}


def write_model(model_dir, fold, **info):
    """Write the model of a 0-indexed fold that says it has trained on two other folds; info: different metadata."""
    torch.manual_seed(fold)
    audio = AudioSettings()
    settings = {**SETTINGS, "model": info.get("model", "AudioCNN")}
    network = model.build_model(settings, len(demo_data.CLASS_NAMES), audio)
    network.band_mean.fill_(-40)
    network.band_std.fill_(15)
    with torch.no_grad():
        network.logits.weight *= 20  # the class then depends on the clip
    defaults = {
        "model": "AudioCNN",
        "class_names": list(demo_data.CLASS_NAMES),
        "class_ids": list(range(len(demo_data.CLASS_NAMES))),
        "audio": dataclasses.asdict(audio),
        "fold": fold,
        "training_folds": [number + 1 for number in (fold + 1, fold + 2)],
    }
    path = model_file.model_path(model_dir, fold)
    model_file.save_model(path, network.state_dict(), {**defaults, **info})
    return path
