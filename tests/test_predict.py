"""predict.py through its command line, and its features and probabilities against those of training."""

import contextlib
import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPOSITORY

import audio as audio_file
import batches
import data_loader
import model
import predict
import utils
from reports import answers, plot_recording

RATE = 22_050  # Hz; the models' own
SLOW_TO_IMPORT = {
    "librosa",
    "pandas",
    "wandb",
    "huggingface_hub",
    "soundata",
    "matplotlib",
    "numba",
    "sympy",
    "torchaudio",
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory, miniature, scripts, run_script):
    """The miniature preprocessed, and fold 0 trained for two epochs."""
    assets = tmp_path_factory.mktemp("predict") / "assets"
    done = run_script("preprocess_data.py", "--data_dir", miniature, "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    done = scripts.run("train", "--folds", 0, "--epochs", 2, "--batch_size", 8, "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    return assets


@pytest.fixture(scope="module")
def loaded(assets):
    """(network, info) of the trained fold."""
    return model.load_model(model.model_path(assets / "models", 0))


@pytest.fixture(scope="module")
def clip(miniature):
    """A clip of the data set's fold 1, which fold 0 tests."""
    return sorted((miniature / "audio" / "fold1").glob("*.wav"))[0]


def sound(seconds, rate=RATE):
    """A rising tone with some noise."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(t))
    return 0.3 * np.sin(2 * np.pi * (300 + 200 * t) * t) + noise


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, sound(1.5), RATE)
    return path


def read_output(done):
    """Return (seconds, class, {class: per cent}) as predict.py prints them, checking the form of every line."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second, *rest = [line for line in done.stdout.splitlines() if not line.startswith("note: ")]
    seconds = re.fullmatch(r".+ \((\d+\.\d\d) s\), \S+\.safetensors", first)[1]
    best, confidence = re.fullmatch(r"(\w+), confidence (\d+\.\d)%", second).groups()
    rows = [re.fullmatch(r"  (\w+) +(\d+\.\d)%(?:  (█+))?", line).groups() for line in rest]
    shares = {name: float(share) for name, share, _ in rows}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) == pytest.approx(100, abs=0.05 * len(shares))
    assert (best, float(confidence)) == next(iter(shares.items()))
    for _, share, bar in rows:
        assert abs(len(bar or "") - float(share) / 100 * answers.BAR_WIDTH) <= 0.53
    return float(seconds), best, shares


