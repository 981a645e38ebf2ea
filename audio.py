"""From a recording to its log-mel spectrogram: one front-end for training and prediction.

    samples = read_audio("street.mp3", audio.sample_rate)   # mono; `stream_audio` for recordings of any length
    features = clip_features(samples, audio)                # (n_mels, n_frames) in dB

`audio` is an AudioSettings: the settings of config.py as one value, which is stored with features and models.
soundfile decodes what libsndfile knows; ffmpeg, where it is installed, the rest, such as M4A and the sound of videos.
Nothing here imports torch or pandas: the preprocessing workers do not wait for them.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.fft import rfft
from scipy.sparse import csr_array

import config
from utils import UserError, one_line

# --- Settings ----------------------------------------------------------------------------------------------------

SETTING_LIMITS = {  # min and max that make sense; features and models from untrusted people have settings, too
    "sample_rate": (100, 768_000),
    "clip_seconds": (0.001, 600),
    "n_fft": (2, 32_768),
    "hop_length": (1, 32_768),
    "n_mels": (1, 1024),
    "f_min": (0, 384_000),
    "f_max": (1, 384_000),
    "top_db": (0, 1000),
}
SETTING_CHOICES = {"short_clips": ("repeat", "silence"), "feature_dtype": ("float16", "float32")}
MAX_CLIP_SAMPLES = 2**25  # 760 s at 44.1 kHz, 134 MB
MAX_FFT_SAMPLES = 2**27  # frames x n_fft of one clip
MAX_FEATURES = 2**21  # mel bands x frames of one clip: 380 s by default; the network takes 400 bytes for each


@dataclasses.dataclass(frozen=True)
class AudioSettings:
    """How audio becomes features. config.py has the defaults and explains each; UserError for what can't be."""

    sample_rate: int = config.SAMPLE_RATE  # Hz
    clip_seconds: float = config.CLIP_SECONDS  # s
    n_fft: int = config.N_FFT  # samples
    hop_length: int = config.HOP_LENGTH  # samples
    n_mels: int = config.N_MELS
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
            low, high = SETTING_LIMITS[field.name]
            if not isinstance(value, (int, field.type)) or not low <= value <= high:
                kind = "whole number" if field.type is int else "number"
                raise UserError(f"{what} is {value!r}: it must be a {kind} from {low} to {high}")
        if self.n_fft % 2:
            raise UserError(f"the audio setting n_fft is {self.n_fft}: it must be even")
        if self.f_min >= self.f_max:
            raise UserError(f"the audio setting f_min is {self.f_min} and f_max {self.f_max}: f_max must be higher")
        if self.n_frames * self.n_fft > MAX_FFT_SAMPLES:
            raise UserError(f"the audio settings make {self.n_frames} frames of {self.n_fft} samples: raise hop_length")
        if self.n_frames * self.n_mels > MAX_FEATURES:
            raise UserError(f"the audio settings make {self.n_frames} frames of {self.n_mels} bands: raise hop_length")
        if self.clip_samples > MAX_CLIP_SAMPLES:
            raise UserError(f"the audio settings make clips of {self.clip_samples} samples: lower clip_seconds")

    @property
    def clip_samples(self):
        """Samples in one clip: 88,200 for 4 s at 22,050 Hz."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def n_frames(self):
        """Frames in one clip: 173 for 88,200 samples and a hop of 512."""
        return 1 + self.clip_samples // self.hop_length

    @property
    def shape(self):
        """(n_mels, n_frames) of one clip's features."""
        return self.n_mels, self.n_frames


# --- Recording to samples ----------------------------------------------------------------------------------------

