"""export.py and classifier.py: one .onnx file, the ready model, and three lines of Python."""

import contextlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
from conftest import REPOSITORY
from untrained import write_model

import classifier
from audio import AudioSettings, read_audio
from predict import load
from utils import UserError

RATE = 22_050  # Hz
READY = REPOSITORY / "models" / "urban_sounds.onnx"


@pytest.fixture(scope="module", params=["the ready model, as nothing is trained", "one that fills with silence"])
def exported(request, tmp_path_factory, scripts):
    """(a model file, its .onnx file)."""
    folder, model = tmp_path_factory.mktemp("models"), READY.with_suffix(".safetensors")
    which = ("--assets_dir", folder / "none")
    if "silence" in request.param:
        audio = AudioSettings(short_clips="silence", feature_dtype="float32", clip_seconds=2.0)
        model = write_model(folder, 1, audio=vars(audio), temperature=0.6)
        which = ("--model_dir", model)
    done = scripts.run("export", *which, "--output", folder / "a.onnx")
    assert done.returncode == 0, done.stderr
    assert f"its probabilities are within 1e-3 of {model.name}" in re.sub(r"\d\.\de-\d+", "1e-3", done.stdout)
    return model, folder / "a.onnx"


def test_export_over_its_model_is_refused(scripts, tmp_path):
    content = write_model(tmp_path, 1).read_bytes()
    path, again = tmp_path / "model_fold_1_best.safetensors", tmp_path / "link"
    again.symlink_to(path)
    for output in (path, again):
        done = scripts.run("export", "--model_dir", path, "--output", output)
        assert done.returncode == 2 and f"--output {output} is the model itself" in done.stderr
    assert path.read_bytes() == content


@pytest.fixture
def recording(tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "street.wav", rng.normal(0, 0.1, (9 * 48_000, 2)), 48_000)
    return tmp_path / "street.wav"


def test_onnx_file_answers_as_its_model_does(exported, recording):
    one, other = map(load, exported)
    for each in (recording, np.array([1, -1], np.float32), np.sin(np.arange(3000)).astype(np.float32)):
        answers = [model(each, None if each is recording else RATE) for model in (one, other)]
        np.testing.assert_allclose(answers[0].windows, answers[1].windows, atol=1e-3)
        assert answers[0].timeline[0][:3] == answers[1].timeline[0][:3]
    vectors = [model.embed(recording) for model in (one, other)]
    assert vectors[0].shape == (128,)
    np.testing.assert_allclose(*vectors, atol=1e-3)


def test_onnx_file_runs_by_onnxruntime_alone(exported, recording):
    session = onnxruntime.InferenceSession(exported[1])
    metadata = session.get_modelmeta().custom_metadata_map
    audio, names = json.loads(metadata["audio"]), json.loads(metadata["class_names"])
    rate = audio["sample_rate"]
    samples = read_audio(recording, rate)[None, : round(rate * audio["clip_seconds"])]
    (probabilities,) = session.run(["probabilities"], {"samples": np.concatenate([samples, samples])})
    assert probabilities.shape == (2, len(names)) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(probabilities[0], load(exported[0])(samples[0], rate).windows[0], atol=1e-3)


def test_prediction_by_an_onnx_file_imports_no_torch(recording):
    code = f"import predict, sys; predict.load({str(READY)!r})({str(recording)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_ready_model_answers_where_nothing_is_trained(scripts, recording, tmp_path):
    done = scripts.run("predict", recording, "--assets_dir", tmp_path / "none", "--json")
    assert done.returncode == 0 and "no trained model in" in done.stderr, done.stderr
    assert json.loads(done.stdout)["models"] == ["urban_sounds.onnx"]
    torch_answer, answer = load(READY.with_suffix(".safetensors"))(recording), load(READY)(recording)
    np.testing.assert_allclose(torch_answer.windows, answer.windows, atol=1e-3)
    write_model(tmp_path / "none" / "models", 0)
    done = scripts.run("predict", recording, "--assets_dir", tmp_path / "none", "--json")
    assert json.loads(done.stdout)["models"] == ["model_fold_0_best.safetensors"] and not done.stderr
    own = tmp_path / "none" / "models" / "model_fold_0_best.safetensors"
    shutil.copy(own, own.with_name("model_fold_none_best.safetensors"))
    done = scripts.run("predict", recording, "--assets_dir", tmp_path / "none", "--json")
    assert json.loads(done.stdout)["models"] == ["model_fold_none_best.safetensors"]


def test_samples_are_what_the_file_is(exported, recording):
    model = load(exported[0])
    samples, rate = soundfile.read(recording, dtype="int16")
    expected = model(recording).windows
    whole = samples.astype(np.int32)  # of 16 bits; as 32, 8 and unsigned ones
    for each in (samples, whole << 16, (whole << 16).astype(">i4"), (whole + 32_768).astype(np.uint16), whole / 32_768):
        np.testing.assert_allclose(model(each, rate).windows, expected, atol=1e-4)
    high = (whole >> 8 << 8).astype(np.int16)
    as_bytes = ((whole >> 8) + 128).astype(np.uint8)
    np.testing.assert_allclose(model(as_bytes, rate).windows, model(high, rate).windows, atol=1e-4)