def refusal(done):
    """The one line that a run which can't be done ends with."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


# --- What is printed ---------------------------------------------------------------------------------------------


def test_output_of_a_clip_is_what_the_training_tested(assets, clip, scripts):
    seconds, _, shares = read_output(scripts.run("predict", clip, "--raw", "--assets_dir", assets))
    assert seconds == pytest.approx(soundfile.info(clip).duration, abs=0.01)
    with open(assets / "results" / "predictions_fold_0.csv", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["slice_file_name"] == clip.name)
    assert shares.keys() == row.keys() - {"slice_file_name", "classID"}
    assert len(shares) == 10
    for name, share in shares.items():
        assert share == pytest.approx(100 * float(row[name]), abs=0.06)


def test_model_file_alone_is_enough(assets, recording, scripts, tmp_path):
    expected = scripts.run("predict", recording, "--assets_dir", assets).stdout
    lonely = tmp_path / "empty" / "model_fold_0_best.safetensors"
    lonely.parent.mkdir()
    shutil.copy(model.model_path(assets / "models", 0), lonely)
    for flags in (("--model_dir", lonely.parent), ("--model_dir", lonely), ("--model_dir", lonely, "--fold_num", 7)):
        done = scripts.run("predict", recording, "--assets_dir", tmp_path / "nothing", *flags)
        read_output(done)
        assert done.stdout == expected
    named = lonely.rename(tmp_path / "mine.safetensors")
    assert "mine.safetensors" in scripts.run("predict", recording, "--model_dir", named).stdout


def test_command_line_in_another_folder_on_a_terminal_of_ascii(assets, tmp_path, run_script):
    path = tmp_path / "señal – ü.wav"
    soundfile.write(path, sound(1), RATE)
    flags = ("--model_dir", assets / "models")
    done = run_script("predict.py", path.name, *flags, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout.startswith("se?al ? ?.wav (1.00 s)")
    assert re.search(r"\d%  \?+$", done.stdout, re.M)


def test_reader_that_has_gone_makes_no_traceback(assets, recording):
    command = [sys.executable, REPOSITORY / "predict.py", recording, "--assets_dir", assets]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before it has imported anything
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_prediction_imports_nothing_that_it_does_not_use(assets, recording):
    program = (
        "import sys, predict, utils\n"
        f"sys.argv = ['predict.py', {str(recording)!r}, '--assets_dir', {str(assets)!r}]\n"
        "utils.run(predict.main)\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    modules = {name.split(".")[0] for name in done.stderr.split()}
    assert {"torch", "soundfile"} <= modules
    assert modules & SLOW_TO_IMPORT == set()


# --- Features and clips ------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """A network that keeps its inputs and finds every class alike."""

    def forward(self, x):
        self.inputs = x.squeeze(1).numpy().copy()
        return torch.zeros(len(x), 10)


def test_features_are_those_of_training_bit_for_bit(assets, miniature, loaded):
    _, info = loaded
    info = {**info, "band_mean": [0.0] * 192, "band_deviation": [1.0] * 192}
    data = data_loader.load_processed(assets / "data")
    recorder = Recorder()
    rates = set()
    for clip, stored in zip(data.clips, data.features, strict=True):
        path = miniature / "audio" / f"fold{clip['fold']}" / clip["slice_file_name"]
        rates.add(soundfile.info(path).samplerate)
        predict.predict(recorder, info, audio_file.read_audio(path, RATE))
        assert recorder.inputs.shape == (1, *data.audio.shape)
        assert np.array_equal(recorder.inputs[0], stored.astype(np.float32)), path.name
    assert len(rates) > 3


def test_normalisation_is_that_of_training(loaded):
    _, info = loaded
    recorder = Recorder()
    samples = sound(4).astype(np.float32)
    predict.predict(recorder, info, samples)
    features = audio_file.clip_features(samples, data_loader.AudioSettings(**info["audio"]))
    statistics = [torch.tensor(info[name]) for name in ("band_mean", "band_deviation")]
    expected = batches.normalise(torch.from_numpy(features)[None], statistics)[:, 0].numpy()
    assert np.array_equal(recorder.inputs, expected)


@pytest.mark.parametrize(("seconds", "windows"), [(0.001, 1), (1, 1), (4, 1), (4.1, 1), (4.3, 2), (6, 2), (9.9, 4)])
def test_long_recordings_are_the_mean_of_their_windows(seconds, windows, loaded, monkeypatch):
    monkeypatch.setattr(predict, "WINDOWS_AT_ONCE", 3)
    network, info = loaded
    samples = sound(seconds).astype(np.float32)
    starts = [min(2 * RATE * n, max(len(samples) - 4 * RATE, 0)) for n in range(windows)]
    expected = [predict.predict(network, info, samples[start : start + 4 * RATE]) for start in starts]
    answer = predict.classify([samples], [loaded])
    np.testing.assert_allclose(answer.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(answer.starts, np.array(starts) / RATE)
    np.testing.assert_allclose(predict.predict(network, info, samples), np.mean(expected, axis=0), atol=1e-5)
    assert answer.mean.sum() == pytest.approx(1, abs=1e-5)
    assert answer.seconds == pytest.approx(seconds if windows > 1 or seconds <= 4 else 4, abs=1 / RATE)


# --- Files of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 8000, 1, "PCM_16"),
        ("a.wav", 96_000, 2, "PCM_24"),
        ("a.wav", 44_100, 8, "FLOAT"),
        ("a.wav", 11_025, 1, "MS_ADPCM"),
        ("a.flac", 48_000, 2, "PCM_16"),
        ("a.ogg", 44_100, 1, "VORBIS"),
        ("a.mp3", 44_100, 2, "MPEG_LAYER_III"),
        ("a.aiff", 22_050, 1, "PCM_U8" if "PCM_U8" in soundfile.available_subtypes("AIFF") else "PCM_16"),
        ("a name without an ending", 22_050, 1, "PCM_16"),
    ],
)
def test_formats(name, rate, channels, subtype, assets, scripts, tmp_path):
    path = tmp_path / name
    samples = np.repeat(sound(1.5, rate)[:, None], channels, axis=1)
    soundfile.write(path, samples, rate, subtype, format=None if "." in name else "WAV")
    seconds, _, shares = read_output(scripts.run("predict", path, "--assets_dir", assets))
    assert seconds == pytest.approx(1.5, abs=0.06)
    assert len(shares) == 10


@pytest.mark.parametrize("n_samples", [1, 2, 500])
def test_shorter_than_one_fft_frame(n_samples, assets, scripts, tmp_path):
    soundfile.write(tmp_path / "short.wav", sound(1)[1000 : 1000 + n_samples], RATE)
    read_output(scripts.run("predict", tmp_path / "short.wav", "--assets_dir", assets))


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, np.asarray(samples), rate, **options)


BAD_AUDIO = {
    "missing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "no recordings in"),
    "empty": (lambda path: path.write_bytes(b""), "can't be decoded as audio"),
    "text": (lambda path: path.write_text("siren\n" * 50), "can't be decoded as audio"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><p>404</p>"), "can't be decoded as audio"),
    "a header alone": (lambda path: write(path, []), "holds no audio samples"),
    "silent": (lambda path: write(path, np.zeros(RATE)), "is silent"),
    "NaN": (lambda path: write(path, [0.1, np.nan, 0.2], subtype="FLOAT"), "NaN"),
}


@pytest.mark.parametrize("what", BAD_AUDIO)
def test_what_is_no_recording_is_named(what, assets, scripts, tmp_path):
    make, named = BAD_AUDIO[what]
    path = tmp_path / "bad.wav"
    make(path)
    line = refusal(scripts.run("predict", path, "--assets_dir", assets))
    assert str(path) in line
    assert named in line


# --- Models ------------------------------------------------------------------------------------------------------


def test_no_model_names_the_folds_there_are(assets, recording, scripts, tmp_path):
    for number in (3, -1, 99):
        line = refusal(scripts.run("predict", recording, "--assets_dir", assets, "--fold_num", number))
        assert f"no model of fold {number} in {assets / 'models'}: --fold_num is one of 0" in line
    line = refusal(scripts.run("predict", recording, "--assets_dir", tmp_path))
    assert f"no model of fold 0 in {tmp_path / 'models'}: run python train.py, or name its --model_dir" in line
    done = scripts.run("predict", recording, "--fold_num", "first")
    assert done.returncode == 2
    assert "--fold_num" in done.stderr.splitlines()[-1]


def test_damaged_model_is_named(assets, recording, scripts, tmp_path):
    path = tmp_path / "model_fold_0_best.safetensors"
    path.write_bytes(model.model_path(assets / "models", 0).read_bytes()[:-100])
    assert f"{path} is not a readable safetensors file" in refusal(
        scripts.run("predict", recording, "--model_dir", tmp_path)
    )


def test_model_whose_numbers_overflow_is_named(recording, loaded, scripts, tmp_path):
    network, info = loaded
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, tensor in state.items():
        if "hidden" in name or "logits" in name:
            tensor.mul_(1e38)
    path = tmp_path / "wild.safetensors"
    model.save_model(path, state, info)
    line = refusal(scripts.run("predict", recording, "--model_dir", path))
    assert f"{recording}: the model gives no probabilities for it" in line


def test_class_names_are_checked_against_a_data_set(assets, recording, scripts, tmp_path):
    expected = scripts.run("predict", recording, "--assets_dir", assets).stdout
    done = scripts.run("predict", recording, "--assets_dir", assets, "--processed_dir", assets / "data")
    assert done.stdout == expected
    names = utils.load_pickle(assets / "data" / "class_mapping.pkl")
    swapped = {**names, 3: names[8], 8: names[3]}
    utils.save_pickle(tmp_path / "class_mapping.pkl", swapped)
    line = refusal(scripts.run("predict", recording, "--assets_dir", assets, "--processed_dir", tmp_path))
    assert f"{tmp_path} has the classes {swapped}, and the model was trained on {names}" in line
    line = refusal(scripts.run("predict", recording, "--assets_dir", assets, "--processed_dir", tmp_path / "none"))
    assert str(tmp_path / "none" / "class_mapping.pkl") in line


# --- Many recordings, and what is shown of them ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with three recordings, one of them in a folder of its own, and a text file."""
    folder = tmp_path / "recordings"
    (folder / "below").mkdir(parents=True)
    soundfile.write(folder / "b.wav", sound(1), RATE)
    soundfile.write(folder / "a.flac", sound(9.5, 48_000), 48_000)
    soundfile.write(folder / "below" / "c.OGG", sound(5), RATE, format="OGG")
    (folder / "notes.txt").write_text("no sound")
    return folder