AUDIO_SUFFIXES = {  # of the recordings that are looked for in a folder; a file that is named may be called anything
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"),  # soundfile's
    *(".m4a", ".aac", ".wma", ".amr", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp"),  # ffmpeg's
}
UNKNOWN_LENGTH = sys.maxsize  # samples; libsndfile's answer where a header has none
MAX_HOURS = 4  # h; a longer recording is refused before memory is taken for the whole of it
MIN_RATE, MAX_RATE = 1000, 1_000_000  # Hz of a recording
MAX_CHANNELS = 64
MAX_LEVEL = 1e12  # full scale is 1; beyond MAX_LEVEL the power of a frame leaves float32's range
OPPOSITE = 0.1  # variance of the channels' sum in shares of that of independent ones; wide stereo has over half of it
BLOCK_SAMPLES = 1 << 18  # samples of each channel that are decoded at a time: 6 s at 44.1 kHz
BLOCK_BYTES = 1 << 20  # of a file that are searched at a time
OGG_PAGE = 65_307  # bytes of the largest
TAIL_BYTES = 1 << 13  # that a file may have behind its sound (titles)
MAX_RIFF = 0x7FFF0000  # bytes; headers of files that were written to a pipe name this or more
LENGTHS = {  # first bytes of a file: byte order, position and bytes of the length, bytes before what that counts
    b"RIFF": ("little", 4, 4, 8),
    b"RF64": ("little", 20, 8, 8),
    b"riff": ("little", 16, 8, 0),  # W64
    b"FORM": ("big", 4, 4, 8),
    b".snd": ("big", 8, 4, None),  # AU, whose header names where the sound begins
}
BEGINNINGS = {  # first bytes of a file: what comes once in it, whatever it holds, and by chance never
    b"caff": rb"caff\0\x01\0\0desc",
    b"FLV\1": rb"FLV\x01[\x01\x04\x05]\0\0\0\x09\0\0\0\0",
    b"0&\xb2u": rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel",  # WMA
    # WavPack, a block: its bytes, version, highest bytes, samples in the file, index 0, samples, flags with "initial"
    b"wvpk": rb"wvpk.{4}[\x02-\x10]\x04.{6}\0{4}(?!\0{4}).{5}[%s]" % re.escape(bytes(n for n in range(256) if n & 8)),
}
BEGINNING_BYTES = 32  # of the longest
MAX_BOXES = 100_000  # of an MP4 that are looked at
CUT = 0.9  # of the length that is named or that is guessed by a file's size; what is shorter seems to be cut off
SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
SAMPLE_BYTES |= dict.fromkeys(("PCM_S8", "PCM_U8", "ULAW", "ALAW"), 1)
SIZED = {"WAV", "WAVEX", "RF64", "AIFF", "AU", "CAF"}  # formats whose header has the length
EXACT_END = {*SAMPLE_BYTES, "IMA_ADPCM", "MS_ADPCM"}  # what libsndfile reads to the last byte
FFMPEG_SECONDS = 60  # s without a sample after which ffmpeg has failed
FFMPEG_LENGTH = re.compile(rb"^  Duration: (\d+):(\d+):(\d+)")  # h, min, s; a title is further in
FFMPEG_CUT = re.compile(  # titles are in lines with blanks in front, and the file's name is in that of the input
    rb"^(?! |Input #).*(ended prematurely|partial file|[Pp]acket corrupt|corrupt input packet)"
)
MAX_LINES = 100  # of ffmpeg that are kept
FFMPEG_INPUTS = "aac,aiff,amr,ape,asf,au,avi,caf,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav,wv"
MIN_TAIL = 0.1  # of a hop; less sound than this after the last full window gets no window of its own


def find_audio_files(folder):
    """Return the recordings in a folder and all folders below, by name. ._a.wav, which macOS keeps beside, is none."""
    return sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())


def read_audio(path, sample_rate):
    """Return a recording as mono float32 samples, shape (n,), resampled to `sample_rate` Hz.

    Channels are averaged; of those that cancel each other, the loudest is taken. UserError names a file that is
    missing, not audio, empty, longer than MAX_HOURS, or has samples that are not finite numbers.
    """
    try:
        return np.concatenate(list(stream_audio(path, sample_rate, MAX_HOURS)))
    except MemoryError as error:
        raise UserError(f"{path} is larger than the memory that is free: cut it") from error


