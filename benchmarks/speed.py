"""Speed, as ratios to named references that are measured in the same run, on this machine's CPU.

    python -m benchmarks.speed                                   # every stage, about four minutes on 2 cores
    python -m benchmarks.speed --stage train                     # preprocess, train or predict alone

Prints a table: what was timed, its reference, both times, the ratio, and the goal. Ours and the reference take turns,
and each time is the median of its turns: a machine that is busy with something else slows both. benchmarks/README.md
says how to read it. Nothing is kept: data and checkpoints are synthetic and in a temporary folder.
"""

import concurrent.futures
import contextlib
import functools
import io
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in the worker processes of preprocess_data.py

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import nn

import augment
import checkpoint
import config
import data_loader
import train
import utils
from audio import AudioSettings, clip_features, read_audio
from model import AudioCNN, build_model

REPOSITORY = Path(__file__).resolve().parent.parent
AUDIO = AudioSettings()
CPU = torch.device("cpu")
SPAWN = multiprocessing.get_context("spawn")  # processes that share nothing
TURNS = 5  # of ours and the reference
CLIPS_PER_TURN = 256
CLIPS_PER_TASK = 8  # clips that a worker process takes at once
STEPS = 12  # training steps per turn
EPOCH_CLIPS = 960  # training clips of the epochs that are timed: 30 whole batches
FULL_SIZE = 8_732  # clips of UrbanSound8K
CLIP_RATE = 44_100  # Hz; stereo, 16 bit


# --- Timing ------------------------------------------------------------------------------------------------------


