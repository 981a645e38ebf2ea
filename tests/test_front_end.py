"""Front-end: librosa's numbers, the rows of the features, whatever the number of threads."""

import dataclasses
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import REPOSITORY

import front_end
from audio_settings import AudioSettings

AUDIO = AudioSettings()
RATE = AUDIO.sample_rate
OTHER_SETTINGS = [
    AUDIO,
    AudioSettings(16_000, 1.0, 512, 160, 40, 2, 256, 20, 50.0, 7000.0, 60.0),
    AudioSettings(44_100, 2.5, 1024, 441, 64, 3, 512, 32, 20.0, 16_000.0, 100.0),
    AudioSettings(8_000, 0.5, 330, 100, 13, 1, 90, 7, 0.0, 4000.0, 80.0),  # no power of two
]


def sounds(n, rate):
    """{name: samples (n,) float32} of unlike kinds."""
    rng = np.random.default_rng(0)
    time = np.arange(n) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    return {
        name: samples.astype(np.float32)
        for name, samples in {
            "noise": rng.uniform(-1, 1, n),
            "tone": tone,
            "sweep": np.sin(2 * np.pi * (50 + 1000 * time) * time),
            "faint": 1e-4 * tone,
            "click": np.eye(1, n, n // 3)[0],
            "silence": np.zeros(n),
            "DC": np.full(n, 0.7),
            "clipped": np.clip(5 * tone, -1, 1),
            "sound, then silence": tone * (time < 0.1),
        }.items()
    }


@pytest.mark.parametrize("audio", OTHER_SETTINGS)
def test_mel_filters_are_librosas(audio):
    import librosa

    expected = librosa.filters.mel(
        sr=audio.sample_rate, n_fft=audio.n_fft, n_mels=audio.n_mels, fmin=audio.f_min, fmax=audio.f_max
    )
    filters = front_end.mel_filters(audio)
    assert filters.shape == (1 + audio.n_fft // 2, audio.n_mels)
    np.testing.assert_allclose(filters, expected.T, rtol=1e-5, atol=1e-9)


def test_mel_scale_is_librosas_and_its_inverse():
    import librosa

    frequencies = np.concatenate([np.linspace(0, 1100, 23), np.geomspace(1000, 40_000, 20)])
    np.testing.assert_allclose(front_end.hz_to_mel(frequencies), librosa.hz_to_mel(frequencies), rtol=1e-12)
    np.testing.assert_allclose(front_end.mel_to_hz(front_end.hz_to_mel(frequencies)), frequencies, rtol=1e-12)


@pytest.mark.parametrize("audio", OTHER_SETTINGS)
def test_log_mel_is_librosas_to_a_hundredth_of_a_decibel(audio):
    import librosa

    for n in (audio.clip_samples, audio.clip_samples // 7, audio.hop_length, 1):
        for name, samples in sounds(n, audio.sample_rate).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # librosa warns of clips shorter than a frame
                power = librosa.feature.melspectrogram(
                    y=samples,
                    sr=audio.sample_rate,
                    n_fft=audio.n_fft,
                    hop_length=audio.hop_length,
                    n_mels=audio.n_mels,
                    fmin=audio.f_min,
                    fmax=audio.f_max,
                    pad_mode="constant",
                )
            expected = librosa.power_to_db(power, top_db=audio.top_db)
            decibels = front_end.log_mel(samples, audio)
            assert decibels.shape == expected.shape == (audio.n_mels, 1 + n // audio.hop_length)
            assert decibels.dtype == np.float32
            assert np.abs(decibels - expected).max() < 0.01, f"{name}, {n} samples"


PRINT_FEATURES = """
import hashlib, numpy, audio_settings, front_end
noise = numpy.random.default_rng(0).uniform(-1, 1, (8, 88_200)).astype(numpy.float32)
audio = audio_settings.AudioSettings()
print(hashlib.sha256(b"".join(front_end.log_mel(clip, audio).tobytes() for clip in noise)).hexdigest())
"""


@pytest.mark.parametrize("kernels", [None, "Haswell", "Nehalem"])  # of OpenBLAS: the processor's own, and older ones
def test_features_do_not_hang_on_the_number_of_threads(kernels):
    outputs = set()
    for threads in (1, 2, 4):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
        if kernels:
            environment["OPENBLAS_CORETYPE"] = kernels
        command = [sys.executable, "-c", PRINT_FEATURES]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_shapes_of_the_defaults():
    assert (AUDIO.clip_samples, AUDIO.n_frames, AUDIO.shape) == (88_200, 173, (192, 173))
    features = front_end.clip_features(sounds(20_000, RATE)["noise"], AUDIO)
    assert (features.shape, features.dtype) == ((192, 173), np.float16)


@pytest.mark.parametrize(
    "fine_frames, hop_length, n", [(2, 512, 88_200), (4, 512, 88_575), (1, 500, 88_000), (3, 300, 700)]
)
def test_rows_are_the_log_mel_and_the_bands_of_each_fine_frame(fine_frames, hop_length, n):
    audio = dataclasses.replace(AUDIO, fine_frames=fine_frames, hop_length=hop_length, clip_seconds=n / RATE)
    samples = sounds(n, RATE)["noise"]
    features = front_end.clip_features(samples, dataclasses.replace(audio, feature_dtype="float32"))
    assert features.shape == audio.shape == (128 + 32 * fine_frames, 1 + n // hop_length)
    assert np.array_equal(features[:128], front_end.log_mel(samples, audio))
    silence = np.pad(samples, (0, hop_length))  # after the clip's end
    fine = front_end.log_mel(silence, dataclasses.replace(audio.fine, hop_length=hop_length // fine_frames))
    for frame in range(audio.n_frames):
        for part in range(fine_frames):
            rows = slice(128 + 32 * part, 128 + 32 * (part + 1))
            assert np.allclose(features[rows, frame], fine[:, frame * fine_frames + part], atol=1e-4)


def test_fine_frames_tell_clicks_apart_that_frames_do_not():
    samples = np.zeros(AUDIO.clip_samples, np.float32)
    samples[::512] = 1.0  # 43 a second
    features = front_end.clip_features(samples, AUDIO)[:, 20:-20].astype(np.float32)
    ripple = {"log-mel": features[:128].std(axis=1).max(), "fine": np.abs(features[128:160] - features[160:]).min()}
    assert ripple["log-mel"] < 0.1 and ripple["fine"] > 20  # dB


def test_short_clips_are_repeated_or_padded():
    silence = dataclasses.replace(AUDIO, short_clips="silence")
    samples = np.arange(1, 30_001, dtype=np.float32)
    repeated, padded = front_end.fit_clip(samples, AUDIO), front_end.fit_clip(samples, silence)
    assert repeated.shape == padded.shape == (88_200,)
    assert np.array_equal(repeated, np.tile(samples, 3)[:88_200])
    assert np.array_equal(padded[:30_000], samples) and not padded[30_000:].any()
    for audio in (AUDIO, silence):
        longer = np.arange(100_000, dtype=np.float32)
        assert np.array_equal(front_end.fit_clip(longer, audio), longer[:88_200])
        assert np.array_equal(front_end.fit_clip(longer[:88_200], audio), longer[:88_200])