def stream_audio(path, sample_rate, max_hours=None):
    """Yield the samples of `read_audio` in blocks, (n,) each, of a recording of any length, in bounded memory.

    max_hours: refuse what is longer. UserErrors as there, when the recording is opened or while it is read.
    """
    with open_audio(path, max_hours) as (file_rate, blocks):
        first, second = next(blocks, None), next(blocks, None)
        if first is None:
            raise UserError(f"{path} holds no audio samples: record or export it again")
        if second is None:  # most clips: the same samples in half the time
            resampled = [soxr.resample(first, file_rate, sample_rate)] if file_rate != sample_rate else [first]
        else:
            resampled = resample_blocks(itertools.chain([first, second], blocks), file_rate, sample_rate)
        is_empty = True
        for block in resampled:
            is_empty = is_empty and not block.size
            yield block
        if is_empty:
            raise UserError(f"{path} is too short: no sample is left at {sample_rate} Hz")


def resample_blocks(blocks, file_rate, sample_rate):
    """Yield blocks of a recording, (n,) each, at another sampling rate; both rates in Hz."""
    stream = soxr.ResampleStream(file_rate, sample_rate, 1, dtype="float32")  # HQ, librosa's default too
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


@contextlib.contextmanager
def open_audio(path, max_hours=None):
    """Open a recording as (sampling rate in Hz, iterator over its mono samples: blocks of (n,) float32, checked).

    max_hours: refuse what is longer. UserError names what can't be decoded, before or while it is read.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise UserError(f"{path} is a folder, not an audio file: name one file in it")
            if not stat.S_ISREG(mode):
                raise UserError(f"{path} is no regular file: cat {path} | python predict.py -")
            descriptor = stack.enter_context(open(path, "rb", buffering=0)).fileno()
        except FileNotFoundError as error:
            raise UserError(f"no such file: {path}") from error
        except OSError as error:
            raise UserError(f"can't read {path} ({error.strerror}): check its path and permissions") from error
        check_length(path, descriptor)
        try:
            file = stack.enter_context(soundfile.SoundFile(descriptor, closefd=False))
        except (soundfile.LibsndfileError, ValueError) as error:
            rate, channels, blocks = stack.enter_context(open_with_ffmpeg(path, reason_of(error)))
        else:
            rate, channels, blocks = file.samplerate, file.channels, soundfile_blocks(path, file, descriptor)
            if max_hours and max_hours * 3600 * rate < file.frames < UNKNOWN_LENGTH:
                raise UserError(f"{path} has {file.frames} samples at {rate} Hz, over {max_hours} h: cut it")
        check_rate(path, rate, channels)
        yield rate, checked(blocks, path, max_hours and max_hours * 3600 * rate)  # a header may lie


def duration(path):
    """Return a recording's length in s as its header has it, None where only decoding would tell."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, TypeError, ValueError):
        return None
    return info.duration if 0 < info.frames < UNKNOWN_LENGTH else None


