"""play_and_predict_random.py through its command line, with untrained models of two of the miniature's three folds."""

import collections
import csv
import re
import sys

import alsa
import numpy as np
import pytest
from test_sound_device import NO_PORTAUDIO, refusal, run_python
from untrained import write_model

import audio_reader
import predict
from model import load_model, model_path

Shown = collections.namedtuple("Shown", "name fold model shares truth right")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models of folds 0 and 2; fold 1 has none."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, 0, training_folds=[2])
    write_model(folder, 2, training_folds=[1])
    return folder


@pytest.fixture(scope="module")
def table(miniature):
    """{clip's file name: its row of the metadata}."""
    with open(miniature / "metadata" / "UrbanSound8K.csv", newline="") as file:
        return {row["slice_file_name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def show(miniature, models, scripts):
    """A function that runs the script without sound on the miniature."""

    def run(*flags, model_dir=models):
        folders = ("--data_dir", miniature, "--model_dir", model_dir)
        return scripts.run("play_and_predict_random", *folders, "--no_play", *flags)

    return run


def read(done):
    """Return a Shown for each clip in the output."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    clip = r"^(\S+\.wav) \(\d+\.\d\d s\) of fold (\d), (\S+)\n((?:  \w+ .*\n){10})truth: (\w+), (right|not \w+)$"
    shown = []
    for name, fold, model, bars, truth, verdict in re.findall(clip, done.stdout, re.M):
        shares = {name: float(share) for name, share in re.findall(r"  (\w+) +(\d+\.\d)%", bars)}
        assert verdict == ("right" if next(iter(shares)) == truth else f"not {next(iter(shares))}")
        shown.append(Shown(name, int(fold), model, shares, truth, verdict == "right"))
    assert len(shown) == done.stdout.count("truth: ")
    return shown


def test_each_clip_goes_to_the_model_of_its_fold(show, table, miniature, models):
    done = show("--count", 8, "--seed", 0)
    shown = read(done)
    assert len({clip.name for clip in shown}) == 8
    assert {clip.fold for clip in shown} == {0, 2}
    for clip in shown:
        row = table[clip.name]
        assert (clip.truth, clip.fold) == (row["class"], int(row["fold"]) - 1)
        assert clip.model == f"model_fold_{clip.fold}_best.safetensors"
        network, info = load_model(model_path(models, clip.fold))
        samples = audio_reader.read_audio(miniature / "audio" / f"fold{row['fold']}" / clip.name, 22_050)
        expected = dict(zip(info["class_names"], predict.predict(network, info, samples), strict=True))
        assert clip.shares == pytest.approx({name: 100 * share for name, share in expected.items()}, abs=0.06)
    assert done.stdout.startswith("without clips of fold 1, whose model is missing (python train.py --folds 1)\n")


def test_running_score(show):
    done = show("--count", 40)
    shown = read(done)
    scores = re.findall(r"^score: (\d+) of (\d+) right \((\d+)%\)$", done.stdout, re.M)
    right = np.cumsum([clip.right for clip in shown])
    assert scores == [(str(n), str(m), f"{n / m:.0%}".rstrip("%")) for m, n in enumerate(right.tolist(), start=1)]
    assert 0 < right[-1] < 40  # else this test says little
    assert "score" not in show("--seed", 1).stdout


def test_choice_of_class_and_fold(show, table):
    shown = read(show("--class_name", "siren", "--count", 100))
    sirens = {name for name, row in table.items() if row["class"] == "siren" and row["fold"] in "13"}
    assert sorted(clip.name for clip in shown) == sorted(sirens)
    done = show("--fold", 2, "--count", 100)
    assert sorted(clip.name for clip in read(done)) == sorted(name for name, row in table.items() if row["fold"] == "3")
    assert done.stdout.startswith("there are 20 such clips, not 100\n")
    (clip,) = read(show("--fold", 0, "--class_name", "dog_bark"))
    assert (clip.fold, clip.truth) == (0, "dog_bark")


def test_seed_gives_the_same_clips_again(show):
    outputs = [show("--count", 3, "--seed", seed).stdout for seed in (5, 5, 6)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_refusals_name_the_remedy(show, models, tmp_path):
    line = refusal(show("--fold", 1))
    assert f"{models} lacks the model of fold 1, the only one that has not trained on those clips" in line
    assert "python train.py --folds 1," in line
    assert "python train.py --folds 0,1,2," in refusal(show(model_dir=tmp_path))
    line = refusal(show("--class_name", "dog"))
    assert "no class 'dog' in the data set: --class_name is one of air_conditioner, " in line
    assert "no fold 7 in the data set: --fold is one of 0, 1, 2" in refusal(show("--fold", 7))
    assert "run python download_data.py" in refusal(show("--data_dir", tmp_path))
    for flags in (("--fold", 10), ("--fold", "0,2"), ("--count", 0)):
        done = show(*flags)
        assert done.returncode == 2
        assert flags[0] in done.stderr.splitlines()[-1]


def test_model_that_knows_the_clips_is_refused(show, tmp_path):
    path = write_model(tmp_path, 0, training_folds=[1, 2])
    assert f"{path} has trained on clips of fold 0" in refusal(show("--fold", 0, model_dir=tmp_path))
    write_model(tmp_path, 0, training_folds=None)
    assert f"{path} does not say which folds it was trained on" in refusal(show("--fold", 0, model_dir=tmp_path))
    write_model(tmp_path, 0, training_folds=[2], settings={"validation": "test_fold"})
    assert "(optimistic: its epoch was chosen on this fold)" in show("--fold", 0, model_dir=tmp_path).stdout


# --- Sound -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PortAudio is in the package")
def test_without_sound_it_goes_on(miniature, models):
    flags = ["--data_dir", str(miniature), "--model_dir", str(models), "--count", "3", "--fold", "0"]
    program = (
        f"import sys, play_and_predict_random as script, utils; sys.argv = ['x', *{flags}]; utils.run(script.main)"
    )
    done = run_python(f"{NO_PORTAUDIO}; {program}")
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("not played: "))
    assert "sudo apt install libportaudio2" in told
    done.stdout = done.stdout.replace(told + "\n", "")
    assert len(read(done)) == 3


def test_the_clip_is_played(miniature, models, run_script, tmp_path):
    env = alsa.sound_card(tmp_path)
    flags = ("--data_dir", miniature, "--model_dir", models, "--fold", 0, "--class_name", "siren", "--seed", 0)
    done = run_script("play_and_predict_random.py", *flags, env=env)
    (clip,) = read(done)
    samples = audio_reader.read_audio(miniature / "audio" / "fold1" / clip.name, alsa.RATE)
    played = alsa.played(tmp_path)
    assert len(samples) < len(played)
    start = np.correlate(played, samples, "valid").argmax()
    likeness = np.corrcoef(played[start : start + len(samples)], samples)[0, 1]
    assert likeness > 0.95  # it was resampled to the models' 22,050 Hz and back
