"""benchmarks/speed.py compares like with like. Its times are not asserted."""

import json

import pytest
import torch

import data_loader
from benchmarks import speed
from utils import UserError


def test_plain_network_gives_the_logits_of_ours():
    plain = speed.PlainCNN(10, speed.AUDIO.n_mels, 0.1, 0.5)
    ours = speed.AudioCNN(10, speed.AUDIO.n_mels, 0.1, 0.5)
    ours.load_state_dict(plain.state_dict())
    features, _ = speed.random_examples(4)
    assert torch.allclose(plain.eval()(features), ours.eval()(features), atol=1e-5)
    assert [type(layer).__name__ for layer in plain.block1] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]


def test_data_set_at_scale_is_one_that_preprocessing_reads(tmp_path):
    speed.write_data_set(tmp_path, 25)
    clips = data_loader.read_clip_table(tmp_path / "metadata" / "UrbanSound8K.csv")
    assert len(clips) == 25 and clips["fold"].nunique() == 10
    names = {f"fold{fold}/{name}" for name, fold in zip(clips["slice_file_name"], clips["fold"], strict=True)}
    assert names == {f"{path.parent.name}/{path.name}" for path in tmp_path.glob("audio/*/*.wav")}


def test_stage_as_json_has_its_rows(run_script, tmp_path):
    clip = speed.write_clip(tmp_path)
    features = [function(clip) for function in (speed.our_clip, speed.librosa_clip, speed.torchaudio_clip)]
    assert len({array.shape for array in features}) == 1
    assert abs(features[0] - features[1]).max() < 0.1  # dB; float16
    done = run_script("benchmarks/speed.py", "--stage", "preprocess", "--clips", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["stage"] for row in rows] == ["preprocess"] * 3
    assert all(row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and row["ours"] > 0 for row in rows)
    assert speed.format_row(rows[0]).count("|") == 7


def test_folder_without_clips_is_named(tmp_path):
    with pytest.raises(UserError, match="--clips"):
        next(speed.benchmark_preprocess(tmp_path, tmp_path))
