"""How well does 'may be none of the classes' work? Train without a class, and see how its clips score.

    python measure_unknown.py                                       # fold 0, each class held out once
    python measure_unknown.py --folds 1 --epochs 15 --classes siren,dog_bark --sounds 20

For each class: a network is trained by train.py's own functions on data without that class. Its score (energy, see
calibration.py) is then compared between the held-out class, all of whose clips it has never seen, and the test clips of
the classes it knows. One more network, of all classes, is compared with noise and with sounds like speech. These sounds
are synthetic: harmonics under vowel formants in the rhythm of syllables, nobody's recorded voice.

Prints a table. AUROC: how often an unknown clip scores below a known one; 0.5 is chance, 1 perfect. Warned: the share
below the threshold, which 1 in 20 validation clips are. Goes on where it stopped; what it trains is in unknown/ in the
assets.
"""

import dataclasses
import os
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import numpy as np
import torch

import batches
import calibration
import checkpoint
import config
import data_loader
import front_end
import train
import utils
from epoch import EVALUATION_BATCH
from model import load_model, model_path
from reports import report
from services import publisher, tracking
from utils import UserError

SOUNDS_OF_A_KIND = 100  # noise, speech-like and so on
LEVELS = -40, -6  # dBFS; the peak of a made sound is drawn from between
QUIET_LEVEL = -90  # dBFS; of silence-like noise: one step of 16 bits
VOWELS = [(270, 2290, 3010), (530, 1840, 2480), (730, 1090, 2440), (570, 840, 2410), (300, 870, 2240)]  # formants, Hz
FORMANT_WIDTH = 90  # Hz
HIGHEST_HARMONIC = 5000  # Hz
SCORES = {  # what else could tell the unknown from logits alone; the first is calibration.py's
    "energy": calibration.unknown_score,
    "max logit": lambda logits: logits.amax(dim=1),
    "max probability": lambda logits: logits.softmax(dim=1).amax(dim=1),
}


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--processed_dir", metavar="DIR", help="processed files of stage 2 (default: data/ in the assets)")
    add("--folds", type=utils.parse_folds, default=[0], help="0-indexed test folds (default: 0)")
    add("--epochs", type=utils.positive_int, default=config.EPOCHS, help=f"default: {config.EPOCHS}")
    add("--sounds", type=utils.positive_int, default=SOUNDS_OF_A_KIND, help=f"of a kind (default: {SOUNDS_OF_A_KIND})")
    add("--classes", help="names of the classes to hold out, with commas (default: every class)")
    add("--device", default=config.DEVICE, help=f"auto, cpu, cuda, cuda:1, mps; default: {config.DEVICE}")
    add("--fresh", action="store_true", help="remove what an earlier run left for these folds and classes")
    return parser.parse_args()


# --- Sounds that are no class: samples (n,), peak 1 ----------------------------------------------------------------


def coloured_noise(rng, audio, slope):
    """Return noise whose amplitude falls as frequency to the power `slope`: 0 is white, 0.5 pink."""
    n = audio.clip_samples
    spectrum = np.fft.rfft(rng.normal(size=n))
    samples = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** slope, n)
    return samples / np.abs(samples).max()


def speech_like(rng, audio):
    """Return syllables, 3 to 6 a second with pauses: harmonics of a gliding voice under the formants of vowels."""
    samples, start, voice = np.zeros(audio.clip_samples), 0, rng.uniform(90, 250)
    while start < len(samples):
        length = int(audio.sample_rate / rng.uniform(3, 6))
        if rng.random() < 0.85:
            part = samples[start : start + length]  # the clip may end within a syllable
            part += syllable(rng, voice, length, audio.sample_rate)[: len(part)]
        start += length
    return samples / max(np.abs(samples).max(), 1e-9)


def syllable(rng, voice, length, sample_rate):
    """Return a hissed onset and a vowel, (length,); voice: fundamental frequency, Hz."""
    glide = np.linspace(rng.uniform(0.9, 1.2), rng.uniform(0.8, 1.1), length)
    phase = 2 * np.pi * np.cumsum(voice * glide) / sample_rate
    formants = np.array(VOWELS[rng.integers(len(VOWELS))])
    vowel = np.zeros(length)
    for harmonic in range(1, int(min(HIGHEST_HARMONIC, sample_rate / 2.5) / voice) + 1):
        resonance = (1 / (1 + ((harmonic * voice - formants) / FORMANT_WIDTH) ** 2)).sum()
        vowel += resonance / harmonic**0.5 * np.sin(harmonic * phase)
    hiss = np.diff(rng.normal(size=length + 1)) * np.exp(-np.arange(length) / (0.02 * sample_rate))
    return np.hanning(length) * vowel + rng.uniform(0, 0.3) * hiss


def made_sounds(audio, seed, count):
    """Return {kind: features (count, rows, n_frames) in dB} of sounds that are none of the classes."""
    kinds = {
        "white noise": lambda rng: coloured_noise(rng, audio, 0),
        "pink noise": lambda rng: coloured_noise(rng, audio, 0.5),
        "near silence": lambda rng: coloured_noise(rng, audio, 0),
        "like speech (synthetic)": lambda rng: speech_like(rng, audio),
    }
    sounds = {}
    for kind, make in kinds.items():
        rng = np.random.default_rng(utils.derive_seed(kind, seed))
        levels = [QUIET_LEVEL] * count if kind == "near silence" else rng.uniform(*LEVELS, count)
        clips = [make(rng) * 10 ** (level / 20) for level in levels]
        sounds[kind] = np.stack([front_end.clip_features(clip.astype(np.float32), audio) for clip in clips])
    return sounds


