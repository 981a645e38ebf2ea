"""predict.py through its command line, and its features and probabilities against those of training."""

import csv
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
from untrained import write_model

import classifier
import data_loader
import model
import model_file
import predict
import utils
from reports import answers
from utils import UserError

RATE = 22_050  # Hz; the models' own
SLOW_TO_IMPORT = {"librosa", "pandas", "sklearn", "wandb", "huggingface_hub", "soundata"}
SLOW_TO_IMPORT |= {"matplotlib", "numba", "sympy", "torchaudio"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory, miniature, scripts):
    """The miniature preprocessed, and a model of fold 0 that was trained on fold 2 and has chosen its epoch with 1."""
    assets = tmp_path_factory.mktemp("predict") / "assets"
    done = scripts.run("preprocess_data", "--data_dir", miniature, "--workers", 1, "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    write_model(assets / "models", 0, training_folds=[3])
    return assets


@pytest.fixture(scope="module")
def loaded(assets):
    """The model's Classifier."""
    return classifier.load(model_file.model_path(assets / "models", 0))


@pytest.fixture
def run(assets, scripts):
    """A function that runs predict.py with the assets."""
    return lambda *arguments: scripts.run("predict", *arguments, "--assets_dir", assets)


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
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read_output(done):
    """Return (seconds, class, {class: per cent}) as predict.py prints them, checking the form of every line."""
    assert (done.returncode, done.stderr) == (0, "")
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
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


# --- As training does it -----------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """A network that keeps its inputs and finds every class alike."""

    def forward(self, features):
        self.features = features.numpy().copy()
        return torch.zeros(len(features), 10)


def test_features_are_those_of_training_bit_for_bit(assets, miniature, loaded, monkeypatch):
    data, recorder, rates = data_loader.load_processed(assets / "data"), Recorder(), set()
    monkeypatch.setattr(loaded, "networks", [recorder])
    for name, fold, stored in zip(data.clips["slice_file_name"], data.folds, data.features, strict=True):
        path = miniature / "audio" / f"fold{fold}" / name
        rates.add(soundfile.info(path).samplerate)
        loaded(path)
        assert np.array_equal(recorder.features, stored[None].astype(np.float32)), name
    assert len(rates) > 3


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_output_is_the_softmax_of_what_testing_computes(temperature, assets, miniature, loaded, scripts, tmp_path):
    network, info = loaded.networks[0], loaded.info
    data = data_loader.load_processed(assets / "data")
    expected = (model.logits_of(network, data.features[:1]) / (temperature or 1)).softmax(dim=1)[0]
    clip = miniature / "audio" / f"fold{data.folds[0]}" / data.clips["slice_file_name"][0]
    path = tmp_path / "model.safetensors"
    model_file.save_model(path, network.state_dict(), {**info, **({"temperature": temperature} if temperature else {})})
    seconds, _, shares = read_output(scripts.run("predict", clip, "--model_dir", path, "--assets_dir", tmp_path))
    assert seconds == pytest.approx(soundfile.info(clip).duration, abs=0.01)
    for name, probability in zip(info["class_names"], expected.tolist(), strict=True):
        assert shares[name] == pytest.approx(100 * probability, abs=0.06)


@pytest.mark.parametrize(("seconds", "n_windows"), [(0.001, 1), (1, 1), (4, 1), (4.1, 1), (4.3, 2), (6, 2), (9.9, 4)])
def test_long_recordings_are_the_mean_of_their_windows(seconds, n_windows, loaded, monkeypatch):
    monkeypatch.setattr(classifier, "VALUES_AT_ONCE", 3 * 128 * 173)
    samples = sound(seconds).astype(np.float32)
    starts = [min(2 * RATE * n, max(len(samples) - 4 * RATE, 0)) for n in range(n_windows)]
    expected = [loaded(samples[start : start + 4 * RATE], RATE).overall for start in starts]
    answer = loaded.classify([samples])
    np.testing.assert_allclose(answer.windows, expected, atol=1e-5)
    np.testing.assert_allclose(answer.starts, np.array(starts) / RATE)
    says = answer.windows.max(axis=1) * [np.sqrt((samples[s : s + 4 * RATE] ** 2).mean()) for s in starts]
    np.testing.assert_allclose(answer.overall, answer.windows[says.argmax()])
    assert answer.seconds == pytest.approx(seconds if n_windows > 1 or seconds <= 4 else 4, abs=1 / RATE)


def test_clip_that_the_model_has_trained_on_is_noted(miniature, run):
    for fold, note in ((1, "not trained on"), (2, "chosen its epoch"), (3, "trained on it")):
        clip = sorted((miniature / "audio" / f"fold{fold}").glob("*.wav"))[0]
        (value,) = as_json(run(clip, "--json"))
        assert note in "".join(value["notes"])


# --- What is imported and printed --------------------------------------------------------------------------------


def test_command_in_a_different_folder_on_a_terminal_of_ascii_imports_only_what_it_uses(assets, tmp_path):
    path = tmp_path / "señal – ü.wav"
    soundfile.write(path, sound(1), RATE)
    program = (
        "import sys, predict, utils\n"
        f"sys.argv = ['predict.py', {path.name!r}, '--model_dir', {str(assets / 'models')!r}]\n"
        "utils.run(predict.main)\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and done.stdout.startswith("se?al ? ?.wav (1.00 s)")
    modules = {name.split(".")[0] for name in done.stderr.split()}
    assert {"torch", "soundfile"} <= modules and modules & SLOW_TO_IMPORT == set()


def test_quiet_top_k_and_standard_input(recording, assets, run):
    _, best, shares = read_output(run(recording))
    assert run(recording, "--quiet").stdout == f"{best}\n"
    assert len(run(recording, "--top_k", 3).stdout.splitlines()) == 5
    script = f"{sys.executable} {REPOSITORY}/predict.py --json --assets_dir {assets}"
    command = f"{script} - <(cat {recording}) < {recording}"
    values = as_json(subprocess.run(["bash", "-c", command], capture_output=True, text=True))
    assert values[0]["file"] == "standard input" and values[1]["file"].startswith("/dev/fd/")
    for value in values:
        assert value["class"] == best
        assert value["probabilities"] == pytest.approx({name: share / 100 for name, share in shares.items()}, abs=6e-4)


# --- Recordings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("a.wav", 96_000, {"subtype": "PCM_24"}),
        ("a.mp3", 44_100, {}),
        ("a name without an ending", RATE, {"format": "WAV"}),
    ],
)
def test_formats(name, rate, options, run, tmp_path):
    soundfile.write(tmp_path / name, np.repeat(sound(1.5, rate)[:, None], 2, axis=1), rate, **options)
    seconds, _, shares = read_output(run(tmp_path / name))
    assert seconds == pytest.approx(1.5, abs=0.06) and len(shares) == 10


