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


def test_clip_is_the_same_by_both_front_ends(tmp_path):
    clip = speed.write_clip(tmp_path)
    ours, theirs = speed.our_clip(clip), speed.librosa_clip(clip)
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() < 0.1  # dB; float16


def test_stage_prints_its_rows(monkeypatch, capsys):
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(speed, "CLIPS_PER_TURN", 16)
    monkeypatch.setattr("sys.argv", ["speed.py", "--stage", "preprocess"])
    speed.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " ms |" in line]
    assert [row[1] for row in rows] == ["librosa, one process"] * 2 + ["torchaudio's MelSpectrogram, one process"]
    for row in rows:
        ours, theirs = (float(cell.split()[0]) for cell in row[2:4])
        assert float(row[4]) == pytest.approx(theirs / ours, rel=0.05)
