"""The miniature: a small synthetic data set in UrbanSound8K's exact layout, for the demo and the tests.

    python download_data.py --demo       # 300 clips, ten classes, ten folds

Ten sounds that a person recognises and a small network learns in a few epochs. Their energy lies below 3.5 kHz, so that
8 kHz files are no harder. The files have the formats of the real data set: 8 to 96 kHz, mono and stereo, 8, 16, 24 and
32 bit, float, ADPCM, 0.05 to 4 s. On one machine the same call writes the same bytes; another processor or library
version may round the last bit differently.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import soxr
from scipy.io import wavfile
from tqdm import tqdm

import data_loader
import utils
from utils import UserError

FIRST_FSID = 900_000  # above every Freesound id of the real data set, whose last is 209992

RATE = 16_000  # Hz; sounds are made at this rate, then resampled to the file's
SECONDS = 4.0  # s; longest clip
SHORT_EVERY = 7  # one clip in seven is shorter; shares no factor with the 30 clips of a fold, so every class has some
SHORT_SECONDS = (0.05, 3.4, 0.7, 2.1, 1.3)

CLASS_NAMES = (  # in the order of classID
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
# (sampling rate in Hz, channels, subtype). A prime number of them, so that no class has a format of its own.
FORMATS = (
    (44_100, 2, "PCM_16"),
    (48_000, 1, "PCM_24"),
    (11_025, 2, "PCM_16"),
    (96_000, 2, "PCM_16"),
    (8_000, 1, "PCM_U8"),
    (44_100, 2, "MS_ADPCM"),
    (48_000, 2, "FLOAT"),
    (24_000, 1, "PCM_16"),
    (32_000, 1, "PCM_32"),
    (22_050, 2, "IMA_ADPCM"),
    (16_000, 1, "FLOAT"),
)

# --- Sounds ------------------------------------------------------------------------------------------------------

N = int(SECONDS * RATE)
TIME = np.arange(N) / RATE  # (N,) s


def tone(hertz, harmonics=(1.0,)):
    """Return (N,) samples of a tone; hertz: a number or (N,) moving pitch; harmonics: levels of 1, 2, ... times it."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, N)) / RATE  # (N,)
    return sum(level * np.sin(k * phase) for k, level in enumerate(harmonics, start=1))


def noise(rng, low, high):
    """Return (N,) samples of noise between two frequencies in Hz, of unit power."""
    frequency = np.fft.rfftfreq(N, 1 / RATE)  # (N // 2 + 1,) Hz
    spectrum = np.fft.rfft(rng.standard_normal(N)) * ((frequency > low) & (frequency < high))
    samples = np.fft.irfft(spectrum, N)
    return samples / samples.std()


def repeat(rng, event, low, high):
    """Return (N,) samples of an event (N,) at random intervals between two bounds in s, each time at a random level."""
    samples, start = np.zeros(N), 0
    while start < N:
        samples[start:] += rng.uniform(0.7, 1.0) * event[: N - start]
        start += int(rng.uniform(low, high) * RATE)
    return samples


def make_sound(name, rng):
    """Return (N,) mono samples at RATE of a class, of any level; each random generator gives a variant of its own."""
    uniform = rng.uniform
    match name:
        case "air_conditioner":  # a steady rush of air over a faint mains hum
            return noise(rng, 200, uniform(500, 700)) + 0.15 * tone(rng.choice([100.0, 120.0]), (1, 0.5, 0.3))
        case "car_horn":  # blasts of two rich tones, a third apart
            pitch, period = uniform(380, 450), uniform(0.6, 1.8)  # Hz, s
            chord = sum(tone(hertz, (1, 0.9, 0.8, 0.7, 0.6, 0.4)) for hertz in (pitch, 1.26 * pitch))  # (N,)
            return chord * (TIME % period < 0.8 * period)
        case "children_playing":  # many high voices calling at once, each gliding up and down
            samples = 0.1 * noise(rng, 900, 3000)
            for _ in range(6):
                glide = tone(uniform(1, 3))  # (N,)
                samples += tone(uniform(900, 1700) * (1 + 0.2 * glide), (1, 0.7)) * np.maximum(glide, 0)
            return samples
        case "dog_bark":  # barks that fall in pitch, silence between
            voice = tone(uniform(750, 900) * np.exp(-2.5 * TIME), (1, 0.8, 0.7, 0.7))
            return repeat(rng, voice * np.exp(-TIME / 0.1), 0.3, 0.7)
        case "drilling":  # a steady shrill whirr between 2 and 3.5 kHz, buzzing with the motor
            whine = tone(uniform(2300, 2900) * (1 + 0.02 * tone(0.7)))
            return (noise(rng, 2000, 3300) + 0.8 * whine) * (1 + 0.6 * tone(uniform(90, 130)))
        case "engine_idling":  # a low rumble: the harmonics of the firing rate, up to 200 Hz
            firing = uniform(22, 32) * (1 + 0.02 * tone(uniform(0.3, 1)))  # (N,) Hz
            return tone(firing, (0.5, 0.8, 1, 0.9, 0.6, 0.3)) + 0.3 * noise(rng, 40, 120)
        case "gun_shot":  # bangs over the whole spectrum, each with a thump below it and a tail
            return repeat(rng, (noise(rng, 150, 6000) + 2 * tone(80)) * np.exp(-TIME / 0.15), 0.8, 1.4)
        case "jackhammer":  # ten to fifteen strokes a second: a dull thud and a metallic click
            thud = tone(uniform(130, 170)) * np.exp(-TIME / 0.03)
            click = noise(rng, 2500, 3300) * np.exp(-TIME / 0.015)
            period = 1 / uniform(10, 15)  # s
            return repeat(rng, thud + click, period, period)
        case "siren":  # one tone that wails up and down over an octave
            return tone(uniform(800, 1000) * 2 ** (0.55 * tone(uniform(0.3, 0.8))), (1, 0.1))
        case "street_music":  # a plucked tune over a bass, on the beat
            root, beat = uniform(180, 220), uniform(0.22, 0.3)  # Hz, s
            scale = 2 ** (np.array([0, 3, 5, 7, 10, 12, 15]) / 12)  # minor pentatonic
            pitch = root * rng.choice(scale, 20)[(TIME / beat).astype(int)]  # (N,) Hz; a note for each beat
            return (tone(pitch, (1, 0.35, 0.19, 0.12)) + 0.8 * tone(root / 2)) * np.exp(-(TIME % beat) / 0.15)


