"""From a recording to its log-mel spectrogram: settings, decoding, streaming, and the one front-end.

Nothing here imports torch or pandas: the preprocessing workers need only numpy and scipy.
"""

import contextlib
import dataclasses
import functools
import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.fft import rfft

import config
from utils import UserError

# --- Settings ----------------------------------------------------------------------------------------------------

SETTING_LIMITS = {  # least and most that make sense; files from strangers have settings too
    "sample_rate": (100, 768_000),
    "clip_seconds": (0.001, 600),
    "n_fft": (2, 32_768),
    "hop_length": (1, 32_768),
    "n_mels": (1, 1024),
    "fine_frames": (1, 64),
    "fine_n_fft": (2, 32_768),
    "fine_n_mels": (4, 1024),
    "f_min": (0, 384_000),
    "f_max": (1, 384_000),
    "top_db": (0, 1000),
}
SETTING_CHOICES = {"short_clips": ("repeat", "silence"), "feature_dtype": ("float16", "float32")}
MOST_FFT_SAMPLES = 2**27  # frames x n_fft of one clip


@dataclasses.dataclass(frozen=True)
class AudioSettings:
    """How audio becomes features; the defaults are config.py's, where each is explained."""

    sample_rate: int = config.SAMPLE_RATE  # Hz
    clip_seconds: float = config.CLIP_SECONDS  # s
    n_fft: int = config.N_FFT  # samples
    hop_length: int = config.HOP_LENGTH  # samples
    n_mels: int = config.N_MELS
    fine_frames: int = config.FINE_FRAMES  # of each frame
    fine_n_fft: int = config.FINE_N_FFT  # samples
    fine_n_mels: int = config.FINE_N_MELS
    f_min: float = config.F_MIN  # Hz
    f_max: float = config.F_MAX  # Hz
    top_db: float = config.TOP_DB  # dB
    short_clips: str = config.SHORT_CLIPS
    feature_dtype: str = config.FEATURE_DTYPE

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, what = getattr(self, field.name), f"the audio setting {field.name}"
            if field.type is str:
                if value not in SETTING_CHOICES[field.name]:
                    raise UserError(f"{what} is {value!r}: it must be one of {', '.join(SETTING_CHOICES[field.name])}")
                continue
            least, most = SETTING_LIMITS[field.name]
            if not isinstance(value, (int, field.type)) or not least <= value <= most:
                kind = "whole number" if field.type is int else "number"
                raise UserError(f"{what} is {value!r}: it must be a {kind} from {least} to {most}")
        for name in ("n_fft", "fine_n_fft"):
            if getattr(self, name) % 2:
                raise UserError(f"the audio setting {name} is {getattr(self, name)}: it must be even")
        if self.hop_length % self.fine_frames:
            raise UserError(
                f"the audio setting hop_length is {self.hop_length}: it must be a multiple of fine_frames, "
                f"{self.fine_frames}"
            )
        if self.f_min >= self.f_max:
            raise UserError(f"the audio setting f_min is {self.f_min} and f_max {self.f_max}: f_max must be higher")
        for frames, n_fft in ((self.n_frames, self.n_fft), (self.n_frames * self.fine_frames, self.fine_n_fft)):
            if frames * n_fft > MOST_FFT_SAMPLES:
                raise UserError(f"the audio settings make {frames} frames of {n_fft} samples: raise hop_length")

    @property
    def clip_samples(self):
        """Samples in one clip: 88,200 for 4 s at 22,050 Hz."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def n_frames(self):
        """Frames in one clip: 173 for 88,200 samples and a hop of 512."""
        return 1 + self.clip_samples // self.hop_length

    @property
    def blocks(self):
        """Mel bands of each block of a clip's rows: of the log-mel, then of each of a frame's fine frames."""
        return [self.n_mels] + [self.fine_n_mels] * self.fine_frames

    @property
    def shape(self):
        """(rows, frames) of one clip's features; front_end.py's `clip_features` says what the rows are."""
        return sum(self.blocks), self.n_frames

    @functools.cached_property
    def fine(self):
        """The settings of the fine log-mel by itself."""
        hop_length = self.hop_length // self.fine_frames
        changes = {"n_fft": self.fine_n_fft, "hop_length": hop_length, "n_mels": self.fine_n_mels, "fine_frames": 1}
        return dataclasses.replace(self, **changes)


# --- Recording to samples ----------------------------------------------------------------------------------------

LONGEST_HOURS = 4  # h; a longer recording is refused before memory is taken for the whole of it
LOUDEST = 1e12  # full scale is 1; beyond it the power of a frame leaves float32's range
BLOCK_SAMPLES = 1 << 18  # a channel's samples decoded at a time: 6 s at 44.1 kHz
LEAST_TAIL = 0.1  # of a hop; so little sound after the last full window gets no window of its own


def read_audio(path, sample_rate):
    """Return a recording as mono float32 samples, shape (n,), resampled to `sample_rate` Hz.

    Channels are averaged. UserError names a file that is missing, not audio, empty, longer than LONGEST_HOURS, or has
    samples that are not finite numbers.
    """
    try:
        with open_audio(path, LONGEST_HOURS) as (file_rate, blocks):
            blocks = list(blocks)
            samples = blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.float32), *blocks])
    except MemoryError as error:
        raise UserError(f"{path} is larger than the memory that is free: cut it") from error
    if samples.size == 0:
        raise UserError(f"{path} holds no audio samples")
    if file_rate != sample_rate:
        samples = soxr.resample(samples, file_rate, sample_rate, quality="HQ")  # librosa.load's own default
    if samples.size == 0:
        raise UserError(f"{path} is too short: no sample is left at {sample_rate} Hz")
    return samples


def stream_audio(path, sample_rate):
    """Yield the samples of `read_audio` in blocks, shape (n,) each, of a recording of any length, in bounded memory.

    A recording of one block has the same samples to the bit, a longer one to rounding. UserErrors as there.
    """
    with open_audio(path) as (file_rate, blocks):
        first, second = next(blocks, None), next(blocks, None)
        if second is None:
            resampled = [] if first is None else [soxr.resample(first, file_rate, sample_rate, quality="HQ")]
        else:
            resampled = resample_blocks(itertools.chain([first, second], blocks), file_rate, sample_rate)
        is_empty = True
        for block in resampled:
            is_empty = is_empty and not block.size
            yield block
    if is_empty:
        reason = "holds no audio samples" if first is None else f"is too short: no sample is left at {sample_rate} Hz"
        raise UserError(f"{path} {reason}")


def resample_blocks(blocks, file_rate, sample_rate):
    """Yield blocks of a recording, (n,) each, at another sampling rate; both in Hz."""
    stream = soxr.ResampleStream(file_rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


@contextlib.contextmanager
def open_audio(path, most_hours=None):
    """Open a recording as (sampling rate in Hz, iterator over its mono samples: blocks of (n,) float32, checked).

    most_hours: refuse what is longer. UserError names what can't be decoded, before or while it is read.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an audio file: name one file in it")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(soundfile.SoundFile(path))
            rate, blocks = file.samplerate, soundfile_blocks(file)
            if most_hours and file.frames > most_hours * 3600 * rate:
                raise UserError(f"{path} has {file.frames} samples at {rate} Hz, over {most_hours} h: cut it")
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:  # TypeError: a name that ends in .raw
            rate, blocks = stack.enter_context(open_with_ffmpeg(path, error))
        yield rate, checked(blocks, path, most_hours and most_hours * 3600 * rate)  # a header may lie


