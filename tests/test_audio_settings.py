"""Audio settings that can't be are refused by name, one by one and together."""

import dataclasses

import pytest

from audio_settings import AudioSettings
from utils import UserError

AUDIO = AudioSettings()


@pytest.mark.parametrize(
    "name, value",
    [
        *(("sample_rate", value) for value in (0, -1, 22_050.5, "22050", None, float("nan"), 10**9)),
        *(("clip_seconds", value) for value in (0, -4.0, float("inf"), float("nan"), "4", 1e9)),
        *(("n_fft", value) for value in (0, 1, 2047, 2048.0, 2**31)),
        *(("hop_length", value) for value in (0, -512, 2**31)),
        *(("n_mels", value) for value in (0, 2**31, [128])),
        *(("top_db", value) for value in (-1, float("nan"), None)),
        *(("short_clips", value) for value in ("silent", "", None, 1)),
        *(("feature_dtype", value) for value in ("float8", "object", None)),
        *(("f_min", value) for value in (-1, 11_025.0, float("nan"))),
        *(("f_max", value) for value in (0, 1e9)),
    ],
)
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(UserError, match=rf"audio setting.* {name} is"):
        dataclasses.replace(AUDIO, **{name: value})


def test_settings_that_make_sense_one_by_one_and_not_together():
    with pytest.raises(UserError, match="frames of 32768 samples"):
        AudioSettings(sample_rate=768_000, clip_seconds=600, n_fft=32_768, hop_length=2)
    with pytest.raises(UserError, match="frames of 32768 samples"):
        AudioSettings(sample_rate=768_000, clip_seconds=30, fine_n_fft=32_768, fine_frames=64, hop_length=512)
    with pytest.raises(UserError, match="hop_length is 512: it must be a multiple of fine_frames, 3"):
        AudioSettings(fine_frames=3)
    with pytest.raises(UserError, match="fine_n_fft is 511: it must be even"):
        AudioSettings(fine_n_fft=511)