# --- Files -------------------------------------------------------------------------------------------------------


def plan_miniature(folds=10, clips_per_class=3):
    """Return the table, a DataFrame of data_loader.CLIP_COLUMNS: `clips_per_class` of each class in each fold from 1.

    Two clips come from one recording (fsID), the next two from the next. A recording stays in its fold.
    """
    rows = []
    for fold, class_id, i in itertools.product(range(1, folds + 1), range(len(CLASS_NAMES)), range(clips_per_class)):
        n = len(rows)
        fsid, start = FIRST_FSID + 1 + n - i % 2, i % 2 * SECONDS
        seconds = SHORT_SECONDS[n // SHORT_EVERY % len(SHORT_SECONDS)] if n % SHORT_EVERY == 1 else SECONDS
        salience = 2 if n % SHORT_EVERY in (3, 5) else 1  # 2: in the background
        place = (f"{fsid}-{class_id}-0-{i % 2}.wav", fsid, start, start + seconds)
        rows.append((*place, salience, fold, class_id, CLASS_NAMES[class_id]))
    return pd.DataFrame(rows, columns=data_loader.CLIP_COLUMNS)


def write_clip(path, row):
    """Make the sound of a row of the table and write it as a WAV file, in the format of its recording."""
    rng = np.random.default_rng(utils.derive_seed("miniature", row.slice_file_name))
    rate, channels, subtype = FORMATS[row.fsID % len(FORMATS)]
    sound = make_sound(CLASS_NAMES[row.classID], rng)[: round((row.end - row.start) * RATE)]
    sound = soxr.resample(sound, RATE, rate)  # (n,)
    right = np.roll(sound, 3) * rng.uniform(0.6, 1)
    samples = np.stack([sound, right], axis=1)[:, :channels] / np.abs(sound).max()  # (n, channels)
    samples += 10 ** (rng.uniform(-60, -40) / 20) * rng.standard_normal(samples.shape)  # dB below the sound
    level = rng.uniform(-9, -1) - 9 * (row.salience == 2)  # dBFS
    samples *= 10 ** (level / 20) / np.abs(samples).max()
    wav = io.BytesIO()  # written at once, so that a full disk is an OSError and not libsndfile's own
    if subtype == "FLOAT":  # libsndfile would add the time of day
        wavfile.write(wav, rate, samples.astype(np.float32))
    else:
        header = "WAVEX" if subtype == "PCM_24" else "WAV"  # the real data set's 24-bit files: WAVE_FORMAT_EXTENSIBLE
        soundfile.write(wav, samples, rate, subtype=subtype, format=header)
    path.write_bytes(wav.getbuffer())


def holds_miniature(dataset_dir):
    """Return whether a folder holds clips of a miniature, complete or not."""
    return any(dataset_dir.glob("audio/fold*/900[0-9][0-9][0-9]-*.wav"))  # from FIRST_FSID


def make_miniature(dataset_dir, folds=10, clips_per_class=3, force=False):
    """Write a miniature into a folder; return True, or False if it was there already, complete.

    The table comes last, so that an interrupted miniature never looks complete. UserError if the folder holds clips or
    an archive that are not this miniature's.
    """
    dataset_dir = Path(dataset_dir)
    clips = plan_miniature(folds, clips_per_class)
    table, text = dataset_dir / "metadata" / "UrbanSound8K.csv", clips.to_csv(index=False, lineterminator="\n")
    files = {dataset_dir / f"audio/fold{row.fold}/{row.slice_file_name}": row for row in clips.itertuples()}
    others = {*dataset_dir.glob("audio/*/*"), *dataset_dir.glob("*.tar.gz*")} - files.keys()
    if table.exists() and table.read_text(encoding="utf-8", errors="replace") != text:
        others.add(table)
    if others:
        raise UserError(f"{min(others)} does not belong to this miniature: name another --data_dir")
    if table.exists() and not force and all(path.exists() and path.stat().st_size for path in files):
        return False
    table.unlink(missing_ok=True)
    for path, row in tqdm(files.items(), desc="miniature", unit="clip", leave=False, disable=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, row)
    with utils.atomic_write(table, "w") as file:
        file.write(text)
    return True