NOISE = np.random.default_rng(0).normal(0, 0.1, RATE)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((NOISE,), "pass a path alone, or samples and their rate"),
        (("street.wav", RATE), "pass a path alone, or samples and their rate"),
        ((NOISE, str(RATE)), "rate is '22050': pass"),
        ((NOISE, float("nan")), "says nan Hz"),
        ((NOISE[:0], RATE), r"shape \(0,\): pass"),
        ((0.5, RATE), r"shape \(\): pass"),
        ((NOISE[:4].reshape(1, 2, 2), RATE), r"shape \(1, 2, 2\): pass"),
        ((NOISE > 0, RATE), "is of type bool"),
        ((NOISE.astype(complex), RATE), "is of type complex128"),
        ((["a", "b"], RATE), "is of type <U1"),
        (([1, 2, 3], RATE), "is of type int64"),
        ((NOISE[:5], 1_000_000), "is too short"),
        ((np.zeros(RATE), RATE), "is silent"),
        ((np.full(9 * RATE, 0.1), RATE), "is silent"),
    ],
)
def test_what_is_no_recording_is_refused_in_python_too(arguments, named):
    model = load(READY)
    for ask in (model, model.embed):
        with pytest.raises(UserError, match=named):
            ask(*arguments)


def test_silent_windows_are_not_in_the_vector():
    model, samples = load(READY), np.concatenate([np.tile(NOISE, 4), np.zeros(8 * RATE)])
    heard = [model.embed(samples[start * RATE :][: 4 * RATE], RATE) for start in (0, 2)]
    np.testing.assert_allclose(model.embed(samples, RATE), np.mean(heard, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda data: data[: len(data) // 2], "is not a readable .onnx file"),
        (lambda data: data.replace(b"class_names", b"class_nomes"), "its metadata lacks class_names"),
        (lambda data: data.replace(b"samples", b"snmples"), "does not take samples"),
        (lambda data: data + b'"\x84\x80\x00Scan', "by the operator Scan"),  # a length may be written with more bytes
    ],
)
def test_damaged_onnx_file_is_named(spoil, named, tmp_path):
    (tmp_path / "a.onnx").write_bytes(spoil(READY.read_bytes()))
    with pytest.raises(UserError, match=named):
        classifier.load(tmp_path / "a.onnx")


def write_onnx(path, values, operator="Identity", inputs=(), **attributes):
    """Write an .onnx file with the ready model's metadata, whose two outputs are `values` by way of an operator."""
    helper, ready = onnx.helper, onnx.load(READY)
    kind = onnx.TensorProto.STRING if values.dtype == object else helper.np_dtype_to_tensor_dtype(values.dtype)
    names = "probabilities", "embedding"
    nodes = [helper.make_node(operator, [*inputs, "values"], [name], **attributes) for name in names]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in names]
    constants = {"values": values, "three": np.array(3)}
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", ready.graph.input, outputs, constants)
    model = helper.make_model(graph, opset_imports=ready.opset_import, ir_version=ready.ir_version)
    model.metadata_props.extend(ready.metadata_props)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("values", "embeds"),
    [
        (np.full((1, 12), 1 / 12, np.float32), True),
        (np.eye(1, 10, dtype=np.float32) * 50, True),
        (np.array([[-1, 2, *[0] * 8]], np.float32), True),
        (np.full((1, 10), np.nan, np.float32), False),
        (np.full(10, 0.1, np.float32), False),
        (np.float32(0.1), False),
        (np.full((2, 10), 0.1, np.float32), False),
        (np.zeros((0, 10), np.float32), False),
        (np.eye(1, 10, dtype=np.int64), False),
        (np.array([["a"] * 10], object), False),
    ],
)
def test_onnx_file_that_gives_no_distribution_is_refused(values, embeds, tmp_path):
    model = load(write_onnx(tmp_path / "a.onnx", np.asarray(values)))
    with pytest.raises(UserError, match="gives no"):
        model(NOISE, RATE)
    with contextlib.nullcontext() if embeds else pytest.raises(UserError, match="gives no"):
        model.embed(NOISE, RATE)


def test_onnx_file_that_loops_is_refused(tmp_path):
    helper, values = onnx.helper, np.full((1, 10), 0.1, np.float32)
    load(write_onnx(tmp_path / "a.onnx", values))(NOISE, RATE)
    kinds = {"turn": onnx.TensorProto.INT64, "go": onnx.TensorProto.BOOL, "x": onnx.TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    outputs = [helper.make_tensor_value_info(f"next_{name}", kinds[name], None) for name in ("go", "x")]
    nodes = [helper.make_node("Identity", [name], [f"next_{name}"]) for name in ("go", "x")]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    path = write_onnx(tmp_path / "b.onnx", values, "Loop", ["three", ""], body=body)
    with pytest.raises(UserError, match="it loops, by the operator Loop"):
        load(path)