BAD_AUDIO = {
    "no such file": lambda path: None,
    "no recordings in": lambda path: path.mkdir(),
    "can't be decoded as audio": lambda path: path.write_text("siren\n" * 50),
    "holds no audio samples": lambda path: soundfile.write(path, [], RATE),
    "is silent": lambda path: soundfile.write(path, np.zeros(RATE), RATE),
    "NaN": lambda path: soundfile.write(path, [0.1, np.nan, 0.2], RATE, subtype="FLOAT"),
}


@pytest.mark.parametrize("reason", BAD_AUDIO)
def test_what_is_no_recording_is_named(reason, run, tmp_path):
    path = tmp_path / "bad.wav"
    BAD_AUDIO[reason](path)
    line = refusal(run(path))
    assert str(path) in line and reason in line


def test_folders_patterns_and_files(folder, run):
    (folder / "._b.wav").write_text("what macOS keeps beside a file")
    expected = [str(folder / name) for name in ("a.flac", "b.wav", "below/c.OGG")]
    for arguments in ([folder], [folder / "**" / "*.[wfO]*"], [folder, expected[1], folder / "*.wav"]):
        values = as_json(run(*arguments, "--json"))
        assert [value["file"] for value in values] == expected
    assert [value["windows"] for value in values] == [4, 1, 2]
    for value in values:
        assert value["class"] == next(iter(value["probabilities"])) and len(value["probabilities"]) == 10
        assert value["models"] == ["model_fold_0_best.safetensors"]
        assert value["timeline"][-1]["end"] == pytest.approx(value["seconds"], abs=0.01)
    assert "no file is called" in refusal(run(folder / "*.xyz"))