def soundfile_blocks(path, file, descriptor):
    """Yield blocks of samples, (n, channels), int16 or float32, from an open SoundFile, to the end of the sound.

    How many samples there are, libsndfile takes from the header, or guesses: of an MP3 without a table of contents, of
    files put together with `cat`, and of a WAV beyond 4 GB or of a recorder that was switched off, it reads a part.
    descriptor: of the same file, which shows how far it has read.
    """
    # 16-bit samples are read as such: libsndfile takes five times as long to turn them into float32.
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    file.seekable = lambda: False  # else soundfile seeks after each block, which fails in a FLAC of unknown length
    first_byte, n_read = os.lseek(descriptor, 0, os.SEEK_CUR), 0
    while len(block := file.read(BLOCK_SAMPLES, dtype=dtype, always_2d=True)):
        n_read += len(block)
        yield block
    if file.format == "OGG" and lacks_end(descriptor):
        print_cut(path, "its last page is not marked as the last")
    if file.format == "MP3" and n_read < CUT * file.frames < CUT * UNKNOWN_LENGTH:
        print_cut(path, f"it ends after {n_read / file.samplerate:.1f} of {file.frames / file.samplerate:.1f} s")
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    if file.subtype in SAMPLE_BYTES:  # libsndfile may have read on, and have dropped what it read
        end = first_byte + n_read * file.channels * SAMPLE_BYTES[file.subtype]
    if os.pread(descriptor, 4, 0) == b"RIFF" and file.subtype in SAMPLE_BYTES:
        yield from headerless_blocks(file, descriptor, end)
    elif file.format in SIZED and file.subtype in EXACT_END and has_more(file, descriptor, end):
        if not n_read:
            raise UserError(f"{path} says that it holds no audio samples, and more follows: export it again")
        print_cut(path, f"its header has {n_read / file.samplerate:.1f} s, and more follows")
    elif file.format in ("MP3", "OGG", "FLAC") and has_more(file, descriptor, end):
        reason = f"it goes on after the {n_read / file.samplerate:.1f} s that can be read"
        with open_with_ffmpeg(path, reason, file.samplerate) as (_, _, blocks):  # it takes Opus to be of 48 kHz
            for block in blocks:
                if len(block) > n_read:
                    yield block[n_read:]
                n_read = max(n_read - len(block), 0)


def check_rate(name, rate, channels):
    """Raise a UserError if a recording's rate in Hz or number of channels is none that is read."""
    if not MIN_RATE <= rate <= MAX_RATE or not 1 <= channels <= MAX_CHANNELS:
        raise UserError(
            f"{name} says {rate} Hz and {channels} channels: {MIN_RATE} to {MAX_RATE} Hz and up to {MAX_CHANNELS} "
            "channels are read. Convert it to WAV"
        )


def check_length(path, descriptor):
    """Compare a file's size with the length in its header, of LENGTHS.

    UserError for two files joined by cat; a note if it is cut off.
    """
    name = os.pread(descriptor, 4, 0)
    if has_second_beginning(descriptor, name) or (
        os.pread(descriptor, 4, 4) == b"ftyp" and has_second_movie(descriptor)
    ):
        raise UserError(f"{path} is two files, one behind the other: cut it in two, or join them as audio")
    if name not in LENGTHS or os.pread(descriptor, 4, 8) == b"AVI ":  # a video beyond 1 GB goes on like two files
        return
    order, position, size, before = LENGTHS[name]
    length = int.from_bytes(os.pread(descriptor, size, position), order)
    before = int.from_bytes(os.pread(descriptor, 4, 4), order) if before is None else before
    end = before + length
    lacking = end - os.fstat(descriptor).st_size
    if end and lacking < 0 and os.pread(descriptor, 4, end) == name:  # the first alone would be read
        raise UserError(f"{path} is two files, one behind the other: cut it in two, or join them as audio")
    if lacking > 1 and length < MAX_RIFF:
        print_cut(path, f"its header names {lacking} bytes more than there are")


def has_second_beginning(descriptor, name):
    """Return whether what begins a file, of BEGINNINGS, comes again in it: two files joined by cat."""
    beginning, size = BEGINNINGS.get(name), os.fstat(descriptor).st_size
    starts = range(1, size, BLOCK_BYTES) if beginning else ()
    return any(
        re.search(beginning, os.pread(descriptor, BLOCK_BYTES + BEGINNING_BYTES, start), re.DOTALL) for start in starts
    )


def has_second_movie(descriptor):
    """Return whether a second `ftyp` is among the boxes of an MP4: two files joined by cat."""
    position, size = 0, os.fstat(descriptor).st_size
    for _ in range(MAX_BOXES):
        length, name, long = struct.unpack(">I4sQ", os.pread(descriptor, 16, position).ljust(16, b"\0"))
        if position and name == b"ftyp":
            return True
        position += long if length == 1 else length
        if length == 0 or position >= size:  # 0: to the end of the file
            return False
    return False


