"""The networks against plain versions of themselves, and model files from friends and strangers."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import front_end
import model
from audio_settings import AudioSettings
from utils import UserError

DEFAULT = AudioSettings()
SMALL = AudioSettings(n_mels=8, fine_n_mels=4)  # of the small network that the model files hold
ROWS = SMALL.shape[0]


# --- The network -------------------------------------------------------------------------------------------------


def plain_audio_cnn(state, x, training):
    """AudioCNN as the design page writes it (ReLU before pooling), without dropout. Updates running statistics."""
    for number, pool in (1, (2, 2)), (2, (2, 2)), (3, (2, 4)):
        name = f"block{number}"
        x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
        statistics = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        x = F.batch_norm(x, *statistics, state[f"{name}.1.weight"], state[f"{name}.1.bias"], training)
        x = F.max_pool2d(F.relu(x), pool)
    x = x.mean(dim=3)
    x = F.relu(F.conv1d(x, state["over_bands.weight"], state["over_bands.bias"], padding=1))
    x = F.relu(F.linear(x.flatten(1), state["hidden.weight"], state["hidden.bias"]))
    return F.linear(x, state["logits.weight"], state["logits.bias"])


@pytest.fixture(scope="module")
def network():
    """An AudioCNN without dropout, whose norms have seen some data."""
    torch.manual_seed(0)
    network = model.AudioCNN(10, DEFAULT, block_dropout=0, head_dropout=0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running" in name or name.endswith(".1.weight"):
                tensor.uniform_(0.5, 2)
    return network


def plain_state(network):
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def test_parameters():
    network = model.build_model("AudioCNN", 10, DEFAULT)
    assert model.count_parameters(network) == 250_250
    assert network.hidden.in_features == 64 * 16


def test_each_view_forgets_what_it_should():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 16, 40)
    for dim, forgotten in (3, torch.randn(4, 1, 16, 1)), (2, torch.randn(4, 1, 1, 40)):
        view = model.without_mean(x, dim)
        torch.testing.assert_close(model.without_mean(x + forgotten, dim), view, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.without_mean(3 * x, dim), 3 * view)  # how steady a sound is can still be seen
        assert not torch.allclose(model.without_mean(x + forgotten.mean(), 5 - dim), x, atol=0.1)
        torch.testing.assert_close(view.mean(dim=dim), torch.zeros_like(view.mean(dim=dim)), rtol=0, atol=1e-5)
    assert torch.equal(model.without_mean(torch.full_like(x, 7.0), 3), torch.zeros_like(x))


def test_fine_rows_unfold_into_the_log_mel_they_came_from():
    audio = AudioSettings(fine_frames=4, feature_dtype="float32")
    samples = np.random.default_rng(0).normal(0, 0.1, audio.clip_samples).astype(np.float32)
    features = torch.from_numpy(front_end.clip_features(samples, audio))
    fine = model.unfold(features[None, None, audio.n_mels :], audio.fine_frames)
    assert np.array_equal(fine[0, 0], front_end.fine_log_mel(samples, audio))


def test_views_answer_with_the_mean_of_their_branches():
    torch.manual_seed(0)
    views = model.build_model("AudioViews", 10, DEFAULT).eval()
    assert model.count_parameters(views) == 685_214
    x = torch.randn(2, 1, 192, 100)
    for other in (x + torch.randn(2, 1, 192, 1), x + torch.randn(2, 1, 1, 100), 2 * x):
        assert not torch.allclose(views(x), views(other), atol=1e-4)  # no change is hidden from all of them
    for clip, logits in zip(x, views(x), strict=True):
        torch.testing.assert_close(views(clip[None])[0], logits, rtol=1e-4, atol=1e-5)


def test_shared_network_is_one_audio_cnn_on_four_views():
    torch.manual_seed(0)
    shared = model.SharedAudioCNN(10, DEFAULT, block_dropout=0.0, head_dropout=0.0).eval()
    assert model.count_parameters(shared) == 250_250
    x = torch.randn(3, 1, *DEFAULT.shape)
    level = x[:, :, :128, :172].unflatten(3, (43, 4)).mean(dim=4)
    views = [level, level - level.mean(3, keepdim=True), level - level.mean(2, keepdim=True)]
    views.append(views[1] - views[1].mean(2, keepdim=True))
    with torch.inference_mode():
        torch.testing.assert_close(shared(x), sum(shared.cnn(view) for view in views) / 4)
        shared.train()
        torch.testing.assert_close(shared(x), shared.cnn(torch.cat(views)))  # (12, 10): all views share a batch


@pytest.mark.parametrize("name", model.MODELS)
def test_no_part_of_a_clip_goes_unheard(name):
    torch.manual_seed(0)
    x = torch.randn(4, 1, *DEFAULT.shape, requires_grad=True)
    model.build_model(name, 10, DEFAULT).eval()(x).square().sum().backward()
    weight = x.grad.square().mean(dim=(0, 1, 2)).sqrt()  # (frames,); in the mean over time each frame has a little
    assert (weight[:165] > weight.median() / 5).all()  # pooling leaves out less than 0.2 s


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_audio_cnn_is_the_network_of_the_design(network, training, memory_format):
    x = torch.randn(2, 1, 128, 100, generator=torch.Generator().manual_seed(1))
    state = plain_state(network)
    for name, _ in network.named_parameters():
        state[name].requires_grad_()
    expected = plain_audio_cnn(state, x, training)
    network.train(training).zero_grad()
    before = plain_state(network)
    logits = network(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in network.named_parameters():
        scale = float(state[name].grad.abs().max())
        if training and name.endswith(".0.bias"):  # the norm takes it away: what is left is rounding
            assert max(float(parameter.grad.abs().max()), scale) < 1e-5
            continue
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-4 * scale)
    for name, tensor in network.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(tensor, state[name])
    network.load_state_dict(before)


@pytest.mark.parametrize("frames", [16, 17, 31, 96, 173, 700])
def test_any_number_of_frames_from_16_on(network, frames):
    with torch.inference_mode():
        x = torch.randn(1, 1, 128, frames)
        logits = network.eval()(x)
        assert logits.shape == (1, 10)
        torch.testing.assert_close(logits, plain_audio_cnn(plain_state(network), x, False), rtol=1e-4, atol=1e-5)


def test_clips_of_a_batch_do_not_meet_in_evaluation(network):
    network.eval()
    with torch.inference_mode():
        x = torch.randn(3, 1, 128, 173)
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-4, atol=1e-5)


def test_unknown_network_names_the_known_ones():
    with pytest.raises(UserError, match=r"no model 'AudioCMM' in model.py: MODEL in config.py is one of AudioCNN"):
        model.build_model("AudioCMM", 10, DEFAULT)


# --- Model files -------------------------------------------------------------------------------------------------

INFO = {
    "model": "AudioCNN",
    "class_names": ["dog_bark", "siren"],
    "class_ids": [3, 8],
    "audio": dataclasses.asdict(SMALL),
    "band_mean": [-40.5] * ROWS,
    "band_deviation": [12.25] * ROWS,
    "fold": 2,
    "scores": {"test_accuracy": 0.5},
    "temperature": 1.25,
    "unknown_threshold": -0.5,
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return model.build_model("AudioCNN", 2, SMALL).state_dict()


@pytest.fixture
def path(tmp_path, state):
    """A sound model file."""
    path = model.model_path(tmp_path / "models", 2)
    model.save_model(path, state, INFO)
    return path


def test_model_file_round_trip(path, state):
    assert path.name == "model_fold_2_best.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    network, info = model.load_model(path)
    assert info == INFO
    assert not network.training
    loaded = network.state_dict()
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_the_network_does_not_hold_on_to_its_file(path, state):
    network, _ = model.load_model(path)
    path.write_bytes(b"")
    assert torch.equal(network.state_dict()["logits.weight"], state["logits.weight"])


def test_the_same_model_is_the_same_bytes(path, state, tmp_path):
    model.save_model(tmp_path / "again.safetensors", dict(reversed(state.items())), INFO)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def refusal(path):
    """The one line that load_model refuses a file with; it names the file."""
    with pytest.raises(UserError) as caught:
        model.load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    return message


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: without(state, "hidden.bias"), "lacks hidden.bias"),
        (lambda state: {**state, "hidden.extra": torch.zeros(2)}, "has 'hidden.extra', which the network does not"),
        (lambda state: {**state, "a\nb": torch.zeros(2)}, r"has 'a\nb', which the network does not"),
        (lambda state: {**state, "logits.bias": torch.zeros(3)}, "logits.bias is float32 (3,), not float32 (2,)"),
        (lambda state: {**state, "logits.bias": torch.zeros(2).double()}, "logits.bias is float64 (2,), not float32"),
        (lambda state: {**state, "logits.bias": torch.tensor([1, torch.nan])}, "logits.bias has values that are not"),
        (lambda state: {**state, "block1.0.bias": torch.full((32,), torch.inf)}, "block1.0.bias has values that are"),
        (lambda state: {}, "lacks block1.0.weight; lacks block1.0.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, named, path, state):
    model.save_model(path, change(state), INFO)
    message = refusal(path)
    assert "does not fit its network" in message
    assert named in message


AUDIO = INFO["audio"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "ResNet"}, "is of a network 'ResNet'; model.py has AudioCNN"),
        ({"model": ["AudioCNN"]}, "lacks model"),
        ({"class_names": ["dog_bark"]}, "1 classes, and its class_ids are not as many"),
        ({"class_names": ["dog_bark", "siren", "drill"], "class_ids": [1, 2, 3]}, "logits.weight is float32 (2, 128)"),
        ({"class_names": ["siren", "siren"]}, "class names that are not text, each once"),
        ({"class_names": ["siren", "\x1b[2J"]}, "class names that are not text, each once"),
        ({"class_names": 5}, "lacks class_names"),
        ({"class_names": [], "class_ids": []}, "has 0 classes: a model has 1 to 1000"),
        ({"class_names": [str(n) for n in range(1001)]}, "has 1001 classes: a model has 1 to 1000"),
        ({"class_ids": [1, 1]}, "class_ids are not as many numbers"),
        ({"class_ids": [1, "2"]}, "class_ids are not as many numbers"),
        ({"band_mean": [1.0]}, "band_mean is not one finite number for each of 16 rows"),
        ({"band_mean": [float("nan")] * ROWS}, "band_mean is not one finite number"),
        ({"band_mean": [10**400] * ROWS}, "band_mean is not one finite number"),
        ({"band_deviation": [0.0] * ROWS}, "band_deviation is not one finite number"),
        ({"band_deviation": ["1"] * ROWS}, "band_deviation is not one finite number"),
        ({"audio": without(AUDIO, "top_db")}, "lacks the audio settings top_db"),
        ({"audio": {**AUDIO, "window": "hann"}}, "audio settings that can't be"),
        ({"audio": {**AUDIO, "n_mels": 128}}, "band_mean is not one finite number for each of 136 rows"),
        ({"audio": {**AUDIO, "n_fft": 10**12}}, "audio settings that can't be: the audio setting n_fft"),
        ({"audio": {**AUDIO, "hop_length": 0}}, "audio settings that can't be: the audio setting hop_length"),
        ({"audio": {**AUDIO, "sample_rate": "22050"}}, "audio settings that can't be: the audio setting sample_rate"),
        ({"temperature": float("nan")}, "temperature is 'nan': it must be a number from 0.05 to 20"),
        ({"temperature": -1.0}, "temperature is '-1.0'"),
        ({"temperature": 10**400}, "temperature is '1000"),
        ({"temperature": None}, "temperature is 'None'"),
        ({"temperature": "\x1b[2J"}, r"temperature is '\x1b[2J'"),
        ({"unknown_threshold": float("inf")}, "unknown_threshold is 'inf': it must be a number from"),
        ({"unknown_threshold": [1.0]}, "unknown_threshold is '[1.0]'"),
        ({"audio": {**AUDIO, "clip_seconds": 0.1}}, "(8, 5) mel bands and frames, and its network needs more"),
    ],
)
def test_metadata_that_can_not_be_is_named(change, named, path, state):
    model.save_model(path, state, {**INFO, **change})
    assert named in refusal(path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_fewer_mel_bands_than_the_pooling_takes(path):
    audio = dataclasses.replace(SMALL, n_mels=4)
    few = {"band_mean": [0.0] * audio.shape[0], "band_deviation": [1.0] * audio.shape[0]}
    info = {**INFO, "audio": dataclasses.asdict(audio), **few}
    model.save_model(path, model.build_model("AudioCNN", 2, audio).state_dict(), info)
    assert "(4, 173) mel bands and frames, and its network needs more" in refusal(path)


@pytest.mark.parametrize(("fine_frames", "fine_n_mels", "frames"), [(1, 4, 32), (64, 4, 32), (2, 130, 40)])
def test_least_and_unusual_fine_log_mels_compute(fine_frames, fine_n_mels, frames, tmp_path):
    seconds = (frames - 1) * SMALL.hop_length / SMALL.sample_rate
    audio = dataclasses.replace(SMALL, fine_frames=fine_frames, fine_n_mels=fine_n_mels, clip_seconds=seconds)
    statistics = {"band_mean": [0.0] * audio.shape[0], "band_deviation": [1.0] * audio.shape[0]}
    info = {**INFO, "model": "AudioViews", "audio": dataclasses.asdict(audio), **statistics}
    path = tmp_path / "views.safetensors"
    model.save_model(path, model.build_model("AudioViews", 2, audio).state_dict(), info)
    network, _ = model.load_model(path)
    assert network(torch.randn(3, 1, *audio.shape)).shape == (3, 2) and audio.n_frames == frames
    model.save_model(path, network.state_dict(), {**info, "audio": {**info["audio"], "clip_seconds": seconds / 2}})
    assert "its network needs more" in refusal(path)


@pytest.mark.parametrize("key", model.INFO_KINDS)
def test_metadata_that_lacks_something(key, path, state):
    model.save_model(path, state, without(INFO, key))
    assert f"not a model of this project: its metadata lacks {key}" in refusal(path)


def header_of(blob):
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def with_header(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def absurd_files(blob):
    header, body = header_of(blob)
    nested = {**header, "__metadata__": {"model": "[" * 100_000}}
    large = {**header, "logits.bias": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    return {
        "empty": b"",
        "one byte": b"\x00",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + blob[8:],
        "a header longer than the file": struct.pack("<Q", len(blob)) + blob[8:],
        "a header of no bytes": struct.pack("<Q", 0),
        "a header that is not JSON": with_header(b"{" * 50, body),
        "a header that is a list": with_header([], body),
        "a header that is not text": with_header(b"\xff\xfe" * 20, body),
        "no tensors": with_header({}, b""),
        "no metadata": with_header(without(header, "__metadata__"), body),
        "metadata that nests": with_header(nested, body),
        "metadata that is not JSON": with_header({**header, "__metadata__": {"model": "AudioCNN"}}, body),
        "a tensor larger than the file": with_header(large, body),
        "cut off in the header": blob[:500],
        "cut off in the tensors": blob[:-10],
        "something behind the tensors": blob + b"more",
        "zeros": bytes(len(blob)),
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    }


@pytest.mark.parametrize("what", absurd_files(with_header({}, b"")))
def test_absurd_files_are_refused(what, path):
    path.write_bytes(absurd_files(path.read_bytes())[what])
    refusal(path)


def test_missing_file_says_what_to_do(tmp_path):
    assert "run python train.py" in refusal(tmp_path / "model_fold_0_best.safetensors")
    assert "no model file" in refusal(tmp_path)


FUZZ = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


def loads_or_is_refused(path):
    """Load a model file that may be anything: a UserError of one line, or a network that computes."""
    try:
        network, info = model.load_model(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    audio = AudioSettings(**info["audio"])
    with torch.inference_mode():
        logits = network(torch.zeros(1, 1, audio.shape[0], min(audio.n_frames, 100)))
    assert logits.shape == (1, len(info["class_names"]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, state):
    """The bytes of a sound model file."""
    path = tmp_path_factory.mktemp("sound") / "model.safetensors"
    model.save_model(path, state, INFO)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_fuzzed_bytes(path, sound, data):
    blob = bytearray(sound)
    header_length = 8 + struct.unpack("<Q", blob[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header_length) | st.integers(0, len(blob) - 1))
        blob[place] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[: data.draw(st.just(len(blob)) | st.integers(0, len(blob)))])
    loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_fuzzed_metadata(path, sound, data):
    info = dict(INFO)
    key = data.draw(st.sampled_from([*model.INFO_KINDS, "temperature", "unknown_threshold"]))
    if key == "audio" and data.draw(st.booleans()):
        info["audio"] = {**AUDIO, data.draw(st.sampled_from([*AUDIO, "x"])): data.draw(VALUES)}
    elif isinstance(info.get(key), list) and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(info[key]) - 1))
        info[key] = [*info[key][:place], data.draw(VALUES), *info[key][place + 1 :]]
    else:
        info[key] = data.draw(VALUES)
    header, body = header_of(sound)
    texts = {key: json.dumps(value) for key, value in info.items()}
    path.write_bytes(with_header({**header, "__metadata__": texts}, body))
    loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_fuzzed_tensor_headers(path, sound, data):
    header, body = header_of(sound)
    name = data.draw(st.sampled_from([*header, "more"]))
    entry = dict(header["logits.bias"] if name in ("more", "__metadata__") else header[name])
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U16", "X"]
    numbers = st.lists(st.integers(-1, 2**64) | st.integers(0, 300), max_size=4)
    entry[part] = data.draw(st.sampled_from(dtypes) if part == "dtype" else numbers)
    path.write_bytes(with_header({**header, name: entry}, body))
    loads_or_is_refused(path)
