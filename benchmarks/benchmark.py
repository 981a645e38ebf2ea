"""Speed, as ratios to named references that are measured in the same run, on this machine.

    python -m benchmarks.benchmark                                   # every stage, about three minutes on 2 cores
    python -m benchmarks.benchmark --stage train                     # preprocess, train, predict or scale alone
    python -m benchmarks.benchmark --clips ~/UrbanSound8K/audio      # preprocess published clips instead of synthetic ones
    python -m benchmarks.benchmark --json                            # a JSON object instead of the table

Prints a table: what was timed, its reference, both times, the ratio, and what is to be reached. Ours and the reference
take turns, and each figure is the median of its turns: a machine that is busy with something else slows both. Nothing
is kept: data and checkpoints are synthetic and in a temporary folder.
"""

import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the preprocessing workers have it

import batches
import numpy as np
import torch

import audio_reader
import checkpoint
import config
import data_loader
import demo_data
import front_end
import predict
import preprocess_data
import train
import utils
from benchmarks.benchmark_step import CPU, STEPS, benchmark_losses, benchmark_step, new_networks, random_examples
from benchmarks.timing import REPOSITORY, format_row, machine, median_times, peak_memory, row, run_command
from epoch import make_optimizer, train_step
from model import find_model, load_model
from services import publisher, tracking

STAGES = ("preprocess", "train", "predict", "scale")
EPOCH_CLIPS = 960  # training clips of the epochs whose overhead is measured
PUBLISHED_RATES = (44_100, 48_000)  # Hz; most of UrbanSound8K, stereo, 16 and 24 bit
CLIPS_A_TURN = 256
WARM_CLIPS = 2_000  # done first, while the workers start, and not counted
SCALES = (1_000, 8_732, 40_000)  # clips; the middle one is UrbanSound8K
AUDIO = data_loader.AudioSettings()


# --- Preprocessing -----------------------------------------------------------------------------------------------


def published_clips(folder):
    """Write synthetic clips in the formats that most of UrbanSound8K has, and return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(8):
        rate, subtype = PUBLISHED_RATES[number // 4 % 2], ("PCM_16", "PCM_24")[number % 4 == 3]
        samples = rng.normal(0, 0.1, (int(4 * rate), 2)).clip(-1, 1)
        paths.append(folder / f"{number}.wav")
        demo_data.write_clip(paths[-1], samples, rate, subtype)
    return paths


def usual_clip(path):
    """What most projects do with a clip, at this project's settings."""
    import librosa

    samples, rate = librosa.load(path, sr=AUDIO.sample_rate)
    samples = librosa.util.fix_length(samples, size=AUDIO.clip_samples)
    mels = [
        librosa.feature.melspectrogram(
            y=samples, sr=rate, n_fft=audio.n_fft, hop_length=audio.hop_length, n_mels=audio.n_mels
        )
        for audio in (AUDIO, AUDIO.fine)
    ]
    return [librosa.power_to_db(mel) for mel in mels]


def floor_clip(path):
    """What no front-end of this kind can do without: decoding, resampling and the FFTs of both log-mels."""
    samples = front_end.fit_clip(audio_reader.read_audio(path, AUDIO.sample_rate), AUDIO)
    for audio in (AUDIO, AUDIO.fine):
        front_end.spectrum(samples, audio)


def our_clip(path):
    return preprocess_data.process_clip(path, AUDIO)


