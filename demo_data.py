"""The miniature: a small synthetic data set in UrbanSound8K's exact layout, for the demo and the tests.

    python download_data.py --demo       # 300 clips, ten classes, ten folds

Ten sounds that a person recognises and a small network learns in a few epochs. Their energy lies below 3.5 kHz, so that
8 kHz files are no harder. The files have the formats of the real data set: 8 to 96 kHz, mono and stereo, 8, 16, 24 and
32 bit, float, ADPCM, 0.05 to 4 s. On one machine the same call writes the same bytes; another processor or library
version may round the last bit differently.
"""

import csv
import io
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import utils
from utils import UserError

METADATA_COLUMNS = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
FIRST_FSID = 900_000  # above every Freesound id of the real data set, whose last is 209992

RATE = 16_000  # Hz; sounds are made at this rate, then resampled to the file's
SECONDS = 4.0  # s; longest clip
SHORT_EVERY = 7  # one clip in seven is shorter; shares no factor with the 30 clips of a fold, so every class has some
SHORT_SECONDS = (1.3, 0.7, 2.9, 2.1, 3.4)
SHORT_EVENT_SECONDS = (0.05, 0.35, 0.1, 1.2, 0.6)  # horns, barks and shots are recognisable sooner
EVENT_CLASSES = ("car_horn", "dog_bark", "gun_shot")

# (sampling rate in Hz, channels, subtype). A prime number of them, so that no class has a format of its own.
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

# --- Sounds: each takes a random generator and returns (N,) mono samples at RATE, of any level ----------------------

N = int(SECONDS * RATE)
TIME = np.arange(N) / RATE  # (N,) s


def tone(hertz, harmonics=(1.0,), seconds=SECONDS):
    """Return (n,) samples of a tone; hertz: a number or (n,) moving pitch; harmonics: levels of 1, 2, ... times it."""
    hertz = np.broadcast_to(hertz, int(seconds * RATE))
    phase = 2 * np.pi * np.cumsum(hertz) / RATE  # (n,)
    return sum(level * np.sin(k * phase) for k, level in enumerate(harmonics, start=1))


def noise(rng, low, high):
    """Return (N,) samples of noise between two frequencies in Hz, of unit power."""
    frequency = np.fft.rfftfreq(N, 1 / RATE)  # (N // 2 + 1,) Hz
    spectrum = np.fft.rfft(rng.standard_normal(N)) * ((frequency > low) & (frequency < high))
    samples = np.fft.irfft(spectrum, N)
    return samples / samples.std()


def decay(seconds):
    """Return (N,) an envelope that falls to 1/e in so many seconds."""
    return np.exp(-TIME / seconds)


def repeat(rng, event, low, high):
    """Return (N,) samples of an event at random intervals between two bounds in s, each time at a random level."""
    samples, start = np.zeros(N), 0
    while start < N:
        part = event[: N - start]
        samples[start : start + len(part)] += rng.uniform(0.7, 1.0) * part
        start += int(rng.uniform(low, high) * RATE)
    return samples


def air_conditioner(rng):
    """A steady rush of air over a faint mains hum."""
    return noise(rng, 200, rng.uniform(500, 700)) + 0.15 * tone(rng.choice([100.0, 120.0]), (1.0, 0.5, 0.3))


def car_horn(rng):
    """Blasts of two rich tones, a third apart."""
    pitch, period = rng.uniform(380, 450), rng.uniform(0.6, 1.8)  # Hz, s
    levels = [1, 0.9, 0.8, 0.7, 0.6, 0.4]
    return (tone(pitch, levels) + tone(pitch * 1.26, levels)) * (TIME % period < 0.8 * period)


def children_playing(rng):
    """Many high voices calling at once, each gliding up and down."""
    samples = 0.1 * noise(rng, 900, 3000)
    for _ in range(6):
        glide = 1 + rng.uniform(-0.3, 0.3) * np.hanning(int(0.3 * RATE))
        call = tone(rng.uniform(900, 1700) * glide, (1, 0.7), 0.3) * np.hanning(len(glide))
        samples += repeat(rng, call, 0.3, 0.9)
    return samples