def print_cut(path, reason):
    print(f"note: {one_line(path, longest=1000)} seems to be cut off: {reason}", file=sys.stderr)


def has_more(file, descriptor, end):
    """Return whether a file goes on behind its sound: in Ogg any page does, else more than titles take, in no chunk."""
    rest = os.pread(descriptor, TAIL_BYTES + 1, end)
    if file.format in SIZED and (
        is_chunk(descriptor, end) or is_chunk(descriptor, end + 1)
    ):  # behind a byte of padding
        return False
    return len(rest) > TAIL_BYTES or (file.format == "OGG" and b"OggS" in rest)


def is_chunk(descriptor, start):
    """Return whether a further chunk of a WAV, AIFF or CAF file begins at a byte: a name, and a length that fits."""
    name, length = os.pread(descriptor, 4, start), os.pread(descriptor, 4, start + 4)
    lengths = int.from_bytes(length, "little"), int.from_bytes(length, "big")
    return name.isascii() and name.decode().isprintable() and start + min(lengths) <= os.fstat(descriptor).st_size


def lacks_end(descriptor):
    """Return whether the last page of an Ogg file is not marked as the end of its sound (RFC 3533)."""
    end = os.pread(descriptor, OGG_PAGE, max(os.fstat(descriptor).st_size - OGG_PAGE, 0))
    page = end.rfind(b"OggS")
    return page >= 0 and not int.from_bytes(end[page + 5 : page + 6]) & 4


def headerless_blocks(file, descriptor, start):
    """Yield the samples of a WAV from a byte on, behind those that its header has: all that is no further chunk."""
    frame_bytes, size = file.channels * SAMPLE_BYTES[file.subtype], os.fstat(descriptor).st_size
    if is_chunk(descriptor, start + start % 2):
        return
    settings = {"samplerate": file.samplerate, "channels": file.channels, "subtype": file.subtype, "format": "RAW"}
    for position in range(start, size - frame_bytes + 1, BLOCK_SAMPLES * frame_bytes):
        part = io.BytesIO(os.pread(descriptor, BLOCK_SAMPLES * frame_bytes, position))
        yield soundfile.read(part, dtype="float32", always_2d=True, endian="LITTLE", **settings)[0]


@contextlib.contextmanager
def open_with_ffmpeg(path, reason, rate=None):
    """Open a file that soundfile can't read as (rate in Hz, channels, blocks of samples (n, channels) int16).

    rate: in Hz, instead of the file's own.
    UserError with soundfile's own reason if there is no ffmpeg, or if it can't decode the file either.
    """
    refusal = f"{path} can't be decoded as audio ({reason}): convert it to WAV"
    if not shutil.which("ffmpeg"):
        raise UserError(f"{refusal}, or install ffmpeg for more formats")
    # Formats that name other files, such as playlists, are left out, and so is the network.
    command = ["ffmpeg", "-nostdin", "-nostats", "-protocol_whitelist", "file", "-format_whitelist", FFMPEG_INPUTS]
    command += [
        "-i",
        f"file:{path}",
        "-vn",
        "-c:a",
        "pcm_s16be",
        *(["-ar", str(rate)] if rate else []),
        "-f",
        "au",
        "-",
    ]
    pipe, said = subprocess.PIPE, []
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    except OSError as error:  # too many open files
        raise OSError(error.errno, error.strerror, str(path)) from error
    with process:
        listener = threading.Thread(target=keep_lines, args=(process.stderr, said))
        listener.start()
        try:
            header = read_or_fail(process, 24)  # of Sun's AU format: big-endian, and it needs no length
            if len(header) < 24:
                raise UserError(f"{refusal} (ffmpeg finds no sound in it either)")
            _, samples_at, _, _, rate, channels = struct.unpack(">6I", header)
            read_or_fail(process, samples_at - 24)
            yield rate, channels, ffmpeg_blocks(path, process, rate, channels, said)
        finally:
            process.kill()
            listener.join()


