"""export.py and classifier.py: one .onnx file, the ready model, and three lines of Python."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
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


@pytest.fixture
def recording(tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "street.wav", rng.normal(0, 0.1, (9 * 48_000, 2)), 48_000)
    return tmp_path / "street.wav"


def test_onnx_file_answers_as_its_model_does(exported, recording):
    one, other = map(load, exported)
    for each in (recording, np.ones(1, np.float32), np.sin(np.arange(3000)).astype(np.float32)):
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
    np.testing.assert_allclose(model(samples, rate).windows, model(recording).windows, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda data: data[: len(data) // 2], "is not a readable .onnx file"),
        (lambda data: data.replace(b"class_names", b"class_nomes"), "its metadata lacks class_names"),
        (lambda data: data.replace(b"samples", b"snmples"), "does not take samples"),
    ],
)
def test_damaged_onnx_file_is_named(spoil, named, tmp_path):
    (tmp_path / "a.onnx").write_bytes(spoil(READY.read_bytes()))
    with pytest.raises(UserError, match=named):
        classifier.load(tmp_path / "a.onnx")
