"""benchmarks/speed.py compares like with like. Its times are not asserted."""

import pytest
import torch

from benchmarks import speed


def test_plain_network_gives_the_logits_of_ours():
    plain = speed.PlainCNN(10, speed.AUDIO.n_mels, 0.1, 0.5)
    ours = speed.AudioCNN(10, speed.AUDIO.n_mels, 0.1, 0.5)
    ours.load_state_dict(plain.state_dict())
    features, _ = speed.random_examples(4)
    assert torch.allclose(plain.eval()(features), ours.eval()(features), atol=1e-5)
    assert [type(layer).__name__ for layer in plain.block1] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]


def test_librosas_clip_equals_ours(tmp_path):
    clip = speed.write_clip(tmp_path)
    assert abs(speed.our_clip(clip) - speed.librosa_clip(clip)).max() < 0.1  # dB; float16


@pytest.mark.parametrize("measure", [speed.training_step, speed.epoch])
def test_rows_have_both_times_and_their_ratio(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(speed.config, "BATCH_SIZE", 4)
    for name, value in (("TURNS", 1), ("STEPS", 1), ("EPOCH_CLIPS", 32)):
        monkeypatch.setattr(speed, name, value)
    for line in measure(tmp_path):
        cells = line.strip("| ").split(" | ")
        ours, theirs = (float(cell.removesuffix(" ms")) for cell in cells[2:4])
        ratio = ours / theirs if "≤" in line else theirs / ours
        assert float(cells[4].strip("| ")) == pytest.approx(ratio, rel=0.05)
