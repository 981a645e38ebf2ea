import json
import re

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

import data_loader
import measure_unknown
import model
from audio_settings import AudioSettings

AUDIO = AudioSettings()


@pytest.mark.parametrize("decimals", [1, 8])  # with ties and without
def test_auroc_equals_scikit_learns(decimals):
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(1, 1, 80).round(decimals), rng.normal(0, 1, 50).round(decimals)
    expected = reference.roc_auc_score(np.repeat([1, 0], [80, 50]), np.concatenate([known, unknown]))
    assert measure_unknown.auroc(known, unknown) == pytest.approx(expected)


def test_rows_compare_unknown_with_known():
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    validation = torch.linspace(4, 10, 100)[:, None] * torch.tensor([1.0, 0.0])
    known = torch.cat([sure] * 9 + [unsure])
    row = measure_unknown.compare("cats", 0, torch.cat([unsure, unsure, unsure, sure]), known, validation)
    assert row["clips"] == 4
    for name in measure_unknown.SCORES:
        assert row[name]["warned"] == 0.75 and row[name]["known_warned"] == pytest.approx(0.1)
        assert row[name]["auroc"] == pytest.approx((3 * (9 + 0.5) + 0.5 * 9) / 40)


def test_made_sounds_are_of_the_level_and_spectrum_they_should_be():
    rng = np.random.default_rng(0)
    for slope, expected in ((0, 0), (0.5, -1)):  # pink: power falls as 1 / frequency
        samples = measure_unknown.coloured_noise(rng, AUDIO, slope)
        assert samples.shape == (AUDIO.clip_samples,) and np.abs(samples).max() == pytest.approx(1)
        power = np.abs(np.fft.rfft(samples)) ** 2
        frequencies = np.arange(100, len(power))
        found = np.polyfit(np.log(frequencies), np.log(power[100:]), 1)[0]
        assert found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_sound_like_speech_has_a_voice_and_pauses(seed):
    samples = measure_unknown.speech_like(np.random.default_rng(seed), AUDIO)
    assert samples.shape == (AUDIO.clip_samples,) and np.abs(samples).max() == pytest.approx(1)
    power = np.abs(np.fft.rfft(samples)) ** 2
    frequencies = np.fft.rfftfreq(len(samples), 1 / AUDIO.sample_rate)
    assert power[frequencies < 5000].sum() > 0.9 * power.sum()
    loudness = np.abs(samples[: len(samples) // 100 * 100]).reshape(100, -1).max(axis=1)  # 40 ms each
    assert (loudness < 0.1).sum() >= 5 and (loudness > 0.3).sum() >= 10


def test_made_sounds_are_features_and_the_same_each_time():
    sounds = measure_unknown.made_sounds(AUDIO, seed=0, count=3)
    again = measure_unknown.made_sounds(AUDIO, seed=0, count=3)
    for kind, features in sounds.items():
        assert features.shape == (3, *AUDIO.shape) and np.isfinite(features).all()
        assert np.array_equal(features, again[kind]) and not np.array_equal(features[0], features[1])
    assert sounds["near silence"].max() < sounds["white noise"].max(axis=(1, 2)).min()


def test_data_without_a_class(random_data, tmp_path):
    random_data(tmp_path)
    data = data_loader.load_processed(tmp_path)
    known = measure_unknown.without_class(data, 0)
    assert known.class_names == {1: "siren"} and set(known.labels) == {1}
    assert [clip["classID"] for clip in known.clips] == [1] * 12
    assert np.array_equal(known.features, data.features[data.labels == 1])
    assert np.array_equal(known.folds, data.folds[data.labels == 1])
    assert known.info["fingerprint"] != data.info["fingerprint"]
    assert measure_unknown.without_class(data, None) is data


def test_command_line_measures_and_goes_on(random_data, run_script, scripts, tmp_path):
    random_data(tmp_path / "data")
    flags = ("--epochs", 1, "--classes", "siren", "--sounds", 4, "--assets_dir", tmp_path)
    hub = {"HF_MODEL_REPO_ID": "me/model", "WANDB_PROJECT": "sounds"}  # both must be left alone
    done = run_script("measure_unknown.py", *flags, env=hub)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and not (tmp_path / "wandb").exists()
    rows = json.loads((tmp_path / "unknown" / "unknown.json").read_text())
    assert [row["what"] for row in rows] == ["siren", *measure_unknown.made_sounds(AUDIO, 0, count=1)]
    assert [row["clips"] for row in rows] == [12, 4, 4, 4, 4]
    assert all(0 <= row[name]["auroc"] <= 1 for row in rows for name in measure_unknown.SCORES)
    network, info = model.load_model(model.model_path(tmp_path / "unknown" / "without_1" / "models", 0))
    data = data_loader.load_processed(tmp_path / "data")
    known, validation, unknown = (  # in batches of their own: rounding counts where clips are so alike
        measure_unknown.logits_of(network, info, data.features[clips]).logsumexp(dim=1).numpy()
        for clips in ((data.folds == 1) & (data.labels == 0), (data.folds == 2) & (data.labels == 0), data.labels == 1)
    )
    below = np.quantile(validation, 0.05)
    assert info["unknown_threshold"] == pytest.approx(below, abs=1e-3)
    expected = reference.roc_auc_score(np.repeat([1, 0], [4, 12]), np.concatenate([known, unknown]))
    assert rows[0]["energy"]["auroc"] == pytest.approx(expected)
    assert rows[0]["energy"]["warned"] == pytest.approx((unknown < below).mean())
    assert rows[0]["energy"]["known_warned"] == pytest.approx((known < below).mean())
    table = [line for line in done.stdout.splitlines() if re.match(r"\| (siren|mean of|white|near|like speech)", line)]
    assert len(table) == 5
    again = scripts.run("measure_unknown", *flags)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/1" not in again.stdout and again.stdout.count("done already") == 2
    assert all(line in again.stdout for line in table)
    assert not (tmp_path / "results").exists() and not (tmp_path / "models").exists()


def test_unknown_class_names_are_named(random_data, scripts, tmp_path):
    random_data(tmp_path / "data")
    done = scripts.run("measure_unknown", "--classes", "siren,cat", "--assets_dir", tmp_path)
    assert done.returncode == 2 and "--classes cat: the classes are dog_bark, siren" in done.stderr