def duration(path):
    """Return a recording's length in s as its header has it, None where only decoding would tell."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, TypeError, ValueError):
        return None
    return info.duration if 0 < info.frames < 1e12 else None


def soundfile_blocks(file):
    """Yield blocks of samples, (n, channels), int16 or float32, from an open SoundFile."""
    # 16-bit samples are read as such: turning them to float32 here takes a fifth of libsndfile's time for it.
    kind = "int16" if file.subtype == "PCM_16" else "float32"
    while len(block := file.read(BLOCK_SAMPLES, dtype=kind, always_2d=True)):
        yield block


@contextlib.contextmanager
def open_with_ffmpeg(path, soundfile_error):
    """Open a file that soundfile can't read as (rate in Hz, blocks of samples (n, channels) int16), through a pipe.

    UserError with soundfile's own reason if there is no ffmpeg, or if it can't decode the file either.
    """
    reason = str(getattr(soundfile_error, "error_string", soundfile_error)).strip(" .")
    refused = f"{path} can't be decoded as audio ({reason}): convert it to WAV"
    if not shutil.which("ffmpeg"):
        raise UserError(f"{refused}, or install ffmpeg for more formats") from soundfile_error
    command = ["ffmpeg", "-nostdin", "-v", "quiet", "-i", f"file:{path}", "-vn", "-c:a", "pcm_s16be", "-f", "au", "-"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            header = process.stdout.read(24)  # of Sun's AU format: big-endian, and it needs no length
            if len(header) < 24:
                raise UserError(f"{refused} (ffmpeg can't read it either)") from soundfile_error
            _, samples_at, _, _, rate, channels = struct.unpack(">6I", header)
            process.stdout.read(samples_at - 24)
            yield rate, ffmpeg_blocks(process, channels)
        finally:
            process.kill()


def ffmpeg_blocks(process, channels):
    """Yield blocks of samples, (n, channels) int16, from a running ffmpeg."""
    frame_bytes = 2 * channels
    while part := process.stdout.read(BLOCK_SAMPLES * frame_bytes):
        whole = len(part) // frame_bytes * frame_bytes
        yield np.frombuffer(part[:whole], ">i2").astype(np.int16).reshape(-1, channels)
    if process.wait():
        raise OSError(f"ffmpeg ended with status {process.returncode}")


def checked(blocks, path, most_samples):
    """Yield blocks (n, channels) as mono float32, (n,). UserError for too many, or for samples that are no sound."""
    total = 0
    while True:
        try:
            block = next(blocks, None)
        except Exception as error:  # a damaged file, in the words of whichever decoder met it
            reason = str(getattr(error, "error_string", error)).strip(" .")
            raise UserError(f"{path} can't be decoded as audio to its end ({reason}): export it again") from error
        if block is None:
            return
        total += len(block)
        if most_samples and total > most_samples:
            raise UserError(f"{path} is longer than {LONGEST_HOURS} h: cut it")
        block = to_mono(block)
        if not np.abs(block).max() <= LOUDEST:  # nor is NaN
            raise UserError(
                f"{path} has samples that are no sound (NaN, infinity or beyond {LOUDEST:g}): export it again"
            )
        yield block


def to_mono(samples):
    """Return the mean over channels, (n,) float32 with full scale 1, of samples (n, channels), int16 or float32."""
    share = 1 / samples.shape[1] / (32_768 if samples.dtype == np.int16 else 1)
    weights = np.full(samples.shape[1], share, np.float32)
    with np.errstate(all="ignore"):  # NaN is looked for by who reads
        return samples.astype(np.float32, copy=False) @ weights  # a product: 6 times as fast as mean()


def windows(blocks, length, hop):
    """Yield (place of the first sample, samples) of overlapping windows of a recording.

    blocks: iterable of mono samples of any lengths; length, hop: samples of a window and from one to the next, hop at
    most length. A recording up to `length` is one window, as short as it is. The last window ends with the recording,
    so that every sound is in one, but for a tail under LEAST_TAIL of a hop.
    """
    held, first, following = np.zeros(0, np.float32), 0, 0  # samples; place of the first of them, and of the window due
    for block in blocks:
        held = np.concatenate([held, block])
        while following + length <= first + len(held):
            yield following, held[following - first :][:length]
            following += hop
        drop = max(following - hop - first, 0)  # the window before stays, for the end
        held, first = held[drop:], first + drop
    if following == 0:
        yield 0, held
    elif first + len(held) - (following - hop + length) > LEAST_TAIL * hop:
        yield first + len(held) - length, held[-length:]


# --- Samples to log-mel ------------------------------------------------------------------------------------------

GROUP_BANDS = 8  # mel bands of one matrix product
# Multiplications in one such product. OpenBLAS shares those of over 2**18 among its threads, and where it cuts them
# decides the last bit: training and prediction would differ by the threads that each has.
PRODUCT_SIZE = 2**17


def fit_clip(samples, audio):
    """Return `samples` cut or lengthened to one clip, shape (audio.clip_samples,)."""
    if len(samples) >= audio.clip_samples:
        return samples[: audio.clip_samples]
    if audio.short_clips == "silence":
        return np.pad(samples, (0, audio.clip_samples - len(samples)))
    return np.resize(samples, audio.clip_samples)  # repeats from the start


def hz_to_mel(frequency):
    """Slaney's mel scale: linear to 1 kHz (3 mel per 200 Hz), then logarithmic (27 steps for a factor of 6.4).

    M. Slaney, "Auditory Toolbox: Version 2", Interval Research, 1998; librosa's default.
    """
    frequency = np.asarray(frequency, np.float64)
    return np.where(
        frequency < 1000, frequency * 3 / 200, 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / np.log(6.4)
    )


def mel_to_hz(mel):
    """The inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


