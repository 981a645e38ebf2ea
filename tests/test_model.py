"""The networks against plain versions of themselves, and model files trusted and untrusted."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from untrained import SETTINGS

import model
import model_file
import train
from audio import AudioSettings
from utils import UserError

DEFAULT = AudioSettings()
SMALL = AudioSettings(n_mels=8)  # of the small network that the model files hold

# --- The network -------------------------------------------------------------------------------------------------


def build(name, n_classes=10, audio=DEFAULT, **changes):
    torch.manual_seed(0)
    return model.build_model({**SETTINGS, "model": name, **changes}, n_classes, audio)


def plain_layers(state, x, training, last_pool):
    """AudioCNN's layers as the design page writes them (ReLU before pooling), without dropout."""
    for number, pool in (1, (2, 2)), (2, (2, 2)), (3, last_pool):
        block = f"block{number}"
        x = F.conv2d(x, state[f"{block}.0.weight"], state[f"{block}.0.bias"], padding=1)
        statistics = state[f"{block}.1.running_mean"], state[f"{block}.1.running_var"]
        x = F.batch_norm(x, *statistics, state[f"{block}.1.weight"], state[f"{block}.1.bias"], training)
        x = F.max_pool2d(F.relu(x), pool)
    x = F.relu(F.conv1d(x.mean(dim=3), state["over_bands.weight"], state["over_bands.bias"], padding=1))
    x = F.relu(F.linear(x.flatten(1), state["hidden.weight"], state["hidden.bias"]))
    return F.linear(x, state["logits.weight"], state["logits.bias"])


def plain_view_logits(name, state, features, training):
    """(B, n_mels, frames) in dB -> (B, views, classes), one view after the other where the norms allow it."""
    x = ((features - state["band_mean"][:, None]) / state["band_std"][:, None])[:, None]
    if name == "AudioCNN":
        return plain_layers(state, x, training, (2, 4))[:, None]
    frames = x.shape[3] // 4
    x = x[..., : 4 * frames].unflatten(3, (frames, 4)).mean(dim=4)
    over_time, over_bands = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
    views = [x, x - over_time, x - over_bands, x - over_time - over_bands + x.mean((2, 3), keepdim=True)]
    logits = plain_layers(state, torch.cat(views), training, (2, 2))  # in training all views share a batch
    return torch.stack(logits.chunk(4), dim=1)


@pytest.fixture(params=model.MODELS)
def network(request):
    """A network without dropout, whose norms and bands have seen some data."""
    network = build(request.param)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running" in name or name.endswith(".1.weight") or name == "band_std":
                tensor.uniform_(0.5, 2)
    network.band_mean.normal_(-40, 5)
    return network


def plain_state(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def example(clips, frames=173):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, 128, frames, generator=generator) - 40


@pytest.mark.parametrize("training", [True, False])
def test_network_is_the_one_of_the_design(network, training):
    assert sum(parameter.numel() for parameter in network.parameters()) == 250_250
    x, name = example(2, 100), type(network).__name__
    state = plain_state(network)
    for parameter, _ in network.named_parameters():
        state[parameter].requires_grad_()
    expected = plain_view_logits(name, state, x, training)
    views = network.train(training).view_logits(x)
    assert views.shape == (2, {"AudioCNN": 1, "SharedAudioCNN": 4}[name], 10)
    torch.testing.assert_close(views, expected, rtol=1e-3, atol=1e-4)

    views.square().sum().backward()
    expected.square().sum().backward()
    for parameter, tensor in network.named_parameters():
        scale = float(state[parameter].grad.abs().max())
        if training and parameter.endswith(".0.bias"):  # the norm takes it away: what is left is rounding
            assert max(float(tensor.grad.abs().max()), scale) < 1e-4
            continue
        torch.testing.assert_close(tensor.grad, state[parameter].grad, rtol=1e-3, atol=1e-3 * scale)
    for buffer, tensor in network.named_buffers():
        if "running" in buffer:
            torch.testing.assert_close(tensor, state[buffer])
    network.eval()
    torch.testing.assert_close(network(x), network.view_logits(x).mean(dim=1))


