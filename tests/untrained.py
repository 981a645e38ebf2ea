"""A model file without the training: random weights, and metadata as training writes it."""

import dataclasses

import torch

import demo_data
import model
from audio_settings import AudioSettings


def write_model(model_dir, fold, **info):
    """Write the model of a 0-indexed fold that says it has trained on two other folds; info: other metadata."""
    torch.manual_seed(fold)
    audio = AudioSettings()
    network = model.build_model(info.get("model", "AudioCNN"), len(demo_data.CLASS_NAMES), audio)
    for name, parameter in network.named_parameters():
        if name.endswith("logits.weight"):
            parameter.data *= 20  # the class then depends on the clip
    defaults = {
        "model": "AudioCNN",
        "class_names": list(demo_data.CLASS_NAMES),
        "class_ids": list(range(len(demo_data.CLASS_NAMES))),
        "audio": dataclasses.asdict(audio),
        "band_mean": [-40.0] * audio.shape[0],
        "band_deviation": [15.0] * audio.shape[0],
        "fold": fold,
        "training_folds": [number + 1 for number in (fold + 1, fold + 2)],
    }
    path = model.model_path(model_dir, fold)
    model.save_model(path, network.state_dict(), {**defaults, **info})
    return path
