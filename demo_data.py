"""The miniature: a small synthetic data set in UrbanSound8K's exact layout, for the demo and the tests.

    python download_data.py --demo       # 300 clips, ten classes, ten folds

Ten sounds that a person recognises and a small network learns in a few epochs, each with its energy below 3.5 kHz so
that the 8 kHz files can be told apart too. The files have the formats of the real set: 8 to 96 kHz, mono and stereo,
8, 16, 24 and 32 bit, float, ADPCM, 0.05 to 4 s. The same call writes the same bytes every time on one machine (another
processor or library version may round the last bit differently).
"""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import utils
from utils import UserError

CLASS_NAMES = (
    "air_conditioner",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "gun_shot",
    "jackhammer",
    "siren",
    "street_music",
)
METADATA_COLUMNS = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
FIRST_FSID = 900_000  # above every Freesound id of the real set (its last is 209992): the two can't be confused

RATE = 16_000  # Hz; sounds are made at this rate, then resampled to the file's
SECONDS = 4.0  # s; longest clip
SHORT_EVERY = 7  # one clip in seven is shorter; prime to the clips in a fold, so that every class has some
SHORT_SECONDS = (1.3, 0.7, 2.9, 2.1, 3.4)
SHORT_EVENT_SECONDS = (0.05, 0.35, 0.1, 1.2, 0.6)  # horns, barks and shots are recognisable sooner
EVENT_CLASSES = (1, 3, 6)

# (sampling rate in Hz, channels, subtype). A prime number of them, so that no class keeps a format of its own.
FORMATS = (
    (44_100, 2, "PCM_16"),
    (48_000, 2, "PCM_16"),
    (96_000, 1, "PCM_24"),
    (22_050, 1, "PCM_16"),
    (44_100, 2, "PCM_24"),
    (8_000, 1, "PCM_U8"),
    (44_100, 2, "MS_ADPCM"),
    (44_100, 1, "PCM_16"),
    (48_000, 2, "FLOAT"),
    (11_025, 2, "PCM_16"),
    (44_100, 1, "PCM_32"),
    (24_000, 2, "PCM_16"),
    (96_000, 2, "PCM_16"),
    (16_000, 1, "FLOAT"),
    (22_050, 2, "IMA_ADPCM"),
    (32_000, 2, "PCM_16"),
    (48_000, 1, "PCM_24"),
    (8_000, 2, "PCM_16"),
    (44_100, 2, "PCM_16"),
)

# --- Sounds: each takes a random generator and returns SECONDS of mono samples at RATE, peak of any size -----------

N = int(SECONDS * RATE)
TIME = np.arange(N) / RATE  # s


def tone(hertz, harmonics=(1.0,)):
    """Return a tone of constant or moving pitch (Hz, number or array (n,)), harmonics 1, 2, ... at these levels."""
    phase = 2 * np.pi * (TIME * hertz if np.isscalar(hertz) else np.cumsum(hertz) / RATE)
    return sum(level * np.sin(k * phase) for k, level in enumerate(harmonics, start=1))


def band_noise(rng, low, high, n=N):
    """Return noise between two frequencies (Hz), with gentle edges, of unit power."""
    frequency = np.fft.rfftfreq(n, 1 / RATE).clip(1)
    gain = 1 / (1 + (low / frequency) ** 4) / (1 + (frequency / high) ** 4)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * gain, n)
    return noise / noise.std()


def add_at(samples, event, seconds):
    """Add a short event to samples, in place, from a moment on; what lies beyond the end is cut."""
    start = int(seconds * RATE)
    part = event[: max(len(samples) - start, 0)]
    samples[start : start + len(part)] += part


def air_conditioner(rng):
    """A steady rush of air over a faint mains hum."""
    hum = tone(rng.choice([100.0, 120.0]), (1.0, 0.5, 0.3))
    return band_noise(rng, 200, rng.uniform(500, 700)) + 0.15 * hum


def car_horn(rng):
    """Blasts of two rich tones, a third apart."""
    pitch = rng.uniform(380, 450)
    levels = [1, 0.9, 0.8, 0.7, 0.6, 0.4]
    blast, gap = rng.uniform(0.5, 1.5), rng.uniform(0.1, 0.3)  # s
    on = (TIME % (blast + gap)) < blast
    return (tone(pitch, levels) + tone(pitch * 1.26, levels)) * on


def children_playing(rng):
    """Many high voices calling at once, each gliding up and down."""
    samples = 0.1 * band_noise(rng, 900, 3000)
    for when in np.arange(0, SECONDS, 0.11):
        n = int(rng.uniform(0.15, 0.4) * RATE)
        glide = 1 + rng.uniform(-0.3, 0.3) * np.sin(np.linspace(0, np.pi, n))
        phase = 2 * np.pi * np.cumsum(rng.uniform(900, 1700) * glide) / RATE
        call = (np.sin(phase) + 0.7 * np.sin(2 * phase)) * np.hanning(n)
        add_at(samples, rng.uniform(0.4, 1.0) * call, max(when + rng.uniform(-0.05, 0.05), 0))
    return samples


