"""The network, and its safetensors file.

A model file holds the weights and, as metadata, all that prediction needs besides: class names, audio settings, the
normalisation, and how the model was trained and scored.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

import calibration
import config
import utils
from audio_settings import AudioSettings
from layers import ConvBlock
from utils import UserError

VIEWS = ("level", "change", "shape")  # of AudioViews
VIEW_FRAMES = 4  # frames of 23 ms that a coarse view has the mean of: neighbours share most of their 93 ms of sound
# Mel bands and frames of the windows of AudioCNN's three blocks
POOLS = (2, 2), (2, 2), (2, 4)
MEAN_POOLS = (2, 2), (2, 2), (2, 2)  # a clip's 43 means leave 5 columns; windows of 4 at last would leave 2, for 3 s
FINE_POOLS = (1, 4), (2, 4), (2, 2)


class AudioCNN(nn.Module):
    """Three convolution blocks, a mean over time, one convolution over mel bands, two linear layers.

    250,250 parameters for 128 mel bands and 10 classes. Any number of frames from 16 on: the mean over time makes the
    rest of the network independent of it. Of an example's rows it sees the log-mel, not the fine one.
    """

    least_shape = 8, 16  # mel bands and frames that the pooling leaves something of
    shown_blocks = ("block3",)  # whose feature maps explain.py shows

    def __init__(
        self,
        n_classes,
        audio,
        pools=POOLS,
        block_dropout=config.BLOCK_DROPOUT,
        head_dropout=config.HEAD_DROPOUT,
    ):
        super().__init__()
        self.n_mels = audio.n_mels
        self.block1 = ConvBlock(1, 32, pools[0], block_dropout)
        self.block2 = ConvBlock(32, 64, pools[1], block_dropout)
        self.block3 = ConvBlock(64, 128, pools[2], block_dropout)
        self.over_bands = nn.Conv1d(128, 64, kernel_size=3, padding=1)
        self.hidden = nn.Linear(64 * (audio.n_mels // math.prod(bands for bands, _ in pools)), 128)
        self.dropout = nn.Dropout(head_dropout)
        self.logits = nn.Linear(128, n_classes)

    def forward(self, x):
        """Normalised features (B, 1, rows, frames) -> logits (B, n_classes)."""
        x = self.block1(x[:, :, : self.n_mels])  # (B, 32, n_mels / 2, frames / 2)
        x = self.block2(x)  # (B, 64, n_mels / 4, frames / 4)
        x = self.block3(x)  # (B, 128, n_mels / 8, frames / 16)
        x = x.mean(dim=3)  # (B, 128, n_mels / 8)
        x = torch.relu(self.over_bands(x))  # (B, 64, n_mels / 8)
        x = torch.relu(self.hidden(x.flatten(1)))  # (B, 128)
        return self.logits(self.dropout(x))  # (B, n_classes)


class SharedAudioCNN(nn.Module):
    """One AudioCNN that sees each clip in four views, and answers with the mean of their logits.

    The 250,250 parameters of AudioCNN, for about its cost. It sees the mean of each VIEW_FRAMES frames of the log-mel
    as it is, less each band's mean over time, less each frame's mean over bands, and less both. In training each view
    is an example of its own, so that a clip is learnt without the colour of its microphone, too, and without its level.
    Any number of frames from 32 on.
    """

    least_shape = 8, 8 * VIEW_FRAMES
    shown_blocks = ("cnn.block1",)  # the last one has 5 columns for 4 s

    def __init__(self, n_classes, audio, **dropouts):
        super().__init__()
        self.n_mels = audio.n_mels
        self.cnn = AudioCNN(n_classes, audio, MEAN_POOLS, **dropouts)

    def forward(self, x):
        """Normalised features (B, 1, rows, frames) -> logits (B, n_classes); in training each view's, (4 B, ...)."""
        level = coarse(x, self.n_mels)  # (B, 1, n_mels, frames / 4)
        change = without_mean(level, dim=3)
        views = torch.cat([level, change, without_mean(level, dim=2), without_mean(change, dim=2)])
        logits = self.cnn(views)  # (4 B, n_classes)
        return logits if self.training else logits.unflatten(0, (4, -1)).mean(dim=0)