def as_json(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_folders_patterns_and_files(folder, assets, scripts):
    expected = [str(folder / name) for name in ("a.flac", "b.wav", "below/c.OGG")]
    for arguments in ([folder], [folder / "**" / "*.[wfO]*"], expected, [folder, expected[1], folder / "*.wav"]):
        done = scripts.run("predict", *arguments, "--json", "--assets_dir", assets)
        assert done.returncode == 0, done.stderr
        assert [value["file"] for value in as_json(done)] == expected
    for value in as_json(done):
        assert value["class"] == next(iter(value["probabilities"])) and len(value["probabilities"]) == 10
        assert value["models"] == ["model_fold_0_best.safetensors"]
        assert value["timeline"][-1]["end"] == pytest.approx(value["seconds"], abs=0.01)
    assert [value["windows"] for value in as_json(done)] == [4, 1, 2]


def test_nothing_found_is_named(folder, assets, scripts):
    (folder / "empty").mkdir()
    for argument, named in ((folder / "empty", "no recordings in"), (folder / "*.xyz", "no file is called")):
        line = refusal(scripts.run("predict", argument, "--assets_dir", assets))
        assert named in line and str(argument) in line


def test_one_bad_file_among_many_is_named_in_the_end(folder, assets, scripts):
    (folder / "aa.wav").write_text("no sound")
    flags = (folder, "--assets_dir", assets)
    done = scripts.run("predict", *flags)
    assert done.returncode == 2
    assert [line.split(" (")[0] for line in done.stdout.splitlines() if ".safetensors" in line] == [
        str(folder / name) for name in ("a.flac", "b.wav", "below/c.OGG")
    ]
    first, second = done.stderr.splitlines()
    assert first == "error: 1 of 4 recordings can't be predicted:"
    assert second.startswith(f"  {folder / 'aa.wav'} can't be decoded as audio")
    values = as_json(scripts.run("predict", *flags, "--json"))
    assert [value["file"] for value in values if "error" in value] == [str(folder / "aa.wav")]
    lines = scripts.run("predict", *flags, "--quiet").stdout.split("\n")
    assert [bool(line) for line in lines] == [True, False, True, True, False]


def test_quiet_top_k_and_standard_input(recording, assets, run_script, scripts):
    shown = read_output(scripts.run("predict", recording, "--assets_dir", assets))
    assert scripts.run("predict", recording, "--quiet", "--assets_dir", assets).stdout == f"{shown[1]}\n"
    three = scripts.run("predict", recording, "--top_k", 3, "--assets_dir", assets).stdout.splitlines()
    assert len([line for line in three if not line.startswith("note: ")]) == 5
    with open(recording, "rb") as file:
        command = [sys.executable, str(REPOSITORY / "predict.py"), "-", "--json", "--assets_dir", str(assets)]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    (value,) = as_json(done)
    assert value["file"] == "standard input" and value["class"] == shown[1]
    assert value["probabilities"] == pytest.approx({name: share / 100 for name, share in shown[2].items()}, abs=6e-4)
    command.remove("--json")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "standard input can't be decoded as audio" in refusal(done)


def test_timeline_files(folder, assets, scripts, tmp_path):
    flags = ("--csv", tmp_path / "t.csv", "--labels", tmp_path / "labels", "--assets_dir", assets)
    done = scripts.run("predict", folder / "a.flac", folder / "b.wav", *flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {str(folder / "a.flac"), str(folder / "b.wav")}
    labels = sorted((tmp_path / "labels").iterdir())
    assert [path.name.endswith(("_a.flac.txt", "_b.wav.txt")) for path in labels] == [True, True]
    assert sum(len(path.read_text().splitlines()) for path in labels) == len(rows)
    alone = scripts.run("predict", folder / "a.flac", "--labels", tmp_path / "a.txt", "--assets_dir", assets)
    assert (tmp_path / "a.txt").read_text() == labels[0].read_text(), alone.stderr
    assert "timeline:" in alone.stdout and "(mean of 4 windows)" in alone.stdout


def test_windows_by_flags(folder, assets, scripts):
    flags = (folder / "a.flac", "--json", "--assets_dir", assets)
    (value,) = as_json(scripts.run("predict", *flags, "--window_seconds", 1, "--hop_seconds", 0.25))
    assert value["windows"] == 35
    line = refusal(scripts.run("predict", *flags, "--window_seconds", 5))
    assert "--window_seconds 5 is longer than the model's clips of 4.0 s" in line
    assert "leaves gaps" in refusal(scripts.run("predict", *flags, "--window_seconds", 1, "--hop_seconds", 2))


def test_silence_within_a_recording_is_told(assets, scripts, tmp_path):
    samples = np.concatenate([sound(4), np.zeros(10 * RATE), sound(4)])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    (value,) = as_json(scripts.run("predict", tmp_path / "a.wav", "--json", "--assets_dir", assets))
    (silent,) = (part for part in value["timeline"] if part["class"] == "silence")
    assert (silent["start"], silent["end"]) == (6, 12)


def test_temperature_is_applied_unless_raw(loaded, recording, scripts, tmp_path):
    network, info = loaded
    path = tmp_path / "model.safetensors"
    shares = {}
    for temperature in (1.0, 3.0):
        model.save_model(path, network.state_dict(), {**info, "temperature": temperature})
        for flags in ((), ("--raw",)):
            (value,) = as_json(scripts.run("predict", recording, "--json", *flags, "--model_dir", path))
            shares[temperature, *flags] = value["probabilities"]
    assert shares[1.0,] == shares[1.0, "--raw"] == shares[3.0, "--raw"] != shares[3.0,]
    logits = {name: np.log(share) / 3 for name, share in shares[1.0,].items() if share > 0.005}
    for name, other in itertools.pairwise(logits):
        found = np.log(shares[3.0,][name]) - np.log(shares[3.0,][other])
        assert found == pytest.approx(logits[name] - logits[other], abs=0.02)


def test_all_folds_answer_with_their_mean(loaded, recording, scripts, tmp_path):
    network, info = loaded
    single = []
    for fold in (0, 4):
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for name, tensor in state.items():
            if name.endswith("logits.bias"):
                tensor += torch.arange(10) * fold
        model.save_model(model.model_path(tmp_path, fold), state, {**info, "fold": fold})
        flags = ("--json", "--model_dir", tmp_path)
        single += as_json(scripts.run("predict", recording, *flags, "--fold_num", fold))
    (mean,) = as_json(scripts.run("predict", recording, *flags, "--fold_num", "all"))
    assert mean["models"] == [model.model_path(tmp_path, fold).name for fold in (0, 4)]
    for name, share in mean["probabilities"].items():
        assert share == pytest.approx(
            (single[0]["probabilities"][name] + single[1]["probabilities"][name]) / 2, abs=1e-4
        )
    text = scripts.run("predict", recording, "--model_dir", tmp_path, "--fold_num", "all").stdout
    assert text.splitlines()[0].endswith(", mean of 2 models")
    names = [*info["class_names"][1:], info["class_names"][0]]
    model.save_model(model.model_path(tmp_path, 5), network.state_dict(), {**info, "class_names": names})
    line = refusal(scripts.run("predict", recording, *flags, "--fold_num", "all"))
    assert "differ in class_names" in line and "model_fold_5_best.safetensors" in line


def test_clip_that_the_model_has_trained_on_is_told(assets, miniature, scripts):
    notes = {}
    for fold in (1, 2, 3):
        clip = sorted((miniature / "audio" / f"fold{fold}").glob("*.wav"))[0]
        (value,) = as_json(scripts.run("predict", clip, "--json", "--assets_dir", assets))
        (notes[fold],) = (note for note in value["notes"] if "data set" in note)
    assert "not trained on" in notes[1] and "chosen its epoch" in notes[2] and "trained on it" in notes[3]


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal is POSIX's")
def test_colours_only_on_a_terminal_that_wants_them(assets, recording):
    import pty

    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        ours, theirs = pty.openpty()
        command = [sys.executable, REPOSITORY / "predict.py", recording, "--assets_dir", assets]
        base = {**os.environ, "TERM": "xterm"}
        base.pop("NO_COLOR", None)
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env={**base, **env}) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # Linux's way to say that the other side has closed
                while part := os.read(ours, 4096):
                    shown += part
        os.close(ours)
        assert process.returncode == 0
        assert (b"\033[" in shown) == coloured


# --- Pictures ----------------------------------------------------------------------------------------------------


def test_pictures(folder, assets, scripts, tmp_path):
    from matplotlib.image import imread

    flags = ("--plot", tmp_path / "plot.png", "--explain", tmp_path / "why.png", "--assets_dir", assets)
    done = scripts.run("predict", folder / "a.flac", *flags)
    assert done.returncode == 0, done.stderr
    for name in ("plot.png", "why.png"):
        image = imread(tmp_path / name)
        assert image.shape[0] > 900 and image.shape[1] > 1500 and len(np.unique(image[..., :3])) > 100
    done = scripts.run("predict", folder, "--plot", tmp_path / "plots", "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_sketch_follows_the_whole_recording_whatever_the_windows(loaded):
    samples = sound(11.3).astype(np.float32)
    audio = data_loader.AudioSettings(**loaded[1]["audio"])
    whole = audio_file.log_mel(samples, audio)
    for window, hop in ((None, None), (1.0, 0.3), (4.0, 4.0)):
        sketch = plot_recording.Sketch(audio)
        predict.classify([samples], [loaded], window, hop, watch=sketch.add)
        extremes, log_mel = np.concatenate(sketch.extremes), np.concatenate(sketch.log_mels, axis=1)
        assert abs(len(extremes) - len(samples) / audio.hop_length) <= 2 and log_mel.shape[1] == len(extremes)
        assert extremes.min() == samples.min() and extremes.max() == samples.max()
        inner = slice(10, whole.shape[1] - 10)
        likeness = np.corrcoef(log_mel[:, inner].ravel(), whole[:, : log_mel.shape[1]][:, inner].ravel())[0, 1]
        assert likeness > 0.85  # frames at a window's edge hear half of it