def dog_bark(rng):
    """Barks that fall in pitch, silence between."""
    samples = np.zeros(N)
    n = int(0.3 * RATE)
    time = np.arange(n) / RATE
    top, every = rng.uniform(750, 900), rng.uniform(0.35, 0.6)  # Hz, s
    when = 0.0
    while when < SECONDS:
        phase = 2 * np.pi * np.cumsum(top * rng.uniform(0.95, 1.05) * np.exp(-2.5 * time)) / RATE
        voice = sum(np.sin(k * phase) / k**0.3 for k in (1, 2, 3, 4))
        add_at(samples, voice * np.minimum(time / 0.008, 1) * np.exp(-time / 0.1), when)
        when += every * rng.uniform(0.8, 1.2)
    return samples


def drilling(rng):
    """A steady shrill whirr between 2 and 3.5 kHz, buzzing with the motor."""
    motor = rng.uniform(90, 130)  # Hz
    buzz = 1 + 0.6 * np.sin(2 * np.pi * motor * TIME)
    whine = tone(rng.uniform(2300, 2900) * (1 + 0.02 * np.sin(2 * np.pi * 0.7 * TIME)))
    return (band_noise(rng, 2000, 3300) + 0.8 * whine) * buzz


def engine_idling(rng):
    """A low rumble: the harmonics of the firing rate, up to 200 Hz."""
    firing = rng.uniform(22, 32) * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(0.3, 1) * TIME))
    return tone(firing, [0.5, 0.8, 1, 0.9, 0.6, 0.3]) + 0.3 * band_noise(rng, 40, 120)


def gun_shot(rng):
    """Bangs over the whole spectrum, each with a thump below it and a tail."""
    samples = np.zeros(N)
    when = 0.0
    while when < SECONDS:
        bang = band_noise(rng, 150, 6000) * np.exp(-TIME / rng.uniform(0.12, 0.18))
        add_at(samples, bang + 2 * np.sin(2 * np.pi * 80 * TIME) * np.exp(-TIME / 0.15), when)
        when += rng.uniform(0.8, 1.4)
    return samples


def jackhammer(rng):
    """Ten to fifteen strokes a second: a dull thud and a metallic click."""
    samples = 0.03 * band_noise(rng, 200, 2000)
    n = int(0.06 * RATE)
    time = np.arange(n) / RATE
    every, thud, click = 1 / rng.uniform(10, 15), rng.uniform(130, 170), rng.uniform(2700, 3200)  # s, Hz, Hz
    for when in np.arange(0, SECONDS, every):
        stroke = np.sin(2 * np.pi * thud * time) * np.exp(-time / 0.03)
        stroke += band_noise(rng, 0.85 * click, 1.1 * click, n) * np.exp(-time / 0.015)
        add_at(samples, rng.uniform(0.8, 1.0) * stroke, when)
    return samples


def siren(rng):
    """One tone that wails up and down over an octave."""
    wails = rng.uniform(0.3, 0.8)  # a second
    pitch = rng.uniform(800, 1000) * 2 ** (0.55 * np.sin(2 * np.pi * wails * TIME + rng.uniform(0, 2 * np.pi)))
    return tone(pitch, (1.0, 0.1))


def street_music(rng):
    """A plucked tune over a bass, on the beat."""
    samples = np.zeros(N)
    root, beat = rng.uniform(180, 220), rng.uniform(0.22, 0.3)  # Hz, s
    n = int(0.6 * RATE)
    time = np.arange(n) / RATE
    scale = 2 ** (np.array([0, 3, 5, 7, 10, 12, 15]) / 12)  # minor pentatonic
    for i, when in enumerate(np.arange(0, SECONDS, beat)):
        pitch = root * rng.choice(scale)
        phase = 2 * np.pi * pitch * time
        note = sum(np.sin(k * phase) / k**1.5 for k in range(1, 6)) * np.exp(-time / 0.25)
        add_at(samples, note * np.minimum(time / 0.004, 1), when)
        if i % 2 == 0:
            add_at(samples, 1.2 * np.sin(np.pi * root * time) * np.exp(-time / 0.3), when)
    return samples


SOUNDS = (
    air_conditioner,
    car_horn,
    children_playing,
    dog_bark,
    drilling,
    engine_idling,
    gun_shot,
    jackhammer,
    siren,
    street_music,
)

# --- Files -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Clip:
    """One row of the metadata, and how its file is made."""

    row: tuple  # as METADATA_COLUMNS
    fold: int
    class_id: int
    seconds: float
    file_format: tuple  # as FORMATS
    seed: int

    @property
    def name(self):
        """The file's name in the data set's folder."""
        return f"audio/fold{self.fold}/{self.row[0]}"


