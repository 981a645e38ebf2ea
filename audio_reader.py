"""Recordings of any kind as mono samples at one rate: whole (`read_audio`) or streamed in bounded memory.

soundfile decodes what libsndfile knows; the rest, such as M4A and the sound of videos, ffmpeg where it is installed.
"""

import contextlib
import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr

from utils import UserError

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