class AudioViews(nn.Module):
    """Three AudioCNNs side by side, each with a view of its own; they answer with the mean of their logits.

    685,214 parameters, and the cost of one AudioCNN and a tenth. Two see the mean of each VIEW_FRAMES frames of the
    log-mel: one as it is (level), one what changes in time, without the steady colour of microphone and background
    (change). One sees the fine log-mel, each frame's spectrum without its level (shape). Each is trained by its own
    loss, so that they err on different clips; RESULTS.md has what each alone, and each pair, is worth. Any number of
    frames from 32 on.
    """

    least_shape = 8, 8 * VIEW_FRAMES
    shown_blocks = tuple(f"branches.{view}.block1" for view in VIEWS)  # the last ones have 5 columns for 4 s

    def __init__(self, n_classes, audio, **dropouts):
        super().__init__()
        self.n_mels, self.fine_frames = audio.n_mels, audio.fine_frames
        self.branches = nn.ModuleDict(
            {
                "level": AudioCNN(n_classes, audio, MEAN_POOLS, **dropouts),
                "change": AudioCNN(n_classes, audio, MEAN_POOLS, **dropouts),
                "shape": AudioCNN(n_classes, audio.fine, FINE_POOLS, **dropouts),
            }
        )

    def forward(self, x):
        """Normalised features (B, 1, rows, frames) -> logits (B, n_classes); in training each branch's, (3 B, ...)."""
        logits = self.branch_logits(x)  # (3, B, n_classes)
        return logits.flatten(0, 1) if self.training else logits.mean(dim=0)

    def branch_logits(self, x):
        """Normalised features (B, 1, rows, frames) -> each branch's logits (3, B, n_classes), as VIEWS names them."""
        means = coarse(x, self.n_mels)  # (B, 1, n_mels, frames / 4)
        fine = unfold(x[:, :, self.n_mels :], self.fine_frames)  # (B, 1, fine_n_mels, fine_frames x frames)
        seen = {"level": means, "change": without_mean(means, dim=3), "shape": without_mean(fine, dim=2)}
        return torch.stack([branch(seen[view]) for view, branch in self.branches.items()])


def coarse(x, n_mels):
    """Return the log-mel of features (B, 1, rows, frames) in means of frames: (B, 1, n_mels, frames / VIEW_FRAMES)."""
    return avg_pool2d(x[:, :, :n_mels], (1, VIEW_FRAMES))


def unfold(x, fine_frames):
    """Return the fine log-mel, (B, 1, bands, fine_frames x frames), from its rows, (B, 1, fine_frames x bands, frames).

    front_end.py's `clip_features` says how it was folded.
    """
    x = x.unflatten(2, (fine_frames, -1))  # (B, 1, fine_frames, bands, frames)
    return x.permute(0, 1, 3, 4, 2).flatten(3)


def without_mean(x, dim):
    """Return log-mels (B, 1, bands, frames) less their mean over `dim`: 3 is over time, 2 over mel bands."""
    return x - x.mean(dim, keepdim=True)


# A new network is a class above and a name here
MODELS = {"AudioCNN": AudioCNN, "SharedAudioCNN": SharedAudioCNN, "AudioViews": AudioViews}


def network_class(name):
    """Return a class above by its name in config.MODEL. UserError lists the names there are."""
    if name not in MODELS:
        raise UserError(f"no model {name!r} in model.py: MODEL in config.py is one of {', '.join(MODELS)}")
    return MODELS[name]


def build_model(name, n_classes, audio):
    """Return a new network, by its name in config.MODEL, for features of AudioSettings. UserError lists the names."""
    return network_class(name)(n_classes, audio)


def takes(network, shape):
    """Return whether a network, or its class, leaves something of examples of `shape`, (n_mels, frames), in pooling."""
    return all(size >= least for size, least in zip(shape, network.least_shape, strict=True))


def count_parameters(model):
    """Return how many numbers training adjusts."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- The model file ----------------------------------------------------------------------------------------------


def model_path(model_dir, fold):
    """Return the path of a fold's best model (fold 0-indexed)."""
    return Path(model_dir) / f"model_fold_{fold}_best.safetensors"


def folds_in(model_dir):
    """Return the 0-indexed folds whose models are in a folder."""
    return [number for number in range(10) if model_path(model_dir, number).is_file()]


def find_model(model_dir, fold):
    """Return a fold's model file; a path to a file stands for itself. UserError lists the folds there are."""
    if model_dir.is_file():
        return model_dir
    path = model_path(model_dir, fold)
    if not path.is_file():
        there = ", ".join(map(str, folds_in(model_dir)))
        remedy = f"--fold_num is one of {there}" if there else "run python train.py, or name its --model_dir"
        raise UserError(f"no model of fold {fold} in {model_dir}: {remedy}")
    return path