@functools.lru_cache
def mel_filters(audio):
    """Return the triangular mel filters, shape (1 + n_fft // 2, n_mels) float32, each of unit area over Hz."""
    fft_frequencies = np.fft.rfftfreq(audio.n_fft, 1 / audio.sample_rate)  # (1 + n_fft // 2,) Hz
    mels = np.linspace(hz_to_mel(audio.f_min), hz_to_mel(audio.f_max), audio.n_mels + 2)
    lower, centre, upper = (mel_to_hz(mels)[k : k + audio.n_mels] for k in range(3))  # (n_mels,) Hz each
    rising = (fft_frequencies[:, None] - lower) / (centre - lower)
    falling = (upper - fft_frequencies[:, None]) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))  # (1 + n_fft // 2, n_mels)
    return (triangles * 2 / (upper - lower)).astype(np.float32)


@functools.lru_cache
def mel_groups(audio):
    """Return the mel filters as [(slice of the spectrum's numbers, slice of the mel bands, matrix)], GROUP_BANDS each.

    A band needs few of the frequencies, so that narrow products take a quarter of the time of the whole one. Real and
    imaginary parts each have a row: squares of both, side by side as rfft gives them, add up to power in the product.
    """
    filters = mel_filters(audio)
    groups = []
    for first in range(0, audio.n_mels, GROUP_BANDS):
        bands = slice(first, min(first + GROUP_BANDS, audio.n_mels))
        used = np.flatnonzero(filters[:, bands].any(axis=1))
        low, high = (used[0], used[-1] + 1) if len(used) else (0, 1)  # bands narrower than one FFT bin may be empty
        groups.append((slice(2 * low, 2 * high), bands, np.repeat(filters[low:high, bands], 2, axis=0)))
    return groups


