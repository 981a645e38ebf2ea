"""The network, from top to bottom, and its safetensors file.

A network takes log-mel spectrograms as they are stored, in dB, and gives logits: `network(features)` is all there is,
in training, testing and prediction. A new network is a class here and a name in MODELS.

A model file holds the weights and, as metadata, all that prediction needs besides: class names, audio settings,
temperature, and how the model was trained and scored.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

import utils
from audio import AudioSettings
from utils import UserError

VIEW_FRAMES = 4  # frames of 23 ms that a view has the mean of: neighbours share most of their 93 ms of sound
EVALUATION_BATCH = 64  # clips in one forward pass outside training

# --- The network -------------------------------------------------------------------------------------------------


class ConvBlock(nn.Sequential):
    """Conv2d 3x3 -> BatchNorm2d -> MaxPool2d -> ReLU -> Dropout: (B, C_in, H, W) -> (B, C_out, H / pool, W / pool).

    ReLU after pooling gives the same function as before it, for a fraction of its work.
    """

    is_fast = False  # in training on a CPU, kernels.py computes the same in less time; see config.FAST_BLOCKS

    def __init__(self, channels_in, channels_out, pool, dropout):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.MaxPool2d(pool),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        if self.is_fast and self.training and x.device.type == "cpu":
            import kernels  # imports numba, which nothing else waits for

            if kernels.fits(self, x):
                return kernels.fast_block(self, x)
        return super().forward(x)


class Network(nn.Module):
    """What every network has: normalisation by the training clips' mel bands, and one view unless it says otherwise."""

    def __init__(self, n_mels):
        super().__init__()
        self.register_buffer("band_mean", torch.zeros(n_mels))  # dB
        self.register_buffer("band_std", torch.ones(n_mels))  # dB

    def normalise(self, features):
        """Features (B, n_mels, frames) in dB -> the same in standard deviations of their mel band, (B, 1, ...)."""
        x = (features - self.band_mean[:, None]) / self.band_std[:, None]
        return x.unsqueeze(1).contiguous(memory_format=torch.channels_last)  # (B, 1, n_mels, frames)

    def view_logits(self, features):
        """Features (B, n_mels, frames) in dB -> the logits of each view, (B, views, n_classes), for the loss."""
        return self(features).unsqueeze(1)