def keep_lines(stream, kept):
    """Append to `kept` the lines of ffmpeg that speak of a file's length or damage, as it prints them."""
    for line in stream:
        if len(kept) < MAX_LINES and (FFMPEG_LENGTH.search(line) or FFMPEG_CUT.search(line)):
            kept.append(line)


def ffmpeg_blocks(path, process, rate, channels, said):
    """Yield blocks of samples, (n, channels) int16, from a running ffmpeg, whose lines are in `said`."""
    sample_bytes, n_read = 2 * channels, 0
    while part := read_or_fail(process, BLOCK_SAMPLES * sample_bytes):
        whole = len(part) // sample_bytes * sample_bytes
        yield np.frombuffer(part[:whole], ">i2").astype(np.int16).reshape(-1, channels)
        n_read += len(part) // sample_bytes
    if process.wait():
        raise OSError(f"ffmpeg ended with status {process.returncode}")
    times = [match.groups() for line in said if (match := FFMPEG_LENGTH.search(line))]
    seconds = np.dot([3600, 60, 1], np.array(times[0], int)) if times else 0
    if n_read < CUT * seconds * rate:
        print_cut(path, f"it ends after {n_read / rate:.1f} of {seconds} s")
    elif any(map(FFMPEG_CUT.search, said)):
        print_cut(path, f"what ffmpeg finds after {n_read / rate:.1f} s is not whole")


def read_or_fail(process, size):
    """Return `size` bytes of a process's output, fewer at its end. A process without output for long is killed."""
    timer = threading.Timer(FFMPEG_SECONDS, process.kill)
    timer.start()
    try:
        return process.stdout.read(size)
    finally:
        timer.cancel()


def reason_of(error):
    """Return what a decoder says of a file."""
    return str(getattr(error, "error_string", error)).strip(" .")


def checked(blocks, path, max_samples):
    """Yield blocks (n, channels) as mono float32, (n,). UserError for too many, or for samples that are no sound."""
    total = 0
    while True:
        try:
            block = next(blocks, None)
        except UserError:
            raise
        except Exception as error:  # a damaged file, in the words of its decoder
            reason = reason_of(error)
            raise UserError(f"{path} can't be decoded as audio to its end ({reason}): export it again") from error
        if block is None:
            return
        total += len(block)
        if max_samples and total > max_samples:
            raise UserError(f"{path} is longer than {MAX_HOURS} h: cut it")
        block = to_mono(block)  # (n,)
        if not np.abs(block).max() <= MAX_LEVEL:  # which NaN is not
            raise UserError(
                f"{path} has samples that are no sound (NaN, infinity or beyond {MAX_LEVEL:g}): export it again"
            )
        yield block


def to_mono(samples):
    """Return the mean over channels, (n,) float32 with full scale 1, of samples (n, channels), int16 or float32.

    Where the channels cancel each other, as in a recording with one of them inverted, the loudest is taken.
    """
    n_channels = samples.shape[1]
    full_scale = 32_768 if samples.dtype == np.int16 else 1
    with np.errstate(all="ignore"):  # `checked` looks for NaN
        rows = samples.T.astype(np.float32, order="C")  # (n_channels, n): NumPy is slow along two columns
        mono = np.full(n_channels, 1 / n_channels / full_scale, np.float32) @ rows
        if n_channels > 1:
            rows -= rows.mean(axis=1, keepdims=True)  # an offset of the converter does not cancel
            covariance = rows @ rows.T  # (n_channels, n_channels)
            if covariance.sum() < OPPOSITE * covariance.trace():  # two alike: a correlation under -0.9
                mono = samples[:, covariance.diagonal().argmax()].astype(np.float32) / np.float32(full_scale)
    return mono