def test_one_bad_file_among_many_is_named_at_the_end(folder, run):
    (folder / "aa.wav").write_text("no sound")
    done = run(folder)
    assert done.returncode == 2 and done.stdout.count(".safetensors") == 3
    first, second = done.stderr.splitlines()
    assert first == "error: 1 of 4 recordings failed:"
    assert second.startswith(f"  {folder / 'aa.wav'} can't be decoded as audio")
    values = [json.loads(line) for line in run(folder, "--json").stdout.splitlines()]
    assert [value["file"] for value in values if "error" in value] == [str(folder / "aa.wav")]
    (value,) = map(json.loads, run("-", "--json").stdout.splitlines())  # nothing comes
    assert value["file"] == "standard input" and value["error"].startswith("standard input ")
    assert [bool(line) for line in run(folder, "--quiet").stdout.split("\n")] == [True, False, True, True, False]


def test_windows_by_flags(folder, run):
    flags = (folder / "a.flac", "--json")
    (value,) = as_json(run(*flags, "--window_seconds", 1, "--hop_seconds", 0.25))
    assert value["windows"] == 35
    line = refusal(run(*flags, "--window_seconds", 5))
    assert "--window_seconds 5 is over the model's clips of 4.0 s" in line
    assert "leaves gaps" in refusal(run(*flags, "--window_seconds", 1, "--hop_seconds", 2))


def test_silence_within_a_recording_is_reported(run, tmp_path):
    samples = np.concatenate([sound(4), np.zeros(10 * RATE), sound(4)])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    (value,) = as_json(run(tmp_path / "a.wav", "--json"))
    (silent,) = (part for part in value["timeline"] if part["class"] == "silence")
    assert (silent["start"], silent["end"]) == (6, 12)


# --- Models ------------------------------------------------------------------------------------------------------


def test_model_file_alone_is_enough(assets, recording, run, scripts, tmp_path):
    expected = run(recording).stdout
    copy = tmp_path / "empty" / "model_fold_0_best.safetensors"
    copy.parent.mkdir()
    shutil.copy(model_file.model_path(assets / "models", 0), copy)
    for flags in (("--model_dir", copy.parent), ("--model_dir", copy, "--fold_num", 7)):
        done = scripts.run("predict", recording, "--assets_dir", tmp_path / "nothing", *flags)
        assert done.stdout == expected, done.stderr


def test_model_that_is_missing_or_damaged_is_named(assets, recording, run, tmp_path):
    for number in (3, -1, 99):
        line = refusal(run(recording, "--fold_num", number))
        assert f"no model of fold {number} in {assets / 'models'}: --fold_num is one of 0" in line
    assert f"no model of fold 0 in {tmp_path}" in refusal(run(recording, "--model_dir", tmp_path, "--fold_num", "all"))
    path = model_file.model_path(tmp_path, 0)
    path.write_bytes(model_file.model_path(assets / "models", 0).read_bytes()[:-100])
    assert f"{path} is not a readable safetensors file" in refusal(run(recording, "--model_dir", tmp_path))
    done = run(recording, "--fold_num", "first")
    assert done.returncode == 2 and "--fold_num" in done.stderr.splitlines()[-1]


def test_model_whose_numbers_overflow_is_named(recording, loaded, run, tmp_path):
    network, info = loaded.networks[0], loaded.info
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["logits.weight"].fill_(3e38)
    model_file.save_model(tmp_path / "wild.safetensors", state, info)
    line = refusal(run(recording, "--model_dir", tmp_path / "wild.safetensors"))
    assert f"{recording}: the model gives no probabilities for it" in line