def save_model(path, state, info):
    """Write weights and metadata as safetensors, atomically.

    state: a state_dict; info: dict that JSON can hold, with at least the keys of INFO_KINDS (train.py's `make_fold` has
    them all). Keys go into the header one by one, each as JSON text.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    blob = save(tensors, metadata={key: json.dumps(value) for key, value in info.items()})
    # safetensors writes the metadata in random order. In one order, the same model is the same bytes.
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] = {key: header["__metadata__"][key] for key in info}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    with utils.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(blob)[8 + length :])


def load_model(path, device="cpu"):
    """Return (network in evaluation mode, info) from a model file. UserError says what is wrong with the file.

    The file may be a stranger's: no code in it runs, it takes memory by its size alone, and what it holds is checked.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no model file {path}: run python train.py, or name another --model_dir or --fold_num")
    try:
        with safe_open(path, framework="pt") as file:
            info = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): train or fetch it again") from error
    audio = check_info(path, info)
    model = build_model(info["model"], len(info["class_names"]), audio)
    check_state(path, state, model.state_dict())
    shape = audio.n_mels, audio.n_frames
    if not takes(model, shape):
        raise UserError(f"{path} has clips of {shape} mel bands and frames, and its network needs more")
    model.load_state_dict(state)
    return model.to(device, memory_format=torch.channels_last).eval(), info


INFO_KINDS = {
    "model": str,
    "class_names": list,
    "class_ids": list,
    "audio": dict,
    "band_mean": list,
    "band_deviation": list,
}
MOST_CLASSES = 1000
LARGEST_STATISTIC = 1e6  # dB; anything beyond is no normalisation


def check_info(path, info):
    """Return the AudioSettings in a model file's metadata. UserError names what it lacks or what can't be right."""
    if lacking := [key for key, kind in INFO_KINDS.items() if not isinstance(info.get(key), kind)]:
        raise UserError(f"{path} is not a model of this project: its metadata lacks {', '.join(lacking)}")
    if info["model"] not in MODELS:
        raise UserError(f"{path} is of a network {info['model'][:80]!r}; model.py has {', '.join(MODELS)}")
    if lacking := [field.name for field in dataclasses.fields(AudioSettings) if field.name not in info["audio"]]:
        raise UserError(f"{path} lacks the audio settings {', '.join(lacking)}")
    try:
        audio = AudioSettings(**info["audio"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path} has audio settings that can't be: {str(error)[:300]}") from error
    names, ids = info["class_names"], info["class_ids"]
    if not all(isinstance(name, str) and name and name.isprintable() for name in names) or len({*names}) < len(names):
        raise UserError(f"{path} has class names that are not text, each once: {str(names)[:300]}")
    if not names or len(names) > MOST_CLASSES:
        raise UserError(f"{path} has {len(names)} classes: a model has 1 to {MOST_CLASSES}")
    if len(ids) != len(names) or not all(isinstance(value, int) for value in ids) or len({*ids}) < len(ids):
        raise UserError(f"{path} has {len(names)} classes, and its class_ids are not as many numbers: {str(ids)[:300]}")
    for key, least in (("band_mean", -LARGEST_STATISTIC), ("band_deviation", 1e-6)):
        row = info[key]
        if len(row) != audio.shape[0] or not all(
            isinstance(value, (int, float)) and least <= value <= LARGEST_STATISTIC for value in row
        ):
            raise UserError(f"{path}: {key} is not one finite number for each of {audio.shape[0]} rows")
    if fault := calibration.fault(info):
        raise UserError(f"{path}: {fault}")
    return audio


def check_state(path, state, expected):
    """Raise a UserError that names each tensor in which a file's weights differ from the network's."""
    differences = [f"lacks {name}" for name in expected if name not in state]
    differences += [f"has {name[:80]!r}, which the network does not" for name in state if name not in expected]
    for name in [name for name in expected if name in state]:
        there, wanted = ((tensor.dtype, tuple(tensor.shape)) for tensor in (state[name], expected[name]))
        if there != wanted:
            differences.append(f"{name} is {describe(*there)}, not {describe(*wanted)}")
        elif not torch.isfinite(state[name]).all():
            differences.append(f"{name} has values that are not finite")
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(f"{path} does not fit its network: {'; '.join(differences[:4])}{more}")


def describe(dtype, shape):
    return f"{str(dtype).removeprefix('torch.')} {shape}"