# --- Training without a class --------------------------------------------------------------------------------------


def without_class(data, class_id):
    """Return the Processed data set without one class's clips; the whole one if class_id is None."""
    if class_id is None:
        return data
    keep = np.flatnonzero(data.labels != class_id)
    features, labels, folds = data.features[keep], data.labels[keep], data.folds[keep]
    return dataclasses.replace(
        data,
        features=features,
        labels=labels,
        folds=folds,
        class_names={key: name for key, name in data.class_names.items() if key != class_id},
        clips=[data.clips[index] for index in keep],
        info={**data.info, "fingerprint": data_loader.fingerprint(features, labels, folds)},
    )


def train_without(class_id, fold, known, args):
    """Train a fold on the Processed data set `known`, if that is not done yet, and return its (network, info)."""
    folder = args.assets_dir / "unknown" / f"without_{'none' if class_id is None else class_id}"
    paths = SimpleNamespace(
        processed=utils.run_folders(args).processed,
        models=folder / "models",
        checkpoints=folder / "checkpoints",
        results=folder / "results",
    )
    flags = SimpleNamespace(epochs=args.epochs, validation="next_fold")  # the threshold comes from validation clips
    settings = train.training_settings(flags, known)
    with utils.only_one(paths.checkpoints, "measure_unknown.py"):
        if args.fresh:
            checkpoint.remove_folds(paths, [fold], settings)
        tracker, models = tracking.Tracker(folder), publisher.Publisher(paths)
        tracker.is_on, models.repo_id = False, ""  # these networks are no results: nobody is told, nothing is published
        train.train_folds([fold], known, settings, paths, utils.pick_device(args.device), tracker, models)
    return load_model(model_path(paths.models, fold))


# --- Scores --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(network, info, features):
    """Return the logits (clips, classes) of features (clips, rows, n_frames) in dB, on the CPU."""
    statistics = batches.statistics_of(info)
    parts = [torch.from_numpy(part) for part in np.array_split(features, -(-len(features) // EVALUATION_BATCH))]
    return torch.cat([network(batches.normalise(part, statistics)) for part in parts])


def auroc(known, unknown):
    """Return how often an unknown clip's score lies below a known one's, ties half: the area under the ROC curve."""
    known = np.sort(known)
    above = len(known) - (np.searchsorted(known, unknown, "left") + np.searchsorted(known, unknown, "right")) / 2
    return float(above.mean() / len(known))


def compare(what, fold, unknown, known, validation):
    """Return a row of numbers; unknown, known, validation: logits (clips, classes), the last two of known classes."""
    row = {"what": what, "fold": fold, "clips": len(unknown)}
    for name, score in SCORES.items():
        below = torch.quantile(score(validation), calibration.WARNED_SHARE)
        row[name] = {
            "auroc": auroc(score(known).numpy(), score(unknown).numpy()),
            "warned": (score(unknown) < below).float().mean().item(),
            "known_warned": (score(known) < below).float().mean().item(),
        }
    return row


def measure(fold, class_ids, data, args, sounds):
    """Return the rows of a fold: one for each class held out, and one for each kind of made sound."""
    rows = []
    for class_id in [*class_ids, None]:
        known = without_class(data, class_id)
        name = data.class_names.get(class_id, "no class")
        print(f"\nheld out: {name}, fold {fold}")
        network, info = train_without(class_id, fold, known, args)
        _, validation, test = batches.split(known.folds, fold + 1, "next_fold")
        logits = [logits_of(network, info, known.features[clips]) for clips in (test, validation)]
        groups = sounds if class_id is None else {name: data.features[data.labels == class_id]}
        for what, features in groups.items():
            rows.append(compare(what, fold, logits_of(network, info, features), *logits))
    return rows


def table(rows):
    """Return the rows as a Markdown table, with the mean over the held-out classes that precede it."""
    numbers = [
        [row["what"], row["fold"], row["clips"]]
        + [f"{row[name]['auroc']:.2f}" for name in SCORES]
        + [report.percent(row["energy"][share]) for share in ("warned", "known_warned")]
        for row in rows
    ]
    header = ["not one of the classes", "fold", "clips", *(f"AUROC, {name}" for name in SCORES)]
    return report.table([*header, "warned", "known test clips warned"], numbers)


def mean_row(rows):
    """Return the mean of rows, as a row."""
    means = {name: {key: float(np.mean([row[name][key] for row in rows])) for key in rows[0][name]} for name in SCORES}
    clips = sum(row["clips"] for row in rows)
    return {"what": "mean of the held-out classes", "fold": None, "clips": clips, **means}


def main():
    args = parse_args()
    utils.keep_freed_memory()
    data = train.load_data(utils.run_folders(args).processed)
    ids = {name: class_id for class_id, name in data.class_names.items()}
    names = args.classes.split(",") if args.classes else list(ids)
    if unknown := [name for name in names if name not in ids]:
        raise UserError(f"--classes {', '.join(unknown)}: the classes are {', '.join(ids)}")
    sounds = made_sounds(data.audio, config.SEED, args.sounds)
    rows = [row for fold in args.folds for row in measure(fold, [ids[name] for name in names], data, args, sounds)]
    held_out = [row for row in rows if row["what"] in ids]
    made = [row for row in rows if row["what"] not in ids]
    path = args.assets_dir / "unknown" / "unknown.json"
    utils.save_json(path, rows)
    print(f"\n{table([*held_out, mean_row(held_out), *made])}\n\nwrote {path}")


if __name__ == "__main__":
    utils.run(main)
