"""play_and_predict_random.py through its command line, with untrained models of two of the miniature's three folds."""

import collections
import re

import numpy as np
import pandas as pd
import pytest
from test_sound import CARD_RATE, NO_PORTAUDIO, ON_LINUX, played, refusal, run_python, sound_card
from untrained import write_model

from audio import read_audio
from classifier import load
from model_file import model_path

Shown = collections.namedtuple("Shown", "name fold model shares truth")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models of folds 0 and 2; fold 1 has none."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, 0, training_folds=[2])
    write_model(folder, 2, training_folds=[1])
    return folder


@pytest.fixture(scope="module")
def show(miniature, models, scripts):
    """A function that runs the script on the miniature."""

    def run(*flags, model_dir=models, **options):
        folders = ("--data_dir", miniature, "--model_dir", model_dir)
        return scripts.run("play_and_predict_random", *folders, *flags, **options)

    return run


def read(done):
    """Return a Shown for each clip in the output."""
    assert (done.returncode, done.stderr) == (0, "")
    clip = r"^(\S+\.wav) \(\d+\.\d\d s\) of fold (\d), (\S+)\n((?:  \w+ .*\n){10})truth: (\w+), (right|not \w+)$"
    shown = []
    for name, fold, model, bars, truth, verdict in re.findall(clip, done.stdout, re.M):
        shares = {name: float(share) for name, share in re.findall(r"  (\w+) +(\d+\.\d)%", bars)}
        assert verdict == ("right" if next(iter(shares)) == truth else f"not {next(iter(shares))}")
        shown.append(Shown(name, int(fold), model, shares, truth))
    assert len(shown) == done.stdout.count("truth: ")
    return shown


def test_each_clip_goes_to_the_model_of_its_fold(show, miniature, models):
    done = show("--no_play", "--count", 100, "--class_name", "siren")
    table = pd.read_csv(miniature / "metadata" / "UrbanSound8K.csv", index_col="slice_file_name")
    shown = read(done)
    assert {clip.name for clip in shown} == set(table[(table["class"] == "siren") & (table["fold"] != 2)].index)
    for clip in shown:
        assert (clip.truth, clip.fold + 1) == (table.loc[clip.name, "class"], table.loc[clip.name, "fold"])
        assert clip.model == f"model_fold_{clip.fold}_best.safetensors"
        classifier = load(model_path(models, clip.fold))
        samples = read_audio(miniature / "audio" / f"fold{clip.fold + 1}" / clip.name, 22_050)
        answer = classifier(samples, 22_050)
        expected = {name: 100 * share for name, share in answer.probabilities.items()}
        assert clip.shares == pytest.approx(expected, abs=0.06)
    first, second = done.stdout.splitlines()[:2]
    assert first == "without clips of fold 1, whose model is missing (python train.py --folds 1)"
    assert second == f"there are {len(shown)} such clips, not 100"
    n_right = sum(next(iter(clip.shares)) == clip.truth for clip in shown)
    assert f"score: {n_right} of {len(shown)} right" in done.stdout


def test_seed_gives_the_same_clips_again(show):
    outputs = [show("--no_play", "--count", 3, "--seed", seed).stdout for seed in (5, 5, 6)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (("--fold", 1), ["lacks the model of fold 1: python train.py --folds 1 makes it"]),
        (("--fold", 7), ["no --fold 7 in the data set: it must be one of 0, 1, 2"]),
        (("--class_name", "dog"), ["no --class_name dog in the data set: it must be one of air_conditioner, "]),
        (("--data_dir", "nowhere"), ["run python download_data.py"]),
    ],
)
def test_what_can_not_be_shown_is_refused_with_the_remedy(show, flags, reasons):
    line = refusal(show(*flags))
    assert all(reason in line for reason in reasons)


def test_model_that_has_trained_on_the_clips_is_refused(show, tmp_path):
    path = write_model(tmp_path, 0, training_folds=[1, 2])
    assert f"{path} has trained on clips of fold 0" in refusal(show("--fold", 0, model_dir=tmp_path))
    write_model(tmp_path, 0, training_folds=None)
    assert f"{path} does not say which folds" in refusal(show("--fold", 0, model_dir=tmp_path))
    write_model(tmp_path, 0, training_folds=[2], settings={"validation": "test_fold"})
    done = show("--no_play", "--fold", 0, model_dir=tmp_path)
    assert "(optimistic: its epoch was chosen on this fold)" in done.stdout


def test_score_over_models_of_two_runs_is_refused(show, tmp_path):
    write_model(tmp_path, 0, training_folds=[2], settings={"seed": 0})
    write_model(tmp_path, 2, training_folds=[1], settings={"seed": 1})
    done = show("--no_play", "--count", 100, model_dir=tmp_path)
    assert done.returncode == 2 and "differ in settings, so they are not of one run" in done.stderr
    assert "score" not in done.stdout


@ON_LINUX
def test_without_sound_it_predicts_all_the_same(miniature, models):
    flags = ["--data_dir", str(miniature), "--model_dir", str(models), "--count", "3", "--fold", "0"]
    use = f"import sys, play_and_predict_random as script, utils; sys.argv = ['x', *{flags}]; utils.run(script.main)"
    done = run_python(f"{NO_PORTAUDIO}; {use}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("not played: ")]
    assert len(lines) == 3 and "apt install libportaudio2" in lines[0]
    done.stdout = done.stdout.replace(lines[0] + "\n", "")
    assert len(read(done)) == 3


def test_the_clip_is_played(show, miniature, tmp_path):
    (clip,) = read(show("--fold", 0, "--class_name", "siren", "--seed", 0, env=sound_card(tmp_path)))
    samples = read_audio(miniature / "audio" / "fold1" / clip.name, CARD_RATE)  # (n,)
    heard = played(tmp_path)
    assert len(samples) < len(heard)
    start = np.correlate(heard, samples, "valid").argmax()
    similarity = np.corrcoef(heard[start : start + len(samples)], samples)[0, 1]
    assert similarity > 0.95  # it was resampled to the models' 22,050 Hz and back