def windows(blocks, length, hop):
    """Yield (index of the first sample, samples) of overlapping windows of a recording.

    blocks: iterable of mono samples of any lengths; length, hop: samples of a window and from one to the next, hop at
    most length. A recording up to `length` is one window, as short as it is. The last window ends with the recording,
    so that every sound is in one, but for a tail under MIN_TAIL of a hop.
    """
    held, first, due = np.zeros(0, np.float32), 0, 0  # samples; index of the first of them, and of the next window's
    for block in blocks:
        held = np.concatenate([held, block])
        while due + length <= first + len(held):
            yield due, held[due - first :][:length]
            due += hop
        drop = max(due - hop - first, 0)  # the window before stays, for the end
        held, first = held[drop:], first + drop
    if due == 0:
        yield 0, held
    elif first + len(held) - (due - hop + length) > MIN_TAIL * hop:
        yield first + len(held) - length, held[-length:]


# --- Samples to log-mel ------------------------------------------------------------------------------------------


def clip_features(samples, audio):
    """Return the features of one clip as they are stored and trained on, shape (n_mels, n_frames), in dB.

    samples: (n,) mono at audio.sample_rate, of any length.
    """
    return log_mel(fit_clip(samples, audio), audio).astype(audio.feature_dtype)


def fit_clip(samples, audio):
    """Return `samples` cut or lengthened to one clip, shape (audio.clip_samples,)."""
    if len(samples) >= audio.clip_samples:
        return samples[: audio.clip_samples]
    if audio.short_clips == "silence":
        return np.pad(samples, (0, audio.clip_samples - len(samples)))
    return np.resize(samples, audio.clip_samples)  # repeats from the start


def log_mel(samples, audio):
    """Return the log-mel spectrogram of mono samples in dB, shape (n_mels, 1 + n // hop_length) float32.

    Equals librosa's `power_to_db(melspectrogram(...))` with its defaults (frames centred on zero padding, power 2,
    reference 1, floor 1e-10) to within rounding.
    """
    padded = np.pad(samples, audio.n_fft // 2)  # (n + n_fft,)
    frames = np.lib.stride_tricks.sliding_window_view(padded, audio.n_fft)[:: audio.hop_length].T  # (n_fft, frames)
    spectrum = rfft(frames * hann_window(audio.n_fft)[:, None], axis=0)  # (1 + n_fft // 2, frames) complex64
    power = spectrum.real**2 + spectrum.imag**2
    decibels = 10 * np.log10(np.maximum(mel_filters(audio) @ power, 1e-10))  # (n_mels, frames)
    return np.maximum(decibels, decibels.max() - audio.top_db)


@functools.lru_cache
def hann_window(length):
    """Return the periodic Hann window, shape (length,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


@functools.lru_cache
def mel_filters(audio):
    """Return the triangular mel filters, sparse (n_mels, 1 + n_fft // 2) float32, each of unit area over Hz.

    librosa.filters.mel gives the same, but takes a second to import. Sparse, because a band needs few frequencies; and
    unlike BLAS, a sparse product gives the same bits on any number of threads.
    """
    fft_frequencies = np.fft.rfftfreq(audio.n_fft, 1 / audio.sample_rate)  # (1 + n_fft // 2,) Hz
    edges = mel_to_hz(np.linspace(*hz_to_mel([audio.f_min, audio.f_max]), audio.n_mels + 2))[:, None]  # Hz
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]  # (n_mels, 1) Hz each
    rising = (fft_frequencies - lower) / (centre - lower)
    falling = (upper - fft_frequencies) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))  # (n_mels, 1 + n_fft // 2)
    return csr_array((triangles * 2 / (upper - lower)).astype(np.float32))


def hz_to_mel(frequency):
    """Slaney's mel scale: linear to 1 kHz (3 mel per 200 Hz), then logarithmic (27 steps for a factor of 6.4).

    M. Slaney, "Auditory Toolbox: Version 2", Interval Research, 1998; librosa's default.
    """
    frequency = np.asarray(frequency, np.float64)
    logarithmic = 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / np.log(6.4)
    return np.where(frequency < 1000, frequency * 3 / 200, logarithmic)


def mel_to_hz(mel):
    """The inverse of `hz_to_mel`."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))
