"""audio.py: settings that can't be; any format, rate and channel count; streaming; librosa's numbers."""

import dataclasses
import os
import random
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import audio as audio_file
from audio import AudioSettings, read_audio
from utils import UserError

AUDIO = AudioSettings()
RATE = AUDIO.sample_rate

# --- Settings ----------------------------------------------------------------------------------------------------


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


# --- Samples to log-mel ------------------------------------------------------------------------------------------

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
    filters = audio_file.mel_filters(audio)
    assert filters.shape == (1 + audio.n_fft // 2, audio.n_mels)
    np.testing.assert_allclose(filters, expected.T, rtol=1e-5, atol=1e-9)


def test_mel_scale_is_librosas_and_its_inverse():
    import librosa

    frequencies = np.concatenate([np.linspace(0, 1100, 23), np.geomspace(1000, 40_000, 20)])
    np.testing.assert_allclose(audio_file.hz_to_mel(frequencies), librosa.hz_to_mel(frequencies), rtol=1e-12)
    np.testing.assert_allclose(audio_file.mel_to_hz(audio_file.hz_to_mel(frequencies)), frequencies, rtol=1e-12)


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
            decibels = audio_file.log_mel(samples, audio)
            assert decibels.shape == expected.shape == (audio.n_mels, 1 + n // audio.hop_length)
            assert decibels.dtype == np.float32
            assert np.abs(decibels - expected).max() < 0.01, f"{name}, {n} samples"


PRINT_FEATURES = """
import hashlib, numpy, audio
noise = numpy.random.default_rng(0).uniform(-1, 1, (8, 88_200)).astype(numpy.float32)
settings = audio.AudioSettings()
print(hashlib.sha256(b"".join(audio.log_mel(clip, settings).tobytes() for clip in noise)).hexdigest())
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
    features = audio_file.clip_features(sounds(20_000, RATE)["noise"], AUDIO)
    assert (features.shape, features.dtype) == ((192, 173), np.float16)


@pytest.mark.parametrize(
    "fine_frames, hop_length, n", [(2, 512, 88_200), (4, 512, 88_575), (1, 500, 88_000), (3, 300, 700)]
)
def test_rows_are_the_log_mel_and_the_bands_of_each_fine_frame(fine_frames, hop_length, n):
    audio = dataclasses.replace(AUDIO, fine_frames=fine_frames, hop_length=hop_length, clip_seconds=n / RATE)
    samples = sounds(n, RATE)["noise"]
    features = audio_file.clip_features(samples, dataclasses.replace(audio, feature_dtype="float32"))
    assert features.shape == audio.shape == (128 + 32 * fine_frames, 1 + n // hop_length)
    assert np.array_equal(features[:128], audio_file.log_mel(samples, audio))
    silence = np.pad(samples, (0, hop_length))  # after the clip's end
    fine = audio_file.log_mel(silence, dataclasses.replace(audio.fine, hop_length=hop_length // fine_frames))
    for frame in range(audio.n_frames):
        for part in range(fine_frames):
            rows = slice(128 + 32 * part, 128 + 32 * (part + 1))
            assert np.allclose(features[rows, frame], fine[:, frame * fine_frames + part], atol=1e-4)


def test_fine_frames_tell_clicks_apart_that_frames_do_not():
    samples = np.zeros(AUDIO.clip_samples, np.float32)
    samples[::512] = 1.0  # 43 a second
    features = audio_file.clip_features(samples, AUDIO)[:, 20:-20].astype(np.float32)
    ripple = {"log-mel": features[:128].std(axis=1).max(), "fine": np.abs(features[128:160] - features[160:]).min()}
    assert ripple["log-mel"] < 0.1 and ripple["fine"] > 20  # dB


def test_short_clips_are_repeated_or_padded():
    silence = dataclasses.replace(AUDIO, short_clips="silence")
    samples = np.arange(1, 30_001, dtype=np.float32)
    repeated, padded = audio_file.fit_clip(samples, AUDIO), audio_file.fit_clip(samples, silence)
    assert repeated.shape == padded.shape == (88_200,)
    assert np.array_equal(repeated, np.tile(samples, 3)[:88_200])
    assert np.array_equal(padded[:30_000], samples) and not padded[30_000:].any()
    for audio in (AUDIO, silence):
        longer = np.arange(100_000, dtype=np.float32)
        assert np.array_equal(audio_file.fit_clip(longer, audio), longer[:88_200])
        assert np.array_equal(audio_file.fit_clip(longer[:88_200], audio), longer[:88_200])


# --- Recordings --------------------------------------------------------------------------------------------------

EXACT = {"PCM_S8": 2**-7, "PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23, "PCM_32": 2**-24}  # one step
EXACT |= {"FLOAT": 1e-7, "DOUBLE": 1e-7, "ULAW": 0.04, "ALAW": 0.04, "IMA_ADPCM": 0.05, "MS_ADPCM": 0.05}
EXACT |= {"VORBIS": 0.08, "OPUS": 0.12, "MPEG_LAYER_III": 0.05}
FORMATS = [
    (file_format, subtype)
    for file_format in ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF")
    for subtype in soundfile.available_subtypes(file_format)
    if subtype in EXACT and (file_format, subtype) != ("WAV", "MPEG_LAYER_III")  # listed, but it can't be written
]


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("file_format, subtype", FORMATS)
def test_every_format(tmp_path, file_format, subtype, channels):
    rate = 48_000 if subtype == "OPUS" else 44_100
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 300 * time) * np.sin(np.pi * time)  # begins and ends with silence
    path = tmp_path / f"a.{file_format.lower()}"
    write(path, np.stack([tone, tone / 2][:channels], axis=1), rate, format=file_format, subtype=subtype)
    samples = read_audio(path, rate)
    assert samples.dtype == np.float32 and samples.ndim == 1
    padding = 4000 if subtype in ("IMA_ADPCM", "MS_ADPCM", "MPEG_LAYER_III") else 0  # these end on a whole block
    assert len(tone) <= len(samples) <= len(tone) + padding
    expected = tone if channels == 1 else tone * 0.75
    assert np.abs(samples[: len(tone)] - expected).max() < EXACT[subtype] * 1.01


@pytest.mark.parametrize("file_rate", [1, 8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000, 768_000])
def test_every_rate(tmp_path, file_rate):
    seconds = 3 if file_rate == 1 else 1
    n = seconds * file_rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / file_rate) if file_rate > 1 else np.full(n, 0.5)
    samples = read_audio(write(tmp_path / "a.wav", tone, file_rate, subtype="FLOAT"), RATE)
    assert len(samples) == seconds * RATE
    if file_rate > 1:
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / RATE)
        middle = slice(RATE // 10, -RATE // 10)
        assert np.abs(samples - expected)[middle].max() < 1e-3


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(tmp_path, channels):
    levels = np.arange(1, channels + 1) / 16
    samples = read_audio(write(tmp_path / "a.wav", np.tile(levels, (1000, 1)), subtype="FLOAT"), RATE)
    np.testing.assert_allclose(samples, np.full(1000, levels.mean()), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1201])  # 1201: 0.0545 s, shorter than one FFT frame
@pytest.mark.parametrize("file_rate", [8000, RATE, 96_000])
def test_very_short_recordings(tmp_path, n, file_rate):
    path = write(tmp_path / "a.wav", np.full(n, 0.5), file_rate)
    if n * RATE / file_rate < 0.5:
        with pytest.raises(UserError, match=r"a\.wav is too short: no sample is left at 22050 Hz"):
            read_audio(path, RATE)
    else:
        features = audio_file.clip_features(read_audio(path, RATE), AUDIO)
        assert features.shape == AUDIO.shape and np.isfinite(features).all()


def test_the_loudest_and_the_silent(tmp_path):
    for level in (0.0, 1e-30, 32_768.0, 2.0**31, 9e11):
        path = write(tmp_path / "a.wav", np.full((5000, 2), level), subtype="FLOAT")
        features = audio_file.clip_features(read_audio(path, RATE), AUDIO)
        assert np.isfinite(features).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [float("nan"), float("inf"), -float("inf"), 1e13, 1e19, -3e38, 1e300])
def test_samples_that_are_no_sound(tmp_path, level):
    samples = np.zeros((5000, 2))
    samples[77] = level
    path = write(tmp_path / "a.wav", samples, 44_100, subtype="DOUBLE")
    with pytest.raises(UserError, match=r"a\.wav has samples that are no sound \(NaN, infinity or beyond 1e\+12\)"):
        read_audio(path, RATE)


def test_a_day_at_one_sample_a_second_is_refused_before_memory_is_taken(tmp_path):
    with pytest.raises(UserError, match=r"a\.wav has 86400 samples at 1 Hz, over 4 h: cut it"):
        read_audio(write(tmp_path / "a.wav", np.zeros(86_400), 1), RATE)


def flac_of_length(path, n):
    """A FLAC file whose header says that it has n samples; 0 is for 'unknown'."""
    write(path, np.random.default_rng(0).uniform(-1, 1, 5000), 44_100)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | n >> 32
    data[22:26] = (n & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("n", [0, 10**8, 10**10, 2**36 - 1])
def test_header_that_lies_about_the_length(tmp_path, n):
    with pytest.raises(UserError, match=r"a\.flac (has \d+ samples at 44100 Hz, over 4 h|can't be decoded as audio)"):
        read_audio(flac_of_length(tmp_path / "a.flac", n), RATE)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("text.wav", b"These are not the sounds.\n" * 50, "can't be decoded as audio"),
        ("page.wav", b"<!DOCTYPE html><html><body>404</body></html>", "can't be decoded as audio"),
        ("pointer.wav", b"version https://git-lfs.github.com/spec/v1\n", "can't be decoded as audio"),
        ("zeros.wav", bytes(5000), "can't be decoded as audio"),
        ("empty.wav", b"", "can't be decoded as audio"),
        ("text.mp3", b"no frames " * 50, "can't be decoded as audio"),
        ("sound.raw", bytes(5000), "can't be decoded as audio"),
        ("sound", b"RIFF", "can't be decoded as audio"),
    ],
)
def test_what_is_no_audio(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_audio(tmp_path / name, RATE)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_samples_folder_and_no_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.wav holds no audio samples"):
        read_audio(write(tmp_path / "none.wav", np.zeros(0)), RATE)
    with pytest.raises(UserError, match="is a folder, not an audio file: name one file in it"):
        read_audio(tmp_path, RATE)
    with pytest.raises(UserError, match=r"no such file: .*gone\.wav"):
        read_audio(tmp_path / "gone.wav", RATE)


def test_wrong_extension_is_no_obstacle(tmp_path):
    tone = sounds(RATE, RATE)["tone"]
    write(tmp_path / "a.flac", tone)
    (tmp_path / "a.flac").rename(tmp_path / "a.wav")
    assert np.abs(read_audio(tmp_path / "a.wav", RATE) - tone).max() < 2**-15


def test_truncated_anywhere(tmp_path):
    whole = write(tmp_path / "a.wav", sounds(2000, 8000)["noise"], 8000, subtype="PCM_16").read_bytes()
    opened = 0
    for end in [*range(0, 60), *range(60, len(whole), 400)]:
        (tmp_path / "b.wav").write_bytes(whole[:end])
        try:
            samples = read_audio(tmp_path / "b.wav", 8000)
        except UserError as error:
            assert "b.wav" in str(error)
            continue
        opened += 1
        assert len(samples) == (end - 44) // 2
    assert opened > 5


fixed = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(fixed, max_examples=80)
@given(
    st.sampled_from([("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("WAV", "DOUBLE")]),
    st.sampled_from([1, 100, 8000, 11_025, 22_050, 44_100, 96_000, 768_000]),
    st.integers(1, 8),
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from([1, 50]),
)
@example(("WAV", "FLOAT"), 44_100, 1, [1e20], 50)
@example(("WAV", "DOUBLE"), 44_100, 2, [3e38, 3e38], 50)
def test_features_of_any_file_are_numbers(tmp_path, form, rate, channels, values, times):
    samples = np.resize(np.array(values or [0], np.float64), (len(values) * times, channels))
    path = write(tmp_path / "a.wav", samples, rate, format=form[0], subtype=form[1])
    try:
        features = audio_file.clip_features(read_audio(path, RATE), AUDIO)
    except UserError as error:
        assert "a.wav" in str(error)
        return
    assert features.shape == AUDIO.shape and np.isfinite(features).all()


def test_damaged_files_give_numbers_or_a_line(tmp_path):
    tone = sounds(3000, 8000)["tone"]
    files = {}
    for file_format, subtype in [("WAV", "PCM_16"), ("WAV", "MS_ADPCM"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")]:
        path = write(tmp_path / "whole", tone, 8000, format=file_format, subtype=subtype)
        files[f"{file_format}_{subtype}.{file_format[:4].lower()}"] = path.read_bytes()
    rng = random.Random(0)
    for _ in range(250):
        name = rng.choice(sorted(files))
        data = bytearray(files[name])
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(rng.choice((60, len(data))))] = rng.randrange(256)
        path = tmp_path / name
        path.write_bytes(data)
        try:
            features = audio_file.clip_features(read_audio(path, RATE), AUDIO)
        except UserError as error:
            assert name in str(error)
        else:
            assert np.isfinite(features).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_16_bit_samples_are_what_libsndfile_makes_of_them(tmp_path, channels):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (3000, channels)).astype(np.int16)
    path = write(tmp_path / "a.wav", samples, subtype="PCM_16")
    as_float = soundfile.read(path, dtype="float32", always_2d=True)[0]
    assert np.array_equal(read_audio(path, RATE), as_float @ np.full(channels, 1 / channels, np.float32))


# --- Streaming and windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_rate", [RATE, 44_100, 8000])
@pytest.mark.parametrize("seconds", [0.01, 1, 4])
def test_a_stream_of_one_block_is_the_whole_to_the_bit(tmp_path, file_rate, seconds):
    path = write(tmp_path / "a.wav", sounds(round(seconds * file_rate), file_rate)["noise"], file_rate)
    (block,) = audio_file.stream_audio(path, RATE)
    assert np.array_equal(block, read_audio(path, RATE))


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("file_rate", [RATE, 44_100, 48_000])
def test_a_stream_of_many_blocks_is_the_whole_to_rounding(tmp_path, monkeypatch, file_rate, file_format):
    sound = 0.5 * sounds(3 * file_rate, file_rate)["noise"]
    path = write(tmp_path / f"a.{file_format.lower()}", np.stack([sound, -sound / 2], 1), file_rate, format=file_format)
    whole = read_audio(path, RATE)
    monkeypatch.setattr(audio_file, "BLOCK_SAMPLES", 10_007)
    blocks = list(audio_file.stream_audio(path, RATE))
    assert len(blocks) > 6
    streamed = np.concatenate(blocks)
    assert len(streamed) == len(whole)
    assert np.abs(streamed - whole).max() < 1e-6


def test_a_long_recording_is_streamed_in_bounded_memory(tmp_path):
    rate, minutes = 48_000, 5
    path = tmp_path / "long.wav"
    second = (0.1 * sounds(rate, rate)["noise"]).repeat(2).reshape(-1, 2)
    with soundfile.SoundFile(path, "w", rate, 2) as file:
        for _ in range(60 * minutes):
            file.write(second)
    tracemalloc.start()
    n = sum(len(block) for block in audio_file.stream_audio(path, RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 60 * minutes * RATE
    assert peak < 60e6 < 8 * 60 * minutes * rate


def test_a_stream_names_what_is_wrong(tmp_path):
    bad = np.zeros(50_000)
    bad[40_000] = np.nan
    for name, make, named in (
        ("nan.wav", lambda path: write(path, bad, subtype="FLOAT"), "NaN"),
        ("none.wav", lambda path: write(path, []), "holds no audio samples"),
        ("short.wav", lambda path: write(path, [0.5], 96_000), "is too short"),
        ("text.wav", lambda path: path.write_text("siren"), "can't be decoded as audio"),
        ("gone.wav", lambda path: None, "no such file"),
    ):
        make(tmp_path / name)
        with pytest.raises(UserError, match=named) as caught:
            list(audio_file.stream_audio(tmp_path / name, RATE))
        assert name in str(caught.value)


@pytest.mark.parametrize("n", [1, 99, 100, 101, 104, 106, 149, 150, 151, 200, 1000, 1033])
@pytest.mark.parametrize("hop", [50, 100, 33, 1])
@pytest.mark.parametrize("block", [1, 7, 64, 5000])
def test_windows_hold_every_sound_once_in_its_place(n, hop, block):
    sound = np.arange(n, dtype=np.float32)
    blocks = [sound[start : start + block] for start in range(0, n, block)]
    found = list(audio_file.windows(blocks, 100, hop))
    for start, window in found:
        assert np.array_equal(window, sound[start : start + 100])
    starts = [start for start, _ in found]
    assert starts[:-1] == [hop * number for number in range(len(starts) - 1)]
    assert {len(window) for _, window in found} == {min(n, 100)}
    end = starts[-1] + min(n, 100)
    assert n - audio_file.LEAST_TAIL * hop <= end <= n
    assert len(set(starts)) == len(starts)


# --- What soundfile can't decode ---------------------------------------------------------------------------------

# What `ffmpeg -i file:PATH -f au -` does: a header and samples, big-endian, to stdout.
FFMPEG = """#!{python}
import pathlib, struct, sys
name = sys.argv[sys.argv.index("-i") + 1]
content = pathlib.Path(name.removeprefix("file:")).read_bytes()
if not content.startswith(b"VIDEO"):
    sys.exit(1)
sys.stdout.buffer.write(struct.pack(">4s5I", b".snd", 32, 0xFFFFFFFF, 3, 44100, 2) + bytes(8))
sys.stdout.buffer.write(content[5:])
sys.stdout.flush()
sys.exit(content.endswith(b"BROKEN!!"))
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A stand-in for ffmpeg in the PATH, which knows one format: b"VIDEO" and 16-bit stereo samples at 44.1 kHz."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").write_text(FFMPEG.format(python=sys.executable))
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script for POSIX systems")
def test_the_sound_of_a_video_if_ffmpeg_is_there(ffmpeg, tmp_path, monkeypatch):
    samples = np.random.default_rng(0).integers(-(2**14), 2**14, (3 * 44_100, 2)).astype(">i2")
    (tmp_path / "a.mp4").write_bytes(b"VIDEO" + samples.tobytes())
    expected = read_audio(write(tmp_path / "a.wav", samples.astype(np.int16), 44_100, subtype="PCM_16"), RATE)
    assert np.array_equal(read_audio(tmp_path / "a.mp4", RATE), expected)
    monkeypatch.setattr(audio_file, "BLOCK_SAMPLES", 20_000)
    streamed = np.concatenate(list(audio_file.stream_audio(tmp_path / "a.mp4", RATE)))
    assert np.abs(streamed - expected).max() < 1e-6


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script for POSIX systems")
def test_what_ffmpeg_can_not_decode_either(ffmpeg, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4 can't be decoded as audio.*ffmpeg can't read it either"):
        read_audio(tmp_path / "a.mp4", RATE)
    (tmp_path / "a.mp4").write_bytes(b"VIDEO" + bytes(10**6) + b"BROKEN!!")
    with pytest.raises(UserError, match=r"a\.mp4 can't be decoded as audio to its end \(ffmpeg ended with status 1"):
        read_audio(tmp_path / "a.mp4", RATE)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script for POSIX systems")
def test_ffmpeg_ends_with_who_stops_listening(ffmpeg, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_file, "BLOCK_SAMPLES", 1000)
    (tmp_path / "a.mp4").write_bytes(b"VIDEO" + bytes(4 * 10**6))
    with audio_file.open_audio(tmp_path / "a.mp4") as (rate, blocks):
        assert rate == 44_100 and len(next(blocks)) == 1000