@pytest.mark.parametrize("frames", [32, 35, 700])
def test_network_takes_any_number_of_frames(network, frames):
    x, state = example(3, frames), plain_state(network)
    logits = model.logits_of(network.train(), x.numpy().astype(np.float16))
    assert (logits.shape, logits.dtype, network.training) == ((3, 10), torch.float32, False)
    expected = plain_view_logits(type(network).__name__, state, x.half().float(), False).mean(dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    alone = torch.cat([model.logits_of(network, clip[None].half()) for clip in x])  # clips do not meet in evaluation
    torch.testing.assert_close(alone, logits, rtol=1e-3, atol=1e-4)


def test_no_part_of_a_clip_goes_unheard(network):
    x = example(4).requires_grad_()
    network.eval()(x).square().sum().backward()
    weight = x.grad.square().mean(dim=(0, 1)).sqrt()  # (frames,); in the mean over time each frame has a little
    assert (weight[:160] > weight.median() / 5).all()  # pooling leaves out less than 0.3 s


def test_unknown_network_names_the_known_ones():
    with pytest.raises(UserError, match=r"no model 'AudioCMM' in model.py: MODEL in config.py is one of SharedAudioC"):
        build("AudioCMM")


class Tiny(model.Network):
    """All that a new network has to be."""

    def __init__(self, n_classes, n_mels, block_dropout, head_dropout):
        super().__init__(n_mels)
        self.linear = nn.Linear(n_mels, n_classes)

    def forward(self, features):
        return self.linear(self.normalise(features).mean(dim=3).flatten(1))


def test_new_network_is_a_class_and_a_name(tmp_path, monkeypatch):
    monkeypatch.setitem(model.MODELS, "Tiny", Tiny)
    network, x = build("Tiny", 2), example(8)
    network.band_mean.fill_(-40)
    step = {"learning_rate": 0.01, "weight_decay": 0.0, "label_smoothing": 0.0, "precision": "float32"}
    optimizer = train.make_optimizer(network, step)
    targets = torch.eye(2)[torch.arange(8) % 2]
    losses = [train.train_step(network, optimizer, x, targets, step)[0].item() for _ in range(20)]
    assert losses[-1] < losses[0]
    info = {**INFO, "model": "Tiny", "audio": dataclasses.asdict(DEFAULT)}
    model_file.save_model(tmp_path / "tiny.safetensors", network.state_dict(), info)
    loaded, _ = model_file.load_model(tmp_path / "tiny.safetensors")
    assert torch.equal(model.logits_of(loaded, x), model.logits_of(network, x))


# --- Model files -------------------------------------------------------------------------------------------------

INFO = {
    "model": "AudioCNN",
    "class_names": ["dog_bark", "siren"],
    "class_ids": [3, 8],
    "audio": dataclasses.asdict(SMALL),
    "fold": 2,
    "scores": {"test_accuracy": 0.5},
    "temperature": 1.25,
}
AUDIO = INFO["audio"]


@pytest.fixture(scope="module")
def state():
    return build("AudioCNN", 2, SMALL).state_dict()


@pytest.fixture
def path(tmp_path, state):
    """A sound model file."""
    path = model_file.model_path(tmp_path / "models", 2)
    model_file.save_model(path, state, INFO)
    return path


def test_model_file_comes_back_as_saved(path, state):
    assert [file.name for file in path.parent.iterdir()] == ["model_fold_2_best.safetensors"]
    assert model_file.find_model(path.parent, 2) == model_file.find_model(path, 0) == path
    model_file.save_model(path.with_name("again"), dict(reversed(state.items())), INFO)
    assert path.with_name("again").read_bytes() == path.read_bytes()  # the same model is the same bytes
    network, info = model_file.load_model(path)
    path.write_bytes(b"")  # the network does not hold on to its file
    assert info == INFO
    assert not network.training
    assert list(network.state_dict()) == list(state)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_missing_model_says_which_there_are(path, tmp_path):
    assert "run python train.py" in refusal(tmp_path / "model_fold_0_best.safetensors")
    with pytest.raises(UserError, match=r"no model of fold 0 in .*: --fold_num is one of 2"):
        model_file.find_model(path.parent, 0)
    with pytest.raises(UserError, match=r"no model of fold 0 in .*: run python train\.py"):
        model_file.find_model(tmp_path, 0)


def refusal(path):
    """The one line that load_model refuses a file with; it names the file."""
    with pytest.raises(UserError) as caught:
        model_file.load_model(path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable()
    assert len(message) < 1500
    return message


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: without(state, "hidden.bias"), "lacks hidden.bias"),
        (lambda state: {**state, "a\nb": torch.zeros(2)}, "has 'a b', which the network lacks"),
        (lambda state: {**state, "logits.bias": torch.zeros(2).double()}, "logits.bias is float64 (2,), not float32"),
        (lambda state: {**state, "block1.0.bias": torch.full((32,), torch.inf)}, "block1.0.bias has values that are"),
        (lambda state: {**state, "band_std": torch.zeros(8)}, "band_std has values that are not above 0"),
        (lambda state: {}, "lacks band_mean; lacks band_std"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, named, path, state):
    model_file.save_model(path, change(state), INFO)
    assert f"does not fit its network: {named}" in refusal(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "ResNet"}, "is of a network 'ResNet'; model.py has SharedAudioCNN, AudioCNN"),
        ({"model": ["AudioCNN"]}, "is not a model of this project: its metadata lacks model"),
        ({"class_names": ["dog_bark"]}, "1 classes, and other class_ids"),
        ({"class_names": ["dog_bark", "siren", "drill"], "class_ids": [1, 2, 3]}, "logits.weight is float32 (2, 128)"),
        ({"class_names": ["siren", "\x1b[2J"]}, "class names that are not short texts, each once"),
        ({"class_names": ["siren", "x" * 300]}, "class names that are not short texts, each once"),
        ({"class_names": [], "class_ids": []}, "has 0 classes: a model has 1 to 1000"),
        ({"audio": 5}, "lacks audio"),
        ({"audio": without(AUDIO, "top_db")}, "lacks the audio settings top_db"),
        ({"audio": {**AUDIO, "clip_seconds": 0.1}}, "AudioCNN can't take 8 mel bands, 5 frames"),
        ({"temperature": float("nan")}, "temperature is 'nan': it must be from 0.05 to 20"),
        ({"temperature": 10**400}, "temperature is '1000"),
        (
            {"band_mean": [-40.0] * 8, "audio": {**AUDIO, "fine_frames": 2}},
            "of an earlier version of this project: run",
        ),
    ],
)
def test_metadata_that_can_not_be_are_named(change, named, path, state):
    model_file.save_model(path, state, {**INFO, **change})
    assert named in refusal(path)