class AudioCNN(Network):
    """Three convolution blocks, a mean over time, one convolution over mel bands, two linear layers.

    250,250 parameters for 128 mel bands and 10 classes. Any number of frames from 16 on: the mean over time makes the
    rest of the network independent of it.
    """

    pools = (2, 2), (2, 2), (2, 4)  # mel bands and frames of each block's windows

    def __init__(self, n_classes, n_mels, block_dropout, head_dropout):
        super().__init__(n_mels)
        self.block1 = ConvBlock(1, 32, self.pools[0], block_dropout)
        self.block2 = ConvBlock(32, 64, self.pools[1], block_dropout)
        self.block3 = ConvBlock(64, 128, self.pools[2], block_dropout)
        self.over_bands = nn.Conv1d(128, 64, kernel_size=3, padding=1)
        self.hidden = nn.Linear(64 * (n_mels // 8), 128)
        self.dropout = nn.Dropout(head_dropout)
        self.logits = nn.Linear(128, n_classes)

    def forward(self, features):
        """Features (B, n_mels, frames) in dB -> logits (B, n_classes)."""
        return self.layers(self.normalise(features))

    def layers(self, x):
        """(B, 1, n_mels, frames), normalised -> logits (B, n_classes)."""
        x = self.block1(x)  # (B, 32, n_mels / 2, frames / 2)
        x = self.block2(x)  # (B, 64, n_mels / 4, frames / 4)
        x = self.block3(x)  # (B, 128, n_mels / 8, frames / 16)
        x = x.mean(dim=3)  # (B, 128, n_mels / 8)
        x = torch.relu(self.over_bands(x))  # (B, 64, n_mels / 8)
        x = torch.relu(self.hidden(x.flatten(1)))  # (B, 128)
        return self.logits(self.dropout(x))  # (B, n_classes)


class SharedAudioCNN(AudioCNN):
    """AudioCNN on four views of a clip; the answer is the mean of their logits.

    The views are means of VIEW_FRAMES frames: as they are, less each band's mean over time, less each frame's mean over
    the bands, less both. In training each view is an example of its own, so that a clip is learnt without the colour of
    its microphone, too, and without its level. The same 250,250 parameters. Any number of frames from 32 on.
    """

    pools = (2, 2), (2, 2), (2, 2)  # a clip's 43 means leave 5 columns; windows of 4 at last would leave 2, for 3 s

    def forward(self, features):
        """Features (B, n_mels, frames) in dB -> logits (B, n_classes)."""
        return self.view_logits(features).mean(dim=1)

    def view_logits(self, features):
        """Features (B, n_mels, frames) in dB -> the logits of each view, (B, 4, n_classes)."""
        x = avg_pool2d(self.normalise(features), (1, VIEW_FRAMES))  # (B, 1, n_mels, frames / 4)
        change = x - x.mean(dim=3, keepdim=True)
        views = torch.cat([x, change, x - x.mean(dim=2, keepdim=True), change - change.mean(dim=2, keepdim=True)])
        return self.layers(views).unflatten(0, (4, -1)).transpose(0, 1)  # (4 B, n_classes) -> (B, 4, n_classes)


MODELS = {"SharedAudioCNN": SharedAudioCNN, "AudioCNN": AudioCNN}


def build_model(settings, n_classes, audio):
    """Return a new network for clips of AudioSettings. UserError if there is none, or its pooling leaves nothing.

    settings: dict with model (a name in MODELS), block_dropout, head_dropout and fast_blocks.
    """
    if settings["model"] not in MODELS:
        raise UserError(f"no model {settings['model']!r} in model.py: MODEL in config.py is one of {', '.join(MODELS)}")
    network = MODELS[settings["model"]](n_classes, audio.n_mels, settings["block_dropout"], settings["head_dropout"])
    for module in network.modules():
        if isinstance(module, ConvBlock):
            module.is_fast = settings["fast_blocks"]
    check_shape(network, audio.shape)
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def check_shape(network, shape):
    """Raise a UserError if a network can't compute clips of (n_mels, frames): its pooling leaves nothing of them."""
    was_training = network.training
    try:
        network.eval()(torch.zeros(1, *shape, device=network.band_mean.device))
    except RuntimeError as error:
        raise UserError(
            f"{type(network).__name__} can't take {shape[0]} mel bands, {shape[1]} frames ({utils.one_line(error)}): "
            "raise N_MELS, CLIP_SECONDS or CROP_FRAMES in config.py, or choose another MODEL"
        ) from error
    finally:
        network.train(was_training)


@torch.inference_mode()
def logits_of(network, features, precision="float32"):
    """Return the logits of whole clips, (clips, n_classes) float32 on the CPU; the network is left in evaluation mode.

    features: (clips, n_mels, n_frames) in dB, an array or a tensor on any device.
    """
    network.eval()
    device, logits = network.band_mean.device, None
    for start in range(0, len(features), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        with utils.autocast(device, precision):
            output = network(torch.as_tensor(features[batch]).to(device).float())  # (B, n_classes)
        if logits is None:  # one tensor: small ones that stay between large ones that go would spread over the memory
            logits = torch.empty(len(features), output.shape[1])
        logits[batch] = output
    return logits


# --- The model file ----------------------------------------------------------------------------------------------

INFO_KINDS = {"model": str, "class_names": list, "class_ids": list, "audio": dict}  # what every file must have
MAX_CLASSES = 1000
TEMPERATURE_RANGE = 0.05, 20.0  # 1 changes nothing; above 1 a network sounds less sure, below 1 surer


def model_path(model_dir, fold):
    """Return the path of a fold's best model (fold 0-indexed)."""
    return Path(model_dir) / f"model_fold_{fold}_best.safetensors"


def folds_in(model_dir):
    """Return the 0-indexed folds whose models are in a folder."""
    return [fold for fold in range(utils.MAX_FOLDS) if model_path(model_dir, fold).is_file()]


def find_model(model_dir, fold):
    """Return a fold's model file; a path to a file is returned as it is. UserError lists the folds there are."""
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

    The file may be untrusted: no code in it runs, it takes memory by its size alone, and what it holds is checked.
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
        reason = utils.one_line(error)
        raise UserError(f"{path} is not a readable safetensors file ({reason}): train or fetch it again") from error
    audio = check_info(path, info)
    settings = {"model": info["model"], "block_dropout": 0.0, "head_dropout": 0.0, "fast_blocks": False}
    try:
        network = build_model(settings, len(info["class_names"]), audio)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    check_state(path, state, network.state_dict())
    network.load_state_dict(state)
    return network.to(device).eval(), info


def check_info(path, info):
    """Return the AudioSettings in a model file's metadata. UserError names what is missing or can't be right."""
    if "band_mean" in info:  # a buffer of the network by now
        raise UserError(f"{path} is of an earlier version of this project: run python train.py --fresh")
    if missing := [key for key, kind in INFO_KINDS.items() if not isinstance(info.get(key), kind)]:
        raise UserError(f"{path} is not a model of this project: its metadata lacks {', '.join(missing)}")
    if info["model"] not in MODELS:
        raise UserError(f"{path} is of a network {utils.one_line(info['model'])!r}; model.py has {', '.join(MODELS)}")
    fields = [field.name for field in dataclasses.fields(AudioSettings)]
    if missing := [name for name in fields if name not in info["audio"]]:
        raise UserError(f"{path} lacks the audio settings {', '.join(missing)}")
    try:
        audio = AudioSettings(**info["audio"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path} has audio settings that can't be: {utils.one_line(error)}") from error
    names, ids = info["class_names"], info["class_ids"]
    if not all(isinstance(name, str) and name and name.isprintable() for name in names) or len({*names}) < len(names):
        raise UserError(f"{path} has class names that are not text, each once: {utils.one_line(names)}")
    if not names or len(names) > MAX_CLASSES:
        raise UserError(f"{path} has {len(names)} classes: a model has 1 to {MAX_CLASSES}")
    if len(ids) != len(names) or not all(type(value) is int for value in ids) or len({*ids}) < len(ids):
        raise UserError(f"{path} has {len(names)} classes, and other class_ids: {utils.one_line(ids)}")
    temperature = info.get("temperature", 1)  # may be absent
    if not is_temperature(temperature):
        low, high = TEMPERATURE_RANGE
        raise UserError(f"{path}: temperature is {utils.one_line(temperature)!r}: it must be from {low:g} to {high:g}")
    return audio


def is_temperature(value):
    """Return whether an untrusted value can be a network's temperature."""
    return type(value) in (int, float) and TEMPERATURE_RANGE[0] <= value <= TEMPERATURE_RANGE[1]


def check_state(path, state, expected):
    """Raise a UserError that names each tensor in which a file's weights differ from the network's."""
    differences = [f"lacks {name}" for name in expected if name not in state]
    differences += [f"has {utils.one_line(name)!r}, which the network lacks" for name in state if name not in expected]
    for name in [name for name in expected if name in state]:
        found, right = ((tensor.dtype, tuple(tensor.shape)) for tensor in (state[name], expected[name]))
        if found != right:
            differences.append(f"{name} is {describe(*found)}, not {describe(*right)}")
        elif not torch.isfinite(state[name]).all():
            differences.append(f"{name} has values that are not finite")
    if not differences and "band_std" in state and not (state["band_std"] > 0).all():
        differences.append("band_std has values that are not above 0")
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(f"{path} does not fit its network: {'; '.join(differences[:4])}{more}")


def describe(dtype, shape):
    return f"{str(dtype).removeprefix('torch.')} {shape}"
