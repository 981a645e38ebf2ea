"""audio.py: settings that can't be, every format, rate and channel count, faults, streaming, librosa's numbers."""

import dataclasses
import os
import random
import shutil
import struct
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

import audio as audio_module
from audio import AudioSettings, clip_features, fit_clip, log_mel, read_audio, stream_audio, windows
from utils import UserError

AUDIO = AudioSettings()
RATE = AUDIO.sample_rate
UNUSUAL_SETTINGS = [
    AudioSettings(16_000, 1.0, 512, 160, 40, 50.0, 7000.0, 60.0),
    AudioSettings(44_100, 2.5, 1024, 441, 64, 20.0, 16_000.0, 100.0),
    AudioSettings(8_000, 0.5, 330, 100, 13, 0.0, 4000.0, 80.0),  # no power of two
]


def sounds(n, rate):
    """{name: samples (n,) float32} of different kinds."""
    time = np.arange(n) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    kinds = {
        "noise": np.random.default_rng(0).uniform(-1, 1, n),
        "tone": tone,
        "sweep": np.sin(2 * np.pi * (50 + 1000 * time) * time),
        "faint": 1e-4 * tone,
        "click": np.eye(1, n, n // 3)[0],
        "silence": np.zeros(n),
        "DC": np.full(n, 0.7),
        "clipped": np.clip(5 * tone, -1, 1),
        "sound, then silence": tone * (time < 0.1),
    }
    return {name: samples.astype(np.float32) for name, samples in kinds.items()}


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    """The only folder of programs, empty at first: what ffmpeg may be installed here changes no result."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "sample_rate": (0, -1, 22_050.5, "22050", None, float("nan"), 10**9),
        "clip_seconds": (0, float("inf"), float("nan"), "4"),
        "n_fft": (0, 2047, 2048.0, 2**31),
        "hop_length": (0, -512, 2**31),
        "n_mels": (0, 2**31, [128]),
        "top_db": (-1, float("nan"), None),
        "short_clips": ("silent", None),
        "feature_dtype": ("float8", "object", None),
        "f_min": (-1, 11_025.0, float("nan")),
        "f_max": (0, 1e9),
    }.items(),
)
def test_setting_that_can_not_be_is_named(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"audio setting {name} is"):
            dataclasses.replace(AUDIO, **{name: value})
    with pytest.raises(UserError, match="frames of 32768 samples: raise hop_length"):  # each may be, not all together
        AudioSettings(sample_rate=768_000, clip_seconds=600, n_fft=32_768, hop_length=2)
    with pytest.raises(UserError, match="frames of 128 bands: raise hop_length"):
        AudioSettings(sample_rate=768_000, clip_seconds=80, n_fft=2, hop_length=1)
    with pytest.raises(UserError, match="clips of 460800000 samples: lower clip_seconds"):
        AudioSettings(sample_rate=768_000, clip_seconds=600, n_fft=2, hop_length=32_768, n_mels=8)


# --- Log-mel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audio", [AUDIO, *UNUSUAL_SETTINGS])
def test_log_mel_equals_librosas_and_torchaudios(audio):
    import librosa
    import torch
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

    options = {"n_fft": audio.n_fft, "hop_length": audio.hop_length, "n_mels": audio.n_mels, "pad_mode": "constant"}
    by_torchaudio = torch.nn.Sequential(
        MelSpectrogram(
            audio.sample_rate, f_min=audio.f_min, f_max=audio.f_max, norm="slaney", mel_scale="slaney", **options
        ),
        AmplitudeToDB(top_db=audio.top_db),
    )
    for n in (audio.clip_samples, audio.clip_samples // 7, audio.hop_length, 1):
        for name, samples in sounds(n, audio.sample_rate).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # librosa warns of clips shorter than a frame
                power = librosa.feature.melspectrogram(
                    y=samples, sr=audio.sample_rate, fmin=audio.f_min, fmax=audio.f_max, **options
                )
            decibels = log_mel(samples, audio)
            assert decibels.shape == (audio.n_mels, 1 + n // audio.hop_length) and decibels.dtype == np.float32
            expected = librosa.power_to_db(power, top_db=audio.top_db)
            assert np.abs(decibels - expected).max() < 0.01, f"{name}, {n} samples"
            assert np.abs(decibels - by_torchaudio(torch.from_numpy(samples)).numpy()).max() < 0.05, name


def test_short_clips_are_repeated_or_padded():
    silence = dataclasses.replace(AUDIO, short_clips="silence")
    samples = np.arange(1, 30_001, dtype=np.float32)
    assert np.array_equal(fit_clip(samples, AUDIO), np.tile(samples, 3)[:88_200])
    assert np.array_equal(fit_clip(samples, silence), np.pad(samples, (0, 58_200)))
    longer = np.arange(100_000, dtype=np.float32)
    for audio in (AUDIO, silence):
        assert np.array_equal(fit_clip(longer, audio), longer[:88_200])


def test_import_brings_neither_torch_nor_pandas():
    code = "import sys, audio; print({'torch', 'pandas', 'librosa', 'data_loader'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# --- Recordings of every kind ------------------------------------------------------------------------------------

EXACT = {"PCM_S8": 2**-7, "PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23, "PCM_32": 2**-24}  # one step
EXACT |= {"FLOAT": 1e-7, "DOUBLE": 1e-7, "ULAW": 0.04, "ALAW": 0.04, "IMA_ADPCM": 0.05, "MS_ADPCM": 0.05}
EXACT |= {"VORBIS": 0.08, "OPUS": 0.12, "MPEG_LAYER_III": 0.05}


@pytest.mark.parametrize("file_format", ["WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF"])
def test_every_format(tmp_path, file_format):
    for subtype in EXACT.keys() & soundfile.available_subtypes(file_format).keys():
        if (file_format, subtype) == ("WAV", "MPEG_LAYER_III"):  # listed, but it can't be written
            continue
        rate = 48_000 if subtype == "OPUS" else 44_100
        time = np.arange(rate) / rate
        tone = 0.5 * np.sin(2 * np.pi * 300 * time) * np.sin(np.pi * time)  # begins and ends with silence
        path = tmp_path / f"a.{file_format.lower()}"
        write(path, np.stack([tone, tone / 2], axis=1), rate, format=file_format, subtype=subtype)
        samples = read_audio(path, rate)
        assert samples.dtype == np.float32 and samples.ndim == 1
        padding = 4000 if subtype in ("IMA_ADPCM", "MS_ADPCM", "MPEG_LAYER_III") else 0  # these end on a whole block
        assert len(tone) <= len(samples) <= len(tone) + padding
        assert np.abs(samples[: len(tone)] - tone * 0.75).max() < EXACT[subtype] * 1.01, subtype


@pytest.mark.parametrize("file_rate", [1000, 8000, 11_025, 22_050, 44_100, 96_000, 768_000])
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


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged(tmp_path, channels):
    levels = np.arange(1, channels + 1) / 16
    for subtype in ("FLOAT", "PCM_16"):
        samples = read_audio(write(tmp_path / "a.wav", np.tile(levels, (1000, 1)), subtype=subtype), RATE)
        np.testing.assert_allclose(samples, np.full(1000, levels.mean()), rtol=1e-6)


@pytest.mark.parametrize("file_rate", [8000, RATE, 96_000])
def test_very_short_recordings(tmp_path, file_rate):
    for n in (1, 2, 3, 10, 1201):  # 1201: 0.0545 s, shorter than one FFT frame
        path = write(tmp_path / "a.wav", np.full(n, 0.5), file_rate)
        if n * RATE / file_rate < 0.5:
            with pytest.raises(UserError, match=r"a\.wav is too short: no sample is left at 22050 Hz"):
                read_audio(path, RATE)
        else:
            features = clip_features(read_audio(path, RATE), AUDIO)
            assert features.shape == AUDIO.shape and np.isfinite(features).all()


# --- Faults ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [float("nan"), float("inf"), 1e13, -3e38, 1e300])
def test_samples_that_are_no_sound_are_refused(tmp_path, level):
    samples = np.zeros((2 * audio_module.BLOCK_SAMPLES, 2))
    samples[-10] = level  # not in the first block
    path = write(tmp_path / "a.wav", samples, 44_100, subtype="DOUBLE")
    with pytest.raises(UserError, match=r"a\.wav has samples that are no sound \(NaN, infinity or beyond 1e\+12\)"):
        read_audio(path, RATE)


@pytest.mark.parametrize("n", [0, 10**8, 10**10, 2**36 - 1])  # 0: unknown, as written to a pipe
def test_flac_whose_header_lies_is_read_to_its_end_or_refused_as_too_long(tmp_path, n):
    path = write(tmp_path / "a.flac", sounds(5000, RATE)["noise"], RATE)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | n >> 32
    data[22:26] = (n & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    if n > 10**9:
        with pytest.raises(UserError, match=r"a\.flac has \d+ samples at 22050 Hz, over 4 h"):
            read_audio(path, RATE)
    else:
        assert len(read_audio(path, RATE)) == 5000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.wav", b"<!DOCTYPE html><html><body>404</body></html>" * 50),
        ("zeros.wav", bytes(5000)),
        ("empty.wav", b""),
        ("text.mp3", b"no frames " * 50),
        ("sound.raw", bytes(5000)),
        ("sound", b"RIFF"),
    ],
)
def test_what_is_no_audio_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"can't be decoded as audio .*install ffmpeg for more formats") as caught:
        read_audio(tmp_path / name, RATE)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_folder_no_file_no_samples_and_too_many_are_named(tmp_path):
    write(tmp_path / "none.wav", np.zeros(0))
    write(tmp_path / "day.wav", np.zeros(15_000_000, "int16"), 1000, subtype="PCM_U8")
    for name, reason in (
        ("none.wav", "holds no audio samples"),
        ("", "is a folder, not an audio file: name one file in it"),
        ("gone.wav", "no such file: .*gone"),
        ("day.wav", "day.wav has 15000000 samples at 1000 Hz, over 4 h: cut it"),
    ):
        with pytest.raises(UserError, match=reason):
            read_audio(tmp_path / name, RATE)


def test_cut_off_file_gives_what_is_there_or_is_named(tmp_path):
    whole = write(tmp_path / "a.wav", sounds(2000, 8000)["noise"], 8000, subtype="PCM_16").read_bytes()
    opened = 0
    for end in [0, 11, 43, *range(44, len(whole), 333)]:
        (tmp_path / "b.wav").write_bytes(whole[:end])
        try:
            samples = read_audio(tmp_path / "b.wav", 8000)
        except UserError as error:
            assert "b.wav" in str(error)
            continue
        opened += 1
        assert len(samples) == (end - 44) // 2
    assert opened > 5


def features_or_fault(path):
    """Check that a file gives finite features or a UserError that names it."""
    try:
        features = clip_features(read_audio(path, RATE), AUDIO)
    except UserError as error:
        assert path.name in str(error)
    else:
        assert features.shape == AUDIO.shape and np.isfinite(features).all()


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("WAV", "DOUBLE")]),
    st.sampled_from([1, 100, 8000, 11_025, 22_050, 44_100, 96_000, 768_000]),
    st.integers(1, 8),
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from([1, 50]),
)
@example(("WAV", "DOUBLE"), 44_100, 2, [3e38, 3e38], 50)
@example(("WAV", "FLOAT"), 44_100, 1, [9e11], 50)
@example(("WAV", "FLOAT"), 44_100, 1, [1e-30], 50)
def test_any_samples_give_finite_features_or_a_fault(tmp_path, form, rate, channels, values, times):
    samples = np.resize(np.array(values or [0], np.float64), (len(values) * times, channels))
    features_or_fault(write(tmp_path / "a.wav", samples, rate, format=form[0], subtype=form[1]))


@pytest.mark.parametrize(
    ("file_format", "subtype"), [("WAV", "PCM_16"), ("WAV", "MS_ADPCM"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")]
)
def test_damaged_files_give_finite_features_or_a_fault(tmp_path, file_format, subtype):
    path = write(tmp_path / "a", sounds(3000, 8000)["tone"], 8000, format=file_format, subtype=subtype)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(rng.choice((60, len(data))))] = rng.randrange(256)
        path.write_bytes(data)
        features_or_fault(path)


# --- Streaming and windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("file_rate", [RATE, 44_100, 8000])
def test_stream_of_many_blocks_equals_one_of_one_block(tmp_path, monkeypatch, file_rate, file_format):
    sound = 0.5 * sounds(3 * file_rate, file_rate)["noise"]
    path = write(tmp_path / f"a.{file_format.lower()}", np.stack([sound, -sound / 2], 1), file_rate, format=file_format)
    (whole,) = stream_audio(path, RATE)
    monkeypatch.setattr(audio_module, "BLOCK_SAMPLES", 3007)
    blocks = list(stream_audio(path, RATE))
    assert len(blocks) > 6
    assert len(np.concatenate(blocks)) == len(whole)
    assert np.abs(np.concatenate(blocks) - whole).max() < 1e-6


def test_long_recording_is_streamed_in_bounded_memory(tmp_path):
    rate, minutes = 48_000, 3
    path = tmp_path / "long.wav"
    second = (0.1 * sounds(rate, rate)["noise"]).repeat(2).reshape(-1, 2)
    with soundfile.SoundFile(path, "w", rate, 2) as file:
        for _ in range(60 * minutes):
            file.write(second)
    tracemalloc.start()
    n = sum(len(block) for block in stream_audio(path, RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 60 * minutes * RATE
    assert peak < 60e6 < 8 * 60 * minutes * rate  # the bytes of the whole, as float32


@pytest.mark.parametrize("n", [1, 99, 100, 101, 104, 106, 149, 150, 151, 200, 1000, 1033])
def test_windows_cover_every_sound_in_order(n):
    sound = np.arange(n, dtype=np.float32)
    for hop in (50, 100, 33, 1):
        for block in (1, 7, 64, 5000):
            found = list(windows([sound[start : start + block] for start in range(0, n, block)], 100, hop))
            for start, window in found:
                assert np.array_equal(window, sound[start : start + 100])
            starts = [start for start, _ in found]
            assert starts[:-1] == [hop * index for index in range(len(starts) - 1)]
            assert len(set(starts)) == len(starts) and {len(window) for _, window in found} == {min(n, 100)}
            assert n - audio_module.MIN_TAIL * hop <= starts[-1] + min(n, 100) <= n


# --- What soundfile can't decode ---------------------------------------------------------------------------------

# What `ffmpeg -i file:PATH -f au -` does: a header and samples, big-endian, to stdout.
FFMPEG = """#!{python}
import pathlib, sys
content = pathlib.Path(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")).read_bytes()
if not content.startswith(b"VIDEO"):
    sys.exit(1)
sys.stdout.buffer.write(content[5:])
sys.stdout.flush()
sys.exit(content.endswith(b"BROKEN!!"))
"""
VIDEO = b"VIDEO" + struct.pack(">4s5I", b".snd", 32, 0xFFFFFFFF, 3, 44_100, 2) + bytes(8)


@pytest.fixture
def ffmpeg(programs):
    """A stand-in for ffmpeg, which knows one format: b"VIDEO" and 16-bit stereo samples at 44.1 kHz."""
    if os.name != "posix":
        pytest.skip("the stand-in is a script for POSIX systems")
    (programs / "ffmpeg").write_text(FFMPEG.format(python=sys.executable))
    (programs / "ffmpeg").chmod(0o755)


def test_sound_of_a_video_is_decoded_by_ffmpeg(ffmpeg, tmp_path, monkeypatch):
    samples = np.random.default_rng(0).integers(-(2**14), 2**14, (3 * 44_100, 2)).astype(">i2")
    (tmp_path / "a.mp4").write_bytes(VIDEO + samples.tobytes())
    expected = read_audio(write(tmp_path / "a.wav", samples.astype(np.int16), 44_100, subtype="PCM_16"), RATE)
    assert np.array_equal(read_audio(tmp_path / "a.mp4", RATE), expected)
    monkeypatch.setattr(audio_module, "BLOCK_SAMPLES", 20_000)
    assert np.abs(read_audio(tmp_path / "a.mp4", RATE) - expected).max() < 1e-6


def test_file_that_ffmpeg_can_not_decode_is_named(ffmpeg, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4 can't be decoded as audio.*ffmpeg finds no sound in it either"):
        read_audio(tmp_path / "a.mp4", RATE)
    (tmp_path / "a.mp4").write_bytes(VIDEO + bytes(10**6) + b"BROKEN!!")
    with pytest.raises(UserError, match=r"a\.mp4 can't be decoded as audio to its end \(ffmpeg ended with status 1"):
        read_audio(tmp_path / "a.mp4", RATE)


def test_recording_is_named_where_no_more_files_can_be_opened(ffmpeg, tmp_path):
    import resource

    (tmp_path / "a.mp4").write_bytes(VIDEO)
    free = os.dup(0)  # the lowest number that is free, which the recording gets
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Too many open files: .*a\.mp4"):
            read_audio(tmp_path / "a.mp4", RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- Sound that the header does not promise, and files that name others -------------------------------------------

FFMPEG_FOLDER = os.path.dirname(shutil.which("ffmpeg") or "")
needs_ffmpeg = pytest.mark.skipif(not FFMPEG_FOLDER, reason="needs ffmpeg")


def write_mp3_without_table(path):
    """Write 30 s of MP3 whose first 3 s have the highest bit rate, and no frame that has the length."""
    samples = 0.1 * sounds(30 * RATE, RATE)["tone"]
    samples[: 3 * RATE] = 0.3 * sounds(3 * RATE, RATE)["noise"]
    data = write(path, samples, bitrate_mode="VARIABLE").read_bytes()
    path.write_bytes(data[data.index(data[:2], 2) :])


def write_twice(path):
    options = {"rate": 24_000, "format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {"rate": RATE}
    path.write_bytes(2 * write(path, sounds(4 * options["rate"], RATE)["noise"], **options).read_bytes())


def cut_header_of_wav(path, subtype, channels, length):
    """Write 2 s of a WAV whose header says that it has `length` bytes of samples."""
    data = bytearray(
        write(path, np.tile(sounds(2 * RATE, RATE)["tone"][:, None], channels), subtype=subtype).read_bytes()
    )
    start = data.index(b"data") + 4
    data[start : start + 4] = struct.pack("<I", length)
    path.write_bytes(data)


@pytest.mark.parametrize("with_ffmpeg", [pytest.param(True, marks=needs_ffmpeg), False])
@pytest.mark.parametrize(
    ("name", "make", "seconds"),
    [
        ("a.mp3", write_mp3_without_table, 30),
        ("b.mp3", write_twice, 8),
        ("a.ogg", write_twice, 8),
        ("a.opus", write_twice, 8),
    ],
)
def test_sound_behind_what_libsndfile_reads_is_read_or_refused(name, make, seconds, with_ffmpeg, tmp_path, monkeypatch):
    make(tmp_path / name)
    if with_ffmpeg:
        monkeypatch.setenv("PATH", FFMPEG_FOLDER)
        assert len(read_audio(tmp_path / name, RATE)) / RATE == pytest.approx(seconds, abs=0.2)
        return
    with pytest.raises(UserError, match=r"it goes on after the \d\.\d s that can be read\): convert it .* ffmpeg"):
        read_audio(tmp_path / name, RATE)


@pytest.mark.parametrize("length", [0, 6000])  # of a recorder that was switched off; of 4 GB and 6000 bytes
@pytest.mark.parametrize(
    ("subtype", "channels"), [("PCM_16", 1), ("PCM_24", 2), ("FLOAT", 2), ("PCM_U8", 1), ("ULAW", 1), ("ALAW", 2)]
)
def test_wav_with_more_sound_than_its_header_has_is_read_to_its_end(subtype, channels, length, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_module, "BLOCK_SAMPLES", 5000)
    cut_header_of_wav(tmp_path / "a.wav", subtype, channels, length)
    samples = read_audio(tmp_path / "a.wav", RATE)
    assert np.abs(samples - sounds(2 * RATE, RATE)["tone"]).max() < 2 * EXACT[subtype]


@pytest.mark.parametrize("n", [0, RATE])
@pytest.mark.parametrize("file_format", ["wav", "rf64", "aiff", "au", "caf"])
def test_other_file_with_more_sound_than_its_header_has_is_noted_or_refused(file_format, n, tmp_path, capfd):
    options = {"subtype": "IMA_ADPCM"} if file_format == "wav" else {}
    tone = sounds(5 * RATE, RATE)["tone"]
    whole = write(tmp_path / f"a.{file_format}", tone, **options).read_bytes()
    path = write(tmp_path / f"a.{file_format}", tone[:n], **options)  # and the recorder is switched off
    path.write_bytes(path.read_bytes() + whole[path.stat().st_size :])
    if n:
        read_audio(path, RATE)
        assert f"note: {path} seems to be cut off: its header has 1.0 s, and more follows" in capfd.readouterr().err
    else:
        with pytest.raises(UserError, match="says that it holds no audio samples, and more follows: export it again"):
            read_audio(path, RATE)


@pytest.mark.parametrize("file_format", ["wav", "aiff"])
@pytest.mark.parametrize("subtype", ["PCM_24", "ULAW", "IMA_ADPCM"])
def test_chunks_behind_the_sound_are_no_sound(subtype, file_format, tmp_path, capfd):
    path = write(tmp_path / f"a.{file_format}", sounds(5001, RATE)["tone"], subtype=subtype)
    n = len(read_audio(path, RATE))
    whole = path.read_bytes()
    length = struct.pack("<I" if file_format == "wav" else ">I", 9000)
    path.write_bytes(whole + bytes(len(whole) % 2) + b"id3 " + length + bytes(9000))  # of odd length: a byte follows
    assert len(read_audio(path, RATE)) == n
    assert "note" not in capfd.readouterr().err


@pytest.mark.parametrize("file_format", ["wav", "aiff", "rf64", "au", "caf"])
def test_files_joined_by_cat_are_refused(file_format, tmp_path):
    path = write(tmp_path / f"a.{file_format}", sounds(5000, RATE)["tone"])
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(UserError, match="is two files, one behind the other"):
        read_audio(path, RATE)


@pytest.mark.parametrize("file_format", ["wav", "aiff", "mp3", "rf64", "au", "w64", "ogg"])
def test_file_that_ends_before_its_headers_length_is_noted(file_format, tmp_path, capfd):
    path = write(tmp_path / f"a.{file_format}", sounds(10 * RATE, RATE)["noise"])
    read_audio(path, RATE)
    assert "note" not in capfd.readouterr().err
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 4 * RATE < len(read_audio(path, RATE)) < 6 * RATE
    assert f"note: {path} seems to be cut off: it" in capfd.readouterr().err


@needs_ffmpeg
@pytest.mark.parametrize(
    ("file_format", "other_format"), [("m4a", "mp4"), ("flv", "flv"), ("mkv", "mkv"), ("wv", "wv")]
)
def test_file_for_ffmpeg_is_noted_where_cut_and_refused_where_joined(
    file_format, other_format, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("PATH", FFMPEG_FOLDER)
    title = "title=Duration: 10:00:00, a partial file"  # is no word of ffmpeg's
    path, other = tmp_path / f"partial file.{file_format}", tmp_path / f"other.{other_format}"
    for seconds, file, metadata in ((10, path, title), (3, other, "title=of another recorder")):
        wav = write(tmp_path / "a.wav", sounds(seconds * RATE, RATE)["noise"])
        options = ["-metadata", metadata, "-movflags", "faststart"]
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, *options, file], check=True)
    assert len(read_audio(path, RATE)) / RATE == pytest.approx(10, abs=0.1)
    assert "note" not in capfd.readouterr().err
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert len(read_audio(path, RATE)) / RATE == pytest.approx(5, abs=1)
    assert f"note: {path} seems to be cut off: " in capfd.readouterr().err
    path.write_bytes(whole + other.read_bytes())
    if file_format == "mkv":  # ffmpeg reads both
        assert len(read_audio(path, RATE)) / RATE == pytest.approx(13, abs=0.2)
    else:
        with pytest.raises(UserError, match="is two files, one behind the other"):
            read_audio(path, RATE)


@pytest.mark.parametrize(("second", "offset"), [(-1, 0), (-0.95, 0), (-1, 0.25), (-1, -0.25)])
def test_channels_that_cancel_each_other_are_the_loudest_of_them(second, offset, tmp_path):
    tone = sounds(RATE, RATE)["tone"]
    path = write(tmp_path / "a.wav", np.stack([tone, second * tone], axis=1) + np.float32(offset), subtype="FLOAT")
    assert np.array_equal(read_audio(path, RATE), tone + np.float32(offset))


@pytest.mark.parametrize("small", ["click", "hum", "noise"])
def test_channels_that_cancel_but_for_something_small_are_the_loudest_of_them(small, tmp_path):
    kinds = sounds(RATE, RATE)
    tone = 0.3 * kinds["tone"]  # std 0.106
    hum = 0.03 * np.sin(2 * np.pi * 50 * np.arange(RATE) / RATE)  # 14 dB below
    noise = np.random.default_rng(1).normal(0, 0.016, (2, RATE))  # another in each channel, 16 dB below
    added = {"click": kinds["click"] / 2, "hum": hum, "noise": noise}[small]
    channels = np.stack([tone, -0.95 * tone]) + np.float32(added)
    assert np.array_equal(read_audio(write(tmp_path / "a.wav", channels.T, subtype="FLOAT"), RATE), channels[0])


def test_channels_of_wide_stereo_are_averaged(tmp_path):
    """They have a common part and a larger one that is inverted in the other: a correlation of -0.4."""
    middle, side = np.random.default_rng(0).normal(0, 0.1, (2, RATE)) * [[0.65], [1]]
    path = write(tmp_path / "a.wav", np.stack([middle + side, middle - side], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, RATE), middle, atol=1e-6)


@pytest.mark.parametrize(("rate", "channels"), [(1, 1), (999, 2), (2_000_000, 1), (RATE, 65), (RATE, 1024)])
def test_rate_or_channels_beyond_reason_are_refused(rate, channels, tmp_path):
    path = write(tmp_path / "a.wav", np.zeros((4, channels)), rate)
    with pytest.raises(UserError, match=rf"a\.wav says {rate} Hz and {channels} channels: 1000 to 1000000 Hz"):
        read_audio(path, RATE)


@needs_ffmpeg
def test_playlist_that_names_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", FFMPEG_FOLDER)
    write(tmp_path / "secret.wav", sounds(RATE, RATE)["tone"])
    playlists = {
        "hls.wav": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:{tmp_path}/secret.wav\n",  # without its end
        "concat.wav": "ffconcat version 1.0\nfile secret.wav\n",
        "sdp.wav": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
        "dash.wav": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        "<AdaptationSet><Representation><BaseURL>secret.wav</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"can't be decoded as audio .* \(ffmpeg finds no sound in it either"):
            read_audio(tmp_path / name, RATE)


def test_ffmpeg_that_sends_nothing_is_ended(ffmpeg, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_module, "FFMPEG_SECONDS", 0.5)
    (tmp_path / "bin" / "ffmpeg").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "a.mp4").write_bytes(VIDEO)
    with pytest.raises(UserError, match="ffmpeg finds no sound in it either"):
        read_audio(tmp_path / "a.mp4", RATE)


def test_named_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(UserError, match=r"a\.wav is no regular file: cat "):
        read_audio(tmp_path / "a.wav", RATE)
