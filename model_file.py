"""The model file: weights, and as metadata all that prediction needs besides.

That is class names, audio settings, temperature, and how the model was trained and scored. Nothing here imports torch
before a network is loaded.
"""

import dataclasses
import json
import sys
from pathlib import Path

import utils
from audio import AudioSettings
from utils import UserError

MODEL_FILE = "model_fold_{}_best.safetensors"  # of a fold, 0-indexed
INFO_KINDS = {"model": str, "class_names": list, "class_ids": list, "audio": dict}  # what every file must have
MAX_CLASSES = 1000
MAX_CLASS_NAME = 255  # characters
TEMPERATURE_RANGE = 0.05, 20.0  # 1 changes nothing; above 1 a network sounds less sure, below 1 surer


def model_path(model_dir, fold):
    """Return the path of a fold's best model (fold 0-indexed)."""
    return Path(model_dir) / MODEL_FILE.format(fold)


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

    from model import MODELS, build_model, digest  # and with it torch, which takes seconds

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
    if info["model"] not in MODELS:
        raise UserError(f"{path} is of a network {utils.one_line(info['model'])!r}; model.py has {', '.join(MODELS)}")
    trained = info["settings"] if isinstance(info.get("settings"), dict) else {}
    dropouts = {name: trained.get(name) for name in ("block_dropout", "head_dropout")}  # for the digest alone
    dropouts = {name: p if type(p) in (int, float) and 0 <= p < 1 else 0.0 for name, p in dropouts.items()}
    settings = {"model": info["model"], **dropouts, "fast_blocks": False}
    try:
        network = build_model(settings, len(info["class_names"]), audio)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    check_state(path, state, network.state_dict())
    network.load_state_dict(state)
    if trained.get("network") not in (None, digest(network)):  # no error: versions of PyTorch print layers differently
        reason = f"{path} was trained with other layers than model.py has now, so its answers may be wrong"
        print(f"note: {reason}: undo the edit, or run python train.py --fresh", file=sys.stderr)
    return network.to(device).eval(), info


def check_info(path, info):
    """Return the AudioSettings in a model file's metadata. UserError names what is missing or can't be right."""
    if "band_mean" in info:  # a buffer of the network by now
        raise UserError(f"{path} is of an earlier version of this project: run python train.py --fresh")
    if missing := [key for key, kind in INFO_KINDS.items() if not isinstance(info.get(key), kind)]:
        raise UserError(f"{path} is not a model of this project: its metadata lacks {', '.join(missing)}")
    fields = [field.name for field in dataclasses.fields(AudioSettings)]
    if missing := [name for name in fields if name not in info["audio"]]:
        raise UserError(f"{path} lacks the audio settings {', '.join(missing)}")
    try:
        audio = AudioSettings(**info["audio"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path} has audio settings that can't be: {utils.one_line(error)}") from error
    names, ids = info["class_names"], info["class_ids"]
    is_text = all(isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_CLASS_NAME for name in names)
    if not is_text or len({*names}) < len(names):
        raise UserError(f"{path} has class names that are not short texts, each once: {utils.one_line(names)}")
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
        elif not state[name].isfinite().all():
            differences.append(f"{name} has values that are not finite")
    if not differences and "band_std" in state and not (state["band_std"] > 0).all():
        differences.append("band_std has values that are not above 0")
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(f"{path} does not fit its network: {'; '.join(differences[:4])}{more}")


def describe(dtype, shape):
    return f"{str(dtype).removeprefix('torch.')} {shape}"