def median_times(*functions):
    """Return the median seconds of each function, run in turns after one call of each that is not counted."""
    times = [[] for _ in functions]
    for turn in range(TURNS + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


# A small process between: Linux counts the memory of the process that starts another to that one's peak.
PEAK = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run_command(*command):
    """Run Python with these arguments, from the root; return its peak memory in bytes. UserError if it fails."""
    command = [sys.executable, "-c", PEAK, *map(str, command)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise utils.UserError(f"python {' '.join(command[3:])} failed: see its message above")
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


# --- Synthetic data ----------------------------------------------------------------------------------------------


def clip_table(folds):
    """Return the metadata of clips of ten classes, a DataFrame. folds: (clips,) 1 to 10."""
    index = np.arange(len(folds))
    columns = {"slice_file_name": [f"{i}.wav" for i in index], "fsID": index, "start": 0, "end": 4, "salience": 1}
    classes = {"fold": folds, "classID": index % 10, "class": [f"class {i % 10}" for i in index]}
    return pd.DataFrame({**columns, **classes})


def write_random_data(folder, clips_per_fold):
    """Write the processed files of clips of noise; return their Processed. clips_per_fold: clips of fold 1, 2, ..."""
    folds = np.repeat(np.arange(1, len(clips_per_fold) + 1), clips_per_fold)
    rng = np.random.default_rng(0)
    features = np.empty((len(folds), *AUDIO.shape), AUDIO.feature_dtype)
    for start in range(0, len(features), 100):  # little memory beside the features themselves
        features[start : start + 100] = rng.normal(-40, 10, features[start : start + 100].shape)
    data_loader.save_processed(folder, features, clip_table(folds), AUDIO, "random")
    return data_loader.load_processed(folder)


def write_clip(folder):
    """Write a clip of 4 s of noise in the format that most of UrbanSound8K has; return its path."""
    samples = np.random.default_rng(0).normal(0, 0.1, (4 * CLIP_RATE, 2)).clip(-1, 1)  # (samples, channels)
    soundfile.write(folder / "clip.wav", samples, CLIP_RATE, subtype="PCM_16")
    return folder / "clip.wav"


# --- Preprocessing -----------------------------------------------------------------------------------------------


def our_clip(path):
    """Return the log-mel of a clip, (n_mels, n_frames), as preprocess_data.py makes it."""
    return clip_features(read_audio(path, AUDIO.sample_rate), AUDIO)


def librosa_clip(path):
    """Return the same by librosa, as most projects do."""
    import librosa

    samples, rate = librosa.load(path, sr=AUDIO.sample_rate)
    samples = librosa.util.fix_length(samples, size=AUDIO.clip_samples)
    mel = librosa.feature.melspectrogram(
        y=samples, sr=rate, n_fft=AUDIO.n_fft, hop_length=AUDIO.hop_length, n_mels=AUDIO.n_mels
    )
    return librosa.power_to_db(mel, top_db=AUDIO.top_db)


@functools.cache
def torchaudio_transforms(rate):
    """Return torchaudio's transforms for samples of this rate: resampling, mel bands, dB."""
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram, Resample

    mel = MelSpectrogram(
        AUDIO.sample_rate, AUDIO.n_fft, None, AUDIO.hop_length, n_mels=AUDIO.n_mels, norm="slaney", mel_scale="slaney"
    )
    return nn.Sequential(Resample(rate, AUDIO.sample_rate), mel, AmplitudeToDB())


def torchaudio_clip(path):
    """Return about the same by torchaudio (it pads and limits differently); soundfile decodes."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    return torchaudio_transforms(rate)(torch.from_numpy(samples.mean(axis=1))).numpy()  # (n_mels, frames)


def benchmark_preprocess(folder):
    """Yield rows: milliseconds a clip, by one process each and by all cores together."""
    paths = [write_clip(folder)] * CLIPS_PER_TURN
    few = paths[: CLIPS_PER_TURN // 8]
    torch.set_num_threads(1)  # of torchaudio: one core each
    with concurrent.futures.ProcessPoolExecutor(config.WORKERS, SPAWN, utils.keep_freed_memory) as pool:
        *each, together = median_times(
            lambda: [librosa_clip(path) for path in few],
            lambda: [torchaudio_clip(path) for path in few],
            lambda: [our_clip(path) for path in few],
            lambda: list(pool.map(our_clip, paths, chunksize=CLIPS_PER_TASK)),
        )
    torch.set_num_threads(config.WORKERS)
    by_librosa, by_torchaudio, alone = (1e3 * seconds / len(few) for seconds in each)
    together = 1e3 * together / len(paths)
    yield row(f"preprocess a clip, {config.WORKERS} processes", "librosa, one process", together, by_librosa, "≥ 5 ×")
    yield row("the same, one process", "librosa, one process", alone, by_librosa)
    yield row("the same, one process", "torchaudio's MelSpectrogram, one process", alone, by_torchaudio)


# --- Training ----------------------------------------------------------------------------------------------------


class PlainCNN(AudioCNN):
    """AudioCNN as a plain loop has it: torch's own layers, ReLU before pooling, NCHW. The same weights fit."""

    def __init__(self, n_classes, n_mels, block_dropout, head_dropout):
        super().__init__(n_classes, n_mels, block_dropout, head_dropout)
        for name in ("block1", "block2", "block3"):
            convolution, norm, pool, relu, dropout = getattr(self, name)
            setattr(self, name, nn.Sequential(convolution, norm, relu, pool, dropout))

    def normalise(self, features):
        return ((features - self.band_mean[:, None]) / self.band_std[:, None]).unsqueeze(1)  # (B, 1, n_mels, frames)


def random_examples(n_clips, n_frames=AUDIO.n_frames):
    """Return noise as a training batch: features (n_clips, n_mels, n_frames) in dB, one-hot targets (n_clips, 10)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n_clips, AUDIO.n_mels, n_frames, generator=generator)
    return features * 10 - 40, torch.eye(10)[torch.arange(n_clips) % 10]


def plain_loop(network, features, targets):
    """Train on the examples once, as most tutorials do: float32, NCHW, DataLoader, Adam."""
    data = torch.utils.data.TensorDataset(features, targets)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    for inputs, labels in torch.utils.data.DataLoader(data, config.BATCH_SIZE):
        loss = nn.functional.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # as they add it to a sum, to print it


def our_steps(network, settings, features, targets):
    """Train on the examples once, with the steps of train.py and none of its epochs."""
    optimizer = train.make_optimizer(network, settings)
    network.train()
    for batch in augment.batch_slices(len(features), settings["batch_size"]):
        train.train_step(network, optimizer, features[batch], targets[batch], settings)


def benchmark_step(settings):
    """Yield a row: a training step on whole clips against the plain loop."""
    plain = PlainCNN(10, AUDIO.n_mels, config.BLOCK_DROPOUT, config.HEAD_DROPOUT)
    network = build_model({**settings, "model": "AudioCNN"}, 10, AUDIO)
    examples = random_examples(config.BATCH_SIZE * STEPS)
    times = median_times(lambda: plain_loop(plain, *examples), lambda: our_steps(network, settings, *examples))
    theirs, ours = (1e3 * seconds / len(examples[0]) for seconds in times)
    yield row(f"AudioCNN: a training step, an example of {AUDIO.n_frames} frames", "plain loop", ours, theirs, "≥ 5 ×")


def make_fold(folder, data, **changed):
    """Return (fold, run): fold 0 of `data` and its run in a folder, with settings changed from config.py's."""
    settings = train.training_settings(SimpleNamespace(validation="none", **changed), data)
    paths = SimpleNamespace(checkpoints=folder / "checkpoints", models=folder / "models", results=folder / "results")
    run = checkpoint.Run(paths, settings, [0])
    return train.make_fold(0, data, torch.from_numpy(data.features), settings, run, CPU), run


def one_epoch(fold, run):
    """Train a fold's next epoch as train.py does, with checkpoint and the line that it prints."""
    epoch = fold.newest["epoch"] + 1 if fold.newest else 1
    no_services = SimpleNamespace(after_epoch=lambda *_: None)
    with contextlib.redirect_stdout(io.StringIO()):
        train.train_fold(fold, {**run.settings, "epochs": epoch}, run, no_services)


def benchmark_epoch(folder, data):
    """Yield rows: whole epochs of train.py against their steps alone, and against plain blocks."""
    fold, run = make_fold(folder / "fast", data)
    plain = make_fold(folder / "plain", data, fast_blocks=False)
    n_clips, n_frames = len(fold.training), augment.crop_length(AUDIO.n_frames, run.settings)
    examples = random_examples(n_clips, n_frames)
    functions = {
        "epoch": lambda: one_epoch(fold, run),
        "steps": lambda: our_steps(fold.network, run.settings, *examples),
        "plain": lambda: one_epoch(*plain),
    }
    times = [1e3 * seconds / n_clips for seconds in median_times(*functions.values())]
    times = dict(zip(functions, times, strict=True))
    what = f"{config.MODEL}: a whole epoch, an example of {n_frames} frames"
    yield row(what, "its steps alone", times["epoch"], times["steps"], "≤ 1.08 ×", faster=False)
    yield row(what, "the same with FAST_BLOCKS = False", times["epoch"], times["plain"])


def benchmark_memory(folder):
    """Yield a row: the peak memory of train.py at UrbanSound8K's size."""
    # Few clips to train on: memory is that of the features and of one step, and testing is quicker.
    write_random_data(folder, [400, FULL_SIZE - 1200, 800])
    path = folder / "features.pkl"
    flags = ["--folds", 0, "--epochs", 1, "--processed_dir", folder, "--assets_dir", folder / "assets"]
    peak, bare = run_command("train.py", *flags), run_command("-c", "import torch")
    bound = (1.5 * path.stat().st_size + bare + 600e6) / 1e6
    what = f"peak memory of training, {FULL_SIZE:,} clips"
    yield row(what, "1.5 × features + import torch + 600 MB", peak / 1e6, bound, "≤ 1 ×", "MB", faster=False)


def benchmark_train(folder):
    data = write_random_data(folder / "data", [20, EPOCH_CLIPS])
    yield from benchmark_step(train.training_settings(SimpleNamespace(), data))
    yield from benchmark_epoch(folder, data)
    yield from benchmark_memory(folder / "full")


# --- Prediction --------------------------------------------------------------------------------------------------


def benchmark_predict(folder):
    """Yield rows: predict.py as a command, by torch and by an .onnx file."""
    clip = write_clip(folder)
    write_random_data(folder / "data", [20, 20])
    run_command("train.py", "--folds", 0, "--epochs", 1, "--validation", "none", "--assets_dir", folder)
    ours, onnx, bare = median_times(
        lambda: run_command("predict.py", clip, "--assets_dir", folder),
        lambda: run_command("predict.py", clip, "--model_dir", "models/urban_sounds.onnx"),
        lambda: run_command("-c", "import torch"),
    )
    reference = "python -c 'import torch'"
    yield row("predict.py on a 4 s clip, whole command", reference, ours, bare, "≤ 1.3 ×", "s", False)
    yield row("the same with an .onnx file", reference, onnx, bare, "≤ 0.35 ×", "s", False)


# --- The table ---------------------------------------------------------------------------------------------------

STAGES = {"preprocess": benchmark_preprocess, "train": benchmark_train, "predict": benchmark_predict}


def row(what, reference, ours, theirs, goal="", unit="ms", faster=True):
    """Return one row of the table; its ratio is theirs / ours (how many times faster), or ours / theirs (a share)."""
    ratio = theirs / ours if faster else ours / theirs
    values = {"what": what, "reference": reference, "ours": ours, "theirs": theirs, "unit": unit}
    return {**values, "ratio": ratio, "goal": goal}


def format_row(values):
    """Return a row as a line of a Markdown table."""
    ours, theirs = (f"{values[key]:,.{0 if values[key] >= 100 else 2}f} {values['unit']}" for key in ("ours", "theirs"))
    cells = values["what"], values["reference"], ours, theirs, f"{values['ratio']:.2f}", values["goal"]
    return f"| {' | '.join(cells)} |"


def machine():
    """Return what the times depend on, in one line."""
    bf16 = ", bf16" if utils.computes_in_bfloat16(CPU) else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{platform.machine()}, {config.WORKERS} cores, {torch.backends.cpu.get_cpu_capability()}{bf16}, {versions}"


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, help="one stage alone (default: all)")
    args = parser.parse_args()
    utils.keep_freed_memory()
    print(f"{machine()}\n\n| what | reference | ours | reference's | ratio | goal |\n|---|---|---|---|---|---|")
    for stage in [args.stage] if args.stage else STAGES:
        with tempfile.TemporaryDirectory() as folder:
            for values in STAGES[stage](Path(folder)):
                print(format_row(values), flush=True)


if __name__ == "__main__":
    utils.run(main)