def benchmark_preprocess(folder, clips_dir):
    """Return rows: milliseconds a clip of all cores together, against librosa in one process and the floor."""
    paths = sorted(Path(clips_dir).rglob("*.wav")) if clips_dir else published_clips(folder)
    if not paths:
        raise utils.UserError(f"no .wav below {clips_dir}: name a folder of clips with --clips")
    paths = (paths * (CLIPS_A_TURN // len(paths) + 1))[:CLIPS_A_TURN]
    few = paths[: CLIPS_A_TURN // 8]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.WORKERS, spawn, utils.keep_freed_memory) as pool:

        def in_pool(function):
            for _ in pool.map(function, paths, chunksize=preprocess_data.CLIPS_PER_TASK):
                pass

        usual, ours, floor = median_times(
            lambda: [usual_clip(path) for path in few], lambda: in_pool(our_clip), lambda: in_pool(floor_clip)
        )
    usual, ours, floor = 1e3 * usual / len(few), 1e3 * ours / len(paths), 1e3 * floor / len(paths)
    kind = "clips of --clips" if clips_dir else "44.1 and 48 kHz stereo"
    return [
        row(f"preprocess a clip, {kind}", "librosa, one process", ours, usual, "ms", "≥ 5 ×"),
        row("the same", "decode + soxr + rfft alone, same processes", ours, floor, "ms", "≤ 1.4 ×", faster=False),
    ]


# --- Training ----------------------------------------------------------------------------------------------------


def write_random_data(folder, clips_per_fold):
    """Write the processed files of clips of noise, so many in each fold."""
    folds = np.repeat(np.arange(1, len(clips_per_fold) + 1), clips_per_fold)
    labels = np.arange(len(folds)) % 10
    same = {"fsID": 0, "start": 0, "end": 4, "salience": 1}
    clips = [
        {"slice_file_name": f"{n}.wav", "fold": int(fold), "classID": int(label), "class": f"class {label}", **same}
        for n, (label, fold) in enumerate(zip(labels, folds, strict=True))
    ]
    data_loader.save_processed(folder, random_features(len(folds)), clips, AUDIO, "random")


def random_features(n_clips):
    """Return features of noise, (n_clips, rows, n_frames)."""
    rng = np.random.default_rng(0)
    features = np.empty((n_clips, *AUDIO.shape), AUDIO.feature_dtype)
    for start in range(0, n_clips, 100):
        features[start : start + 100] = rng.random(features[start : start + 100].shape, np.float32)
    return features


def benchmark_overhead(folder, n_clips=EPOCH_CLIPS):
    """Return a row: whole epochs of train.py with checkpoint, JSON and lines, against their steps alone."""
    write_random_data(folder / "data", [20, n_clips])
    data = data_loader.load_processed(folder / "data")
    settings = train.training_settings(SimpleNamespace(validation="none"), data)
    paths = SimpleNamespace(checkpoints=folder / "checkpoints", models=folder / "models", results=folder / "results")
    run = checkpoint.Run(paths, settings, [0])
    features = torch.from_numpy(data.features)
    fold = train.make_fold(0, data, features, settings, paths.checkpoints, features.device)
    frames = batches.crop_length(AUDIO.n_frames, settings)
    inputs, wanted = random_examples(config.BATCH_SIZE, frames, AUDIO.shape[0])
    slices = batches.batch_slices(len(fold.training), config.BATCH_SIZE)

    def steps():
        fold.network.train()
        for batch in slices:
            size = batch.stop - batch.start
            train_step(fold.network, fold.optimizer, inputs[:size], wanted[:size], 0.1)

    def epoch():
        one_more = (fold.newest["epoch"] if fold.newest else 0) + 1
        train.train_fold(
            fold, {**settings, "epochs": one_more}, run, tracking.Tracker(folder), publisher.Publisher(paths)
        )

    with contextlib.redirect_stdout(io.StringIO()):
        whole, alone = median_times(epoch, steps)
    whole, alone = whole / len(fold.training), alone / len(fold.training)
    what = f"a whole epoch with checkpoint, an example of {frames} frames"
    return [row(what, "its steps alone", 1e3 * whole, 1e3 * alone, "ms", "≤ 1.08 ×", faster=False)]


def benchmark_memory(folder):
    """Return rows: the peak memory of train.py and the time to load, at UrbanSound8K's size."""
    data = folder / "full"
    # Few clips to train on: memory is that of the features and of one step, and testing is quicker.
    write_random_data(data, [400, SCALES[1] - 1200, 800])
    size = (data / "features.pkl").stat().st_size
    command = [sys.executable, REPOSITORY / "train.py", "--folds", "0", "--epochs", "1", "--validation", "next_fold"]
    peak = peak_memory([*command, "--processed_dir", data, "--assets_dir", folder / "assets"])
    bare = peak_memory([sys.executable, "-c", "import torch"])
    # In a process of its own each: memory that the allocator has kept would make the second reading the faster one.
    load = f"import data_loader; from pathlib import Path; data_loader.load_processed(Path({str(data)!r}))"
    read = f"import data_loader, numpy; numpy.fromfile({str(data / 'features.pkl')!r}, 'uint8')"
    none = "import data_loader, numpy"
    ours, raw, start = median_times(
        *(lambda code=code: run_command([sys.executable, "-c", code]) for code in (load, read, none))
    )
    ours, raw = ours - start, raw - start
    allowed = (1.5 * size + bare + 600e6) / 1e6
    return [
        row("peak memory of training, 8,732 clips", "1.5 × features + import torch + 600 MB", peak / 1e6, allowed, "MB",
            "≤ 1 ×", faster=False),
        row("load the processed files, checks included", "np.fromfile of features.pkl", 1e3 * ours, 1e3 * raw, "ms",
            "≤ 1.5 ×", faster=False),
    ]  # fmt: skip


def benchmark_train(folder):
    rows = [*benchmark_step(), *benchmark_losses(), *benchmark_overhead(folder)]
    return rows + (benchmark_memory(folder) if hasattr(os, "wait4") else [])


# --- Prediction --------------------------------------------------------------------------------------------------


def benchmark_predict(folder):
    """Return rows: predict.py as a command, and the parts of a prediction once everything is loaded."""
    clip = published_clips(folder)[0]
    write_random_data(folder / "data", [20, 20])
    command = [sys.executable, "train.py", "--folds", "0", "--epochs", "1", "--validation", "none"]
    run_command([*command, "--processed_dir", folder / "data", "--assets_dir", folder])
    whole, bare = median_times(
        lambda: run_command([sys.executable, "predict.py", clip, "--assets_dir", folder]),
        lambda: run_command([sys.executable, "-c", "import torch"]),
    )
    network, info = load_model(find_model(folder / config.MODEL_DIR, 0))
    samples = audio_reader.read_audio(clip, AUDIO.sample_rate)
    warm, decode, features = median_times(
        lambda: predict.predict(network, info, audio_reader.read_audio(clip, AUDIO.sample_rate)),
        lambda: audio_reader.read_audio(clip, AUDIO.sample_rate),
        lambda: front_end.clip_features(samples, AUDIO),
        turns=20,
    )
    return [
        row("predict.py on a 4 s clip, whole command", "python -c 'import torch'", whole, bare, "s", "≤ 1.3 ×", False),
        row("a prediction in a warm process", "its decoding and resampling", 1e3 * warm, 1e3 * decode, "ms", "", False),
        row("the same", "its log-mel", 1e3 * warm, 1e3 * features, "ms", "", False),
    ]


# --- Scale -------------------------------------------------------------------------------------------------------


def preprocessing_cost(path, n_clips):
    """Return the seconds a clip, for one clip over and over, while all workers are at work."""
    results = preprocess_data.process_clips([path] * (WARM_CLIPS + n_clips), AUDIO, config.WORKERS)
    for _ in range(WARM_CLIPS):
        next(results)
    start = time.perf_counter()
    features = np.empty((n_clips, *AUDIO.shape), AUDIO.feature_dtype)
    for position in range(n_clips):
        features[position], _ = next(results)
    seconds = time.perf_counter() - start
    results.close()  # the workers' end takes half a second, however many clips there were
    return seconds / n_clips


def training_cost(n_clips):
    """Return the seconds an example: the plan of an epoch of n_clips, and some of its steps."""
    features = torch.from_numpy(random_features(n_clips))
    targets = torch.eye(10)[torch.arange(n_clips) % 10]
    rows = batches.rows_of(AUDIO.blocks, CPU)
    statistics = [torch.zeros(AUDIO.shape[0]), torch.ones(AUDIO.shape[0])]
    settings = batches.augmentation_settings()
    _, network = new_networks()
    optimizer = make_optimizer(network, {"weight_decay": 0.0, "learning_rate": 1e-3})
    slices = batches.batch_slices(n_clips, config.BATCH_SIZE)[: 2 * STEPS]

    def plan_epoch():
        return batches.plan_epoch(np.arange(n_clips), (AUDIO.n_mels, AUDIO.n_frames), settings, (0, 0, 1), CPU)

    def steps():
        for batch in slices:
            inputs, wanted = batches.training_batch(features, rows, targets, statistics, plan[batch], settings)
            train_step(network, optimizer, inputs, wanted, 0.1)

    plan = plan_epoch()
    network.train()
    planning, stepping = median_times(plan_epoch, steps)
    return planning / n_clips + stepping / (len(slices) * config.BATCH_SIZE)


def benchmark_scale(folder):
    """Return rows: cost a clip and cost an example for more and more data, against the smallest."""
    path = folder / "clip.wav"
    demo_data.write_clip(path, np.random.default_rng(0).normal(0, 0.1, 4 * AUDIO.sample_rate), AUDIO.sample_rate, None)
    rows = []
    for what, cost in (
        ("preprocess a clip of {:,}", lambda n: preprocessing_cost(path, n)),
        ("train on an example of {:,}", training_cost),
    ):
        least, *others = [1e3 * cost(n) for n in SCALES]
        reference = f"of {SCALES[0]:,}"
        for n, value in zip(SCALES[1:], others, strict=True):
            rows.append(row(what.format(n), reference, value, least, "ms", "≤ 1.1 ×", faster=False))
    return rows


# --- The table ---------------------------------------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, help="one stage alone (default: all)")
    parser.add_argument("--clips", metavar="DIR", help="preprocess the .wav files below this folder")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser.parse_args()


def main():
    args = parse_args()
    utils.keep_freed_memory()
    stages = {
        "preprocess": lambda folder: benchmark_preprocess(folder, args.clips),
        "train": benchmark_train,
        "predict": benchmark_predict,
        "scale": benchmark_scale,
    }
    rows = []
    if not args.json:
        print(f"{machine()}\n\n| what | reference | ours | reference's | ratio | to reach |\n|---|---|---|---|---|---|")
    for stage in [args.stage] if args.stage else STAGES:
        with tempfile.TemporaryDirectory() as folder:
            for values in stages[stage](Path(folder)):
                rows.append({"stage": stage, **values})
                if not args.json:
                    print(format_row(values), flush=True)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}, ensure_ascii=False))


if __name__ == "__main__":
    utils.run(main)