@functools.lru_cache
def hann_window(length):
    """Return the periodic Hann window, shape (length,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def spectrum(samples, audio):
    """Return the spectrum of each frame, centred on zero padding: (1 + n // hop_length, 1 + n_fft // 2) complex64."""
    padded = np.pad(samples, audio.n_fft // 2)  # (n + n_fft,)
    frames = np.lib.stride_tricks.sliding_window_view(padded, audio.n_fft)[:: audio.hop_length]  # (frames, n_fft)
    return rfft(frames * hann_window(audio.n_fft), axis=1)


def log_mel(samples, audio):
    """Return the log-mel spectrogram of mono samples in dB, shape (n_mels, 1 + n // hop_length) float32.

    Equals librosa's `power_to_db(melspectrogram(...))` with its defaults (frames centred on zero padding, power 2,
    reference 1, floor 1e-10) to within rounding.
    """
    squares = spectrum(samples, audio).view(np.float32)  # (frames, 2 + n_fft): real, imaginary, real, ...
    squares *= squares
    mel = np.empty((len(squares), audio.n_mels), np.float32)  # (frames, n_mels)
    for numbers, bands, filters in mel_groups(audio):
        step = max(PRODUCT_SIZE // filters.size, 1)  # frames
        for first in range(0, len(squares), step):
            mel[first : first + step, bands] = squares[first : first + step, numbers] @ filters
    decibels = 10 * np.log10(np.maximum(mel, 1e-10))
    return np.maximum(decibels, decibels.max() - audio.top_db).T


def fine_log_mel(samples, audio):
    """Return the log-mel spectrogram in fine frames, (fine_n_mels, fine_frames for each frame of `log_mel`), in dB."""
    n_frames = audio.fine_frames * (1 + len(samples) // audio.hop_length)
    needed = (n_frames - 1) * audio.fine.hop_length  # samples, for as many frames
    return log_mel(np.pad(samples, (0, max(needed - len(samples), 0))), audio.fine)[:, :n_frames]


def clip_features(samples, audio):
    """Return the features of one clip as they are stored and trained on, shape (rows, n_frames), in dB.

    The rows are the n_mels bands of the log-mel, then the fine_n_mels bands of the first fine frame of each frame, then
    those of the next: so all that sounds at one time stands in one column. `unfold` (model.py) joins the fine frames.
    """
    samples = fit_clip(samples, audio)
    fine = fine_log_mel(samples, audio)  # (fine_n_mels, fine_frames x n_frames)
    fine = [fine[:, first :: audio.fine_frames] for first in range(audio.fine_frames)]
    return np.concatenate([log_mel(samples, audio), *fine]).astype(audio.feature_dtype)