def test_model_of_an_edited_network_is_noted(tmp_path, monkeypatch, capsys):
    network = build("SharedAudioCNN", block_dropout=0.1, head_dropout=0.5)
    trained = {"block_dropout": 0.1, "head_dropout": 0.5, "network": model.digest(network)}
    info = {**INFO, "model": "SharedAudioCNN", "audio": dataclasses.asdict(DEFAULT), "settings": trained}
    info |= {"class_names": list(map(str, range(10))), "class_ids": list(range(10))}
    path = tmp_path / "a.safetensors"
    model_file.save_model(path, network.state_dict(), info)
    for unedited in (path, REPOSITORY / "models" / "urban_sounds.safetensors"):
        model_file.load_model(unedited)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(model.SharedAudioCNN, "pools", ((2, 2), (2, 2), (2, 4)))  # the same weights
    model_file.load_model(path)
    assert f"note: {path} was trained with other layers than model.py has now" in capsys.readouterr().err
    for damaged in ("x", {"block_dropout": "x", "head_dropout": 10**400, "network": ["x"]}):
        model_file.save_model(path, network.state_dict(), {**info, "settings": damaged})
        model_file.load_model(path)


def header_of(blob):
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def with_header(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_absurd_files_are_refused(path):
    blob = path.read_bytes()
    header, body = header_of(blob)
    large = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    for content in (
        b"<!DOCTYPE html><html><body>404</body></html>",
        struct.pack("<Q", 2**63) + blob[8:],
        blob[:-10],
        blob + b"more",
        with_header([], body),
        with_header(without(header, "__metadata__"), body),
        with_header({**header, "__metadata__": {"model": "AudioCNN"}}, body),  # not JSON
        with_header({**header, "__metadata__": {"model": "[" * 100_000}}, body),
        with_header({**header, "logits.bias": large}, body),
    ):
        path.write_bytes(content)
        refusal(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["F64", "F16", "I64", "BOOL", "F8_E4M3", "F4", "C64"]),  # dtypes of safetensors
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
SIZES = st.lists(st.integers(-1, 2**64) | st.integers(0, 300), max_size=4)


def fuzz_bytes(blob, draw):
    content = bytearray(blob)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, 3000) | st.integers(0, len(blob) - 1))] = draw(st.integers(0, 255))
    return content[: draw(st.just(len(blob)) | st.integers(0, len(blob)))]


def fuzz_header(blob, draw):
    """One value of the audio settings, the metadata, a tensor's entry or the header becomes something else."""
    header, body = header_of(blob)
    info = {**INFO, "audio": dict(AUDIO)}
    changed = draw(st.sampled_from([info["audio"], info, header["logits.bias"], header]))
    key = draw(st.sampled_from([*changed, "band_mean"]))
    changed[key] = draw(VALUES | SIZES)
    if key != "__metadata__":
        header["__metadata__"] = {key: json.dumps(value) for key, value in info.items()}
    return with_header(header, body)


@pytest.mark.parametrize("fuzz", [fuzz_bytes, fuzz_header])
def test_fuzzed_file_loads_or_is_refused(fuzz, path):
    blob = path.read_bytes()

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(data=st.data())
    def load(data):
        path.write_bytes(fuzz(blob, data.draw))
        try:
            network, info = model_file.load_model(path)
        except UserError as error:
            assert str(error).isprintable()
            return
        audio = AudioSettings(**info["audio"])
        logits = model.logits_of(network, torch.zeros(1, audio.n_mels, min(audio.n_frames, 100)))
        assert logits.shape == (1, len(info["class_names"]))

    load()