def plan_miniature(folds=10, clips_per_class=3, seed=0):
    """Return the Clips of a miniature: `clips_per_class` of each class in each of the first `folds` folds.

    Two clips come from one recording (fsID), the next two from another. A recording stays in its fold.
    """
    clips, fsid = [], FIRST_FSID
    for fold in range(1, folds + 1):
        for class_id, class_name in enumerate(CLASS_NAMES):
            for i in range(clips_per_class):
                if i % 2 == 0:
                    fsid += 1
                name = f"{fsid}-{class_id}-0-{i % 2}.wav"
                choice = utils.derive_seed("miniature", seed, name)
                lengths = SHORT_EVENT_SECONDS if class_id in EVENT_CLASSES else SHORT_SECONDS
                turn, rest = divmod(len(clips), SHORT_EVERY)
                seconds = lengths[turn % len(lengths)] if rest == 1 else SECONDS
                start = i % 2 * SECONDS
                salience = 1 + choice % 4 // 3  # one clip in four is in the background
                row = (name, fsid, start, round(start + seconds, 6), salience, fold, class_id, class_name)
                clips.append(Clip(row, fold, class_id, seconds, FORMATS[fsid % len(FORMATS)], choice))
    return clips


def render(clip):
    """Return a clip's samples, shape (n, channels), float32 within ±1, at its file's sampling rate."""
    rng = np.random.default_rng(clip.seed)
    rate, channels, _ = clip.file_format
    sound = SOUNDS[clip.class_id](rng)[: round(clip.seconds * RATE)]
    sound = soxr.resample(sound.astype(np.float32), RATE, rate)
    n = len(sound)
    sound /= np.abs(sound).max()
    stereo = np.stack([sound, np.roll(sound, rng.integers(0, 4)) * rng.uniform(0.6, 1)], axis=1)
    samples = stereo[:, :channels]
    background = 10 ** (rng.uniform(-60, -40) / 20)  # dB below the sound
    samples = samples + np.float32(background) * rng.standard_normal((n, channels), dtype=np.float32)
    level = 10 ** (rng.uniform(-9, -1) / 20) if clip.row[4] == 1 else 10 ** (rng.uniform(-18, -12) / 20)  # dBFS
    return (samples * np.float32(level / np.abs(samples).max())).astype(np.float32)


def write_clip(path, samples, rate, subtype):
    """Write one WAV file. Float files go by scipy: libsndfile stamps them with the time of day."""
    if subtype == "FLOAT":
        from scipy.io import wavfile  # slow to import

        wavfile.write(path, rate, samples)
    else:
        header = "WAVEX" if subtype == "PCM_24" else "WAV"  # the real set's 24-bit files are WAVE_FORMAT_EXTENSIBLE
        soundfile.write(path, samples, rate, subtype=subtype, format=header)


def metadata_text(clips):
    """Return the metadata table of these clips as UrbanSound8K.csv has it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([METADATA_COLUMNS, *(clip.row for clip in clips)])
    return text.getvalue()


def holds_miniature(dataset_dir):
    """Return whether a folder holds clips of a miniature, complete or not."""
    names = (path.name for path in Path(dataset_dir).glob("audio/fold*/*-*-*-*.wav"))
    return any(name.split("-")[0].isdigit() and int(name.split("-")[0]) > FIRST_FSID for name in names)


def make_miniature(dataset_dir, folds=10, clips_per_class=3, seed=0, force=False):
    """Write a miniature into a folder; return True, or False if it was there already, complete.

    The metadata table comes last, so an interrupted miniature never looks complete and is made again. UserError if the
    folder holds clips that are not this miniature's.
    """
    dataset_dir = Path(dataset_dir)
    clips = plan_miniature(folds, clips_per_class, seed)
    table = dataset_dir / "metadata" / "UrbanSound8K.csv"
    planned = {clip.name: clip for clip in clips}
    sizes = {path.relative_to(dataset_dir).as_posix(): path.stat().st_size for path in dataset_dir.glob("audio/*/*")}
    strangers = sorted(set(sizes) - set(planned))
    if strangers:
        raise UserError(
            f"{dataset_dir} holds other clips ({len(strangers)}, such as {strangers[0]}), which the miniature must "
            "not mix with: name another folder with --data_dir or --assets_dir"
        )
    if table.exists() and table.read_text(encoding="utf-8") != metadata_text(clips):
        raise UserError(f"{table} lists other clips than this miniature's: name another folder with --data_dir")
    if table.exists() and not force and all(sizes.get(name) for name in planned):
        return False
    table.unlink(missing_ok=True)
    for clip in tqdm(clips, desc="miniature", unit="clip", leave=False, mininterval=0.5, disable=None):
        path = dataset_dir / clip.name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, render(clip), clip.file_format[0], clip.file_format[2])
    with utils.atomic_write(table, "w") as file:
        file.write(metadata_text(clips))
    return True