def test_class_names_are_checked_against_a_data_set(assets, recording, run, tmp_path):
    assert run(recording, "--processed_dir", assets / "data").stdout == run(recording).stdout
    names = utils.load_pickle(assets / "data" / "class_mapping.pkl")
    for wrong in ({**names, 3: names[8], 8: names[3]}, {**names, 3: np.zeros(2)}, np.zeros(3)):
        utils.save_pickle(tmp_path / "class_mapping.pkl", wrong)
        line = refusal(run(recording, "--processed_dir", tmp_path))
        assert f"{tmp_path} has the classes {utils.one_line(wrong)}, and the model was trained on {names}" in line


def test_all_folds_answer_with_their_mean(loaded, recording, run, tmp_path):
    single = []
    for fold in (0, 4):
        write_model(tmp_path, fold)
        single += as_json(run(recording, "--json", "--model_dir", tmp_path, "--fold_num", fold))
    (mean,) = as_json(run(recording, "--json", "--model_dir", tmp_path, "--fold_num", "all"))
    assert mean["models"] == [model_file.model_path(tmp_path, fold).name for fold in (0, 4)]
    for name, share in mean["probabilities"].items():
        expected = np.mean([value["probabilities"][name] for value in single])
        assert share == pytest.approx(expected, abs=1e-4)
    text = run(recording, "--model_dir", tmp_path, "--fold_num", "all").stdout
    assert text.splitlines()[0].endswith(", mean of 2 models")
    names = loaded.info["class_names"]
    write_model(tmp_path, 5, class_names=[*names[1:], names[0]])
    line = refusal(run(recording, "--model_dir", tmp_path, "--fold_num", "all"))
    assert "differ in class_names" in line and "model_fold_5_best.safetensors" in line
    write_model(tmp_path, 5, settings={"learning_rate": 1})  # of a different run
    assert "differ in settings" in refusal(run(recording, "--model_dir", tmp_path, "--fold_num", "all"))


# --- Files to write ----------------------------------------------------------------------------------------------


def test_timeline_files(folder, run, tmp_path):
    done = run(folder / "a.flac", folder / "b.wav", "--csv", tmp_path / "t.csv", "--labels", tmp_path / "labels")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {str(folder / "a.flac"), str(folder / "b.wav")}
    labels = sorted((tmp_path / "labels").iterdir())
    assert [path.name.endswith(("_a.flac.txt", "_b.wav.txt")) for path in labels] == [True, True]
    assert sum(len(path.read_text().splitlines()) for path in labels) == len(rows)
    alone = run(folder / "a.flac", "--labels", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == labels[0].read_text()
    assert "timeline:" in alone.stdout and "(of 4 windows)" in alone.stdout


def test_file_that_can_not_be_written_costs_no_other(folder, run, tmp_path):
    names = [f"{name}.txt" for name in predict.file_names([folder / "a.flac", folder / "b.wav"])]
    (tmp_path / "labels" / names[0]).mkdir(parents=True)
    flags = ("--csv", tmp_path / "t.csv", "--labels", tmp_path / "labels", "--quiet")
    done = run(folder / "a.flac", folder / "b.wav", *flags)
    assert done.returncode == 2 and done.stderr.splitlines()[0] == "error: 1 of 2 recordings failed:"
    assert f"{names[0]}: Is a directory" in done.stderr and len(done.stdout.splitlines()) == 2
    assert (tmp_path / "labels" / names[1]).is_file()
    with open(tmp_path / "t.csv", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {str(folder / "a.flac"), str(folder / "b.wav")}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--labels", "a.txt", "--csv", "below/../a.txt"], "another file of this command"),
        (["--labels", "a.txt", "--plot", "link.txt"], "another file of this command"),
        (["--csv", "recording"], "is a recording, the model"),
        (["--csv", "model.safetensors"], "is a recording, the model"),
        (["recording.wav", "--labels", "taken.txt"], "is a file, and 2 recordings need a folder"),
    ],
)
def test_output_over_another_file_of_the_command_is_refused_first(flags, reason, assets, recording, scripts, tmp_path):
    shutil.copyfile(recording, tmp_path / "recording")
    shutil.copyfile(model_file.model_path(assets / "models", 0), tmp_path / "model.safetensors")
    (tmp_path / "below").mkdir()
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "taken.txt").touch()
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    done = scripts.run("predict", "recording", *flags, "--model_dir", "model.safetensors", cwd=tmp_path)
    assert reason in refusal(done)
    assert {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_device_takes_several_files(recording, run):
    assert run(recording, "--labels", "/dev/null", "--csv", "/dev/null").returncode == 0


def test_pipe_without_end_is_cut_and_named(monkeypatch):
    monkeypatch.setattr(predict, "MAX_PIPE", 5e6)
    with open("/dev/zero") as zero, pytest.raises(UserError, match=r"^/dev/fd/\d+ is over 0.005 GB: cut it"):
        predict.opened(f"/dev/fd/{zero.fileno()}").__enter__()


def test_folder_of_files_for_one_recording(recording, run, tmp_path):
    from matplotlib.image import imread

    there, new = tmp_path / "there", tmp_path / "new"
    there.mkdir()
    done = run(recording, "--plot", f"{new}/", "--explain", f"{new}/", "--csv", there, "--labels", there)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name.rpartition("recording.wav")[2] for path in new.iterdir()) == [".png", ".why.png"]
    assert sorted(path.name.rpartition("recording.wav")[2] for path in there.iterdir()) == [".txt", "timelines.csv"]
    for path in new.iterdir():
        image = imread(path)
        assert image.shape[0] > 900 and image.shape[1] > 1500 and len(np.unique(image[..., :3])) > 100