def dog_bark(rng):
    """Barks that fall in pitch, silence between."""
    voice = tone(rng.uniform(750, 900) * np.exp(-2.5 * TIME), (1, 0.8, 0.7, 0.7))
    return repeat(rng, voice * decay(0.1) * np.minimum(TIME / 0.008, 1), 0.3, 0.7)


def drilling(rng):
    """A steady shrill whirr between 2 and 3.5 kHz, buzzing with the motor."""
    whine = tone(rng.uniform(2300, 2900) * (1 + 0.02 * np.sin(2 * np.pi * 0.7 * TIME)))
    return (noise(rng, 2000, 3300) + 0.8 * whine) * (1 + 0.6 * tone(rng.uniform(90, 130)))


def engine_idling(rng):
    """A low rumble: the harmonics of the firing rate, up to 200 Hz."""
    firing = rng.uniform(22, 32) * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(0.3, 1) * TIME))  # (N,) Hz
    return tone(firing, [0.5, 0.8, 1, 0.9, 0.6, 0.3]) + 0.3 * noise(rng, 40, 120)


def gun_shot(rng):
    """Bangs over the whole spectrum, each with a thump below it and a tail."""
    bang = noise(rng, 150, 6000) * decay(rng.uniform(0.12, 0.18)) + 2 * tone(80) * decay(0.15)
    return repeat(rng, bang, 0.8, 1.4)


def jackhammer(rng):
    """Ten to fifteen strokes a second: a dull thud and a metallic click."""
    click = rng.uniform(2700, 3200)  # Hz
    stroke = tone(rng.uniform(130, 170)) * decay(0.03) + noise(rng, 0.85 * click, 1.1 * click) * decay(0.015)
    period = 1 / rng.uniform(10, 15)  # s
    return repeat(rng, stroke, period, period) + 0.03 * noise(rng, 200, 2000)


def siren(rng):
    """One tone that wails up and down over an octave."""
    wail = np.sin(2 * np.pi * (rng.uniform(0.3, 0.8) * TIME + rng.uniform()))  # (N,)
    return tone(rng.uniform(800, 1000) * 2 ** (0.55 * wail), (1.0, 0.1))


def street_music(rng):
    """A plucked tune over a bass, on the beat."""
    root, beat = rng.uniform(180, 220), rng.uniform(0.22, 0.3)  # Hz, s
    scale = 2 ** (np.array([0, 3, 5, 7, 10, 12, 15]) / 12)  # minor pentatonic
    since = TIME % beat  # (N,) s since the last beat
    pitch = root * rng.choice(scale, 20)[(TIME / beat).astype(int)]  # (N,) Hz; a note for each beat
    tune = tone(pitch, (1, 0.35, 0.19, 0.12)) * np.exp(-since / 0.15) * np.minimum(since / 0.004, 1)
    return tune + 0.8 * tone(root / 2) * np.exp(-since / 0.2)


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
CLASS_NAMES = tuple(sound.__name__ for sound in SOUNDS)  # in the order of classID

# --- Files -------------------------------------------------------------------------------------------------------


def plan_miniature(folds=10, clips_per_class=3):
    """Return the rows of the table: dicts of METADATA_COLUMNS, `clips_per_class` of each class in each fold from 1.

    Two clips come from one recording (fsID), the next two from the next. A recording stays in its fold.
    """
    rows, fsid = [], FIRST_FSID
    for fold in range(1, folds + 1):
        for class_id, class_name in enumerate(CLASS_NAMES):
            for i in range(clips_per_class):
                if i % 2 == 0:
                    fsid += 1
                name = f"{fsid}-{class_id}-0-{i % 2}.wav"
                lengths = SHORT_EVENT_SECONDS if class_name in EVENT_CLASSES else SHORT_SECONDS
                turn, rest = divmod(len(rows), SHORT_EVERY)
                seconds = lengths[turn % len(lengths)] if rest == 1 else SECONDS
                start = i % 2 * SECONDS
                salience = 2 if utils.derive_seed("salience", name) % 4 == 0 else 1  # 2: in the background
                values = (name, fsid, start, start + seconds, salience, fold, class_id, class_name)
                rows.append(dict(zip(METADATA_COLUMNS, values, strict=True)))
    return rows


def render(row):
    """Return (samples (n, channels) float32 within ±1, sampling rate in Hz, subtype) of a row's file."""
    rng = np.random.default_rng(utils.derive_seed("miniature", row["slice_file_name"]))
    rate, channels, subtype = FORMATS[row["fsID"] % len(FORMATS)]
    sound = SOUNDS[row["classID"]](rng)[: round((row["end"] - row["start"]) * RATE)]
    sound = soxr.resample(sound, RATE, rate)  # (n,)
    right = np.roll(sound, rng.integers(0, 4)) * rng.uniform(0.6, 1)
    samples = np.stack([sound, right], axis=1)[:, :channels] / np.abs(sound).max()  # (n, channels)
    samples += 10 ** (rng.uniform(-60, -40) / 20) * rng.standard_normal(samples.shape)  # dB below the sound
    level = rng.uniform(-9, -1) if row["salience"] == 1 else rng.uniform(-18, -12)  # dBFS
    return (samples * 10 ** (level / 20) / np.abs(samples).max()).astype(np.float32), rate, subtype


def write_clip(path, samples, rate, subtype):
    """Write samples (n, channels) as a WAV file. scipy writes floats: libsndfile would add the time of day."""
    wav = io.BytesIO()  # written at once, so that a full disk is an OSError and not libsndfile's own
    if subtype == "FLOAT":
        from scipy.io import wavfile  # slow to import

        wavfile.write(wav, rate, samples)
    else:
        header = "WAVEX" if subtype == "PCM_24" else "WAV"  # the real data set's 24-bit files: WAVE_FORMAT_EXTENSIBLE
        soundfile.write(wav, samples, rate, subtype=subtype, format=header)
    Path(path).write_bytes(wav.getbuffer())


def metadata_text(rows):
    """Return the table of these rows as UrbanSound8K.csv has it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METADATA_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def holds_miniature(dataset_dir):
    """Return whether a folder holds clips of a miniature, complete or not."""
    fsids = (path.name.split("-")[0] for path in Path(dataset_dir).glob("audio/fold*/*-*-*-*.wav"))
    return any(fsid.isdecimal() and int(fsid) > FIRST_FSID for fsid in fsids)


def make_miniature(dataset_dir, folds=10, clips_per_class=3, force=False):
    """Write a miniature into a folder; return True, or False if it was there already, complete.

    The table comes last, so that an interrupted miniature never looks complete. UserError if the folder holds clips
    that are not this miniature's.
    """
    rows = plan_miniature(folds, clips_per_class)
    table = Path(dataset_dir) / "metadata" / "UrbanSound8K.csv"
    audio_dir = Path(dataset_dir) / "audio"
    paths = {audio_dir / f"fold{row['fold']}" / row["slice_file_name"]: row for row in rows}
    sizes = {path: path.stat().st_size for path in audio_dir.glob("*/*")}
    if others := sorted(sizes.keys() - paths.keys()):
        raise UserError(f"{dataset_dir} holds other clips, such as {others[0].name}: name another --data_dir")
    if table.exists() and table.read_text(encoding="utf-8", errors="replace") != metadata_text(rows):
        raise UserError(f"{table} lists other clips than this miniature's: name another --data_dir")
    if table.exists() and not force and all(sizes.get(path) for path in paths):
        return False
    table.unlink(missing_ok=True)
    for path, row in tqdm(paths.items(), desc="miniature", unit="clip", leave=False, disable=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, *render(row))
    with utils.atomic_write(table, "w") as file:
        file.write(metadata_text(rows))
    return True