@pytest.mark.parametrize("flag", ["--csv", "--labels", "--plot", "--explain"])
def test_recording_that_a_shell_puts_behind_a_flag_is_not_overwritten(flag, recording, run, tmp_path):
    first = shutil.copyfile(recording, tmp_path / "a.WAV")
    done = run(flag, first, recording)  # --csv *.wav
    assert done.returncode == 2 and f"{flag} {first} is the name of a recording" in done.stderr
    assert first.read_bytes() == recording.read_bytes()


def test_empty_name_is_not_the_current_folder(run):
    assert "a recording's name is empty" in refusal(run(""))


def test_name_of_a_model_is_printed_without_its_escapes(assets, recording, run, tmp_path):
    path = shutil.copyfile(model_file.model_path(assets / "models", 0), tmp_path / "a\x1b[31m.safetensors")
    done = run(recording, "--model_dir", path)
    assert done.returncode == 0 and "a?[31m.safetensors" in done.stdout and "\x1b" not in done.stdout


def test_output_in_the_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert utils.output_path("~/t.csv", "a.csv") == tmp_path / "t.csv"
    assert utils.output_path("~/new/", "a.png") == tmp_path / "new" / "a.png"


def test_names_of_classes_are_no_formulas(tmp_path):
    answers.save_csv(tmp_path / "t.csv", {"=a.wav": [(0.0, 1.0, "=1+1", 0.5)]})
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == "./=a.wav,0.0,1.0,'=1+1,0.5"


@pytest.mark.parametrize("name", ["a" * 300 + ".wav", "/dev/fd/99"])
def test_path_that_can_not_be_opened_does_not_stop_the_batch(name, recording, run):
    done = run(name, recording, "--quiet")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2
    assert "1 of 2 recordings failed" in done.stderr and "Make room" not in done.stderr


def test_file_names_never_collide_and_are_short():
    names = ["a b.wav", "a_b.wav", "a/b.wav", "x" * 400 + "1.wav", "y" + "x" * 399 + "1.wav", "ü" * 300, "-"]
    found = predict.file_names(names)
    assert found[:3] == ["a_b.wav", "a_b.wav_2", "a_b.wav_3"]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) <= predict.MAX_NAME + 2 and "/" not in name for name in found)
