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
TURNS = 5  # of ours and the reference
CLIPS = 32  # that one process preprocesses in a turn; all together take 8 times as many
STEPS = 12  # training steps per turn
EPOCH_CLIPS = 960  # training clips of the epochs that are timed: 30 whole batches
FULL_SIZE = 8_732  # clips of UrbanSound8K
CLIP_RATE = 44_100  # Hz; stereo, 16 bit
# A small process between: Linux counts the memory of the process that starts another to that one's peak.
PEAK = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


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


def run_python(*arguments):
    """Run Python with these arguments, from the root; return its peak memory in bytes. UserError if it fails."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise utils.UserError(f"python {' '.join(command[3:])} failed: see its message above")
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def row(what, reference, ours, theirs, goal="", unit="ms"):
    """Return a line of the table. Its ratio is theirs / ours (times faster), but ours / theirs for a goal with ≤."""
    ratio = ours / theirs if goal.startswith("≤") else theirs / ours
    ours, theirs = (f"{value:,.{0 if value >= 100 else 2}f} {unit}" for value in (ours, theirs))
    return f"| {what} | {reference} | {ours} | {theirs} | {ratio:.2f} | {goal} |"


# --- Synthetic data ----------------------------------------------------------------------------------------------


def write_random_data(folder, clips_per_fold):
    """Write the processed files of clips of noise; return their Processed. clips_per_fold: clips of fold 1, 2, ..."""
    folds = np.repeat(np.arange(1, len(clips_per_fold) + 1), clips_per_fold)
    index = np.arange(len(folds))
    columns = {"slice_file_name": [f"{i}.wav" for i in index], "fsID": index, "start": 0, "end": 4, "salience": 1}
    classes = {"fold": folds, "classID": index % 10, "class": [f"class {i % 10}" for i in index]}
    rng = np.random.default_rng(0)
    features = rng.integers(-60, -20, (len(folds), *AUDIO.shape), np.int8).astype(AUDIO.feature_dtype)
    data_loader.save_processed(folder, features, pd.DataFrame({**columns, **classes}), AUDIO, "random")
    return data_loader.load_processed(folder)


def write_clip(folder):
    """Write a clip of 4 s of noise in the format that most of UrbanSound8K has; return its path."""
    samples = np.random.default_rng(0).normal(0, 0.1, (4 * CLIP_RATE, 2)).clip(-1, 1)  # (samples, channels)
    soundfile.write(folder / "clip.wav", samples, CLIP_RATE, subtype="PCM_16")
    return folder / "clip.wav"


def random_examples(n_clips, n_frames=AUDIO.n_frames):
    """Return noise as a training batch: features (n_clips, n_mels, n_frames) in dB, one-hot targets (n_clips, 10)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n_clips, AUDIO.n_mels, n_frames, generator=generator)
    return features * 10 - 40, torch.eye(10)[torch.arange(n_clips) % 10]


# --- Preprocessing -----------------------------------------------------------------------------------------------


def librosa_clip(path):
    """Return the log-mel of a clip, (n_mels, n_frames), by librosa, as most projects do."""
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


def our_clip(path):
    """Return the same as preprocess_data.py makes it."""
    return clip_features(read_audio(path, AUDIO.sample_rate), AUDIO)


def preprocessing(folder):
    """Yield the rows of a clip: by processes that have started, and by one core alone."""
    clip, spawn = write_clip(folder), multiprocessing.get_context("spawn")
    torch.set_num_threads(1)  # of torchaudio
    with concurrent.futures.ProcessPoolExecutor(config.WORKERS, spawn, utils.keep_freed_memory) as pool:
        together, *alone = median_times(
            lambda: list(pool.map(our_clip, [clip] * 8 * CLIPS, chunksize=8)),
            lambda: [our_clip(clip) for _ in range(CLIPS)],
            lambda: [librosa_clip(clip) for _ in range(CLIPS)],
            lambda: [torchaudio_clip(clip) for _ in range(CLIPS)],
        )
    torch.set_num_threads(config.WORKERS)
    together = 1e3 * together / (8 * CLIPS)
    ours, by_librosa, by_torchaudio = (1e3 * seconds / CLIPS for seconds in alone)
    yield row(f"preprocess a clip, {config.WORKERS} processes", "librosa, one process", together, by_librosa, "≥ 5 ×")
    yield row("the same, one process", "librosa, one process", ours, by_librosa)
    yield row("the same, one process", "torchaudio's MelSpectrogram, one process", ours, by_torchaudio)


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


def training_step(folder):
    """Yield the row of a training step on whole clips."""
    settings = train.training_settings(SimpleNamespace(model="AudioCNN"), write_random_data(folder, [10, 10]))
    ours = build_model(settings, 10, AUDIO)
    plain = PlainCNN(10, AUDIO.n_mels, config.BLOCK_DROPOUT, config.HEAD_DROPOUT)
    examples = random_examples(config.BATCH_SIZE * STEPS)
    seconds = median_times(lambda: our_steps(ours, settings, *examples), lambda: plain_loop(plain, *examples))
    ours, theirs = (1e3 * value / len(examples[0]) for value in seconds)
    what = f"AudioCNN: a training step, an example of {AUDIO.n_frames} frames"
    yield row(what, "plain loop", ours, theirs, "≥ 5 ×")


def make_fold(folder, data, **changed):
    """Return (fold, run): fold 0 of `data` and its run in a folder, with settings changed from config.py's."""
    settings = train.training_settings(SimpleNamespace(validation="none", **changed), data)
    run = checkpoint.Run(utils.run_folders(SimpleNamespace(assets_dir=folder)), settings, [0])
    return train.make_fold(0, data, torch.from_numpy(data.features), settings, run, torch.device("cpu")), run


def one_epoch(fold, run):
    """Train a fold's next epoch as train.py does, with checkpoint and the line that it prints."""
    epoch = fold.newest["epoch"] + 1 if fold.newest else 1
    no_services = SimpleNamespace(after_epoch=lambda *_: None)
    with contextlib.redirect_stdout(io.StringIO()):
        train.train_fold(fold, {**run.settings, "epochs": epoch}, run, no_services)


def epoch(folder):
    """Yield the rows of an epoch: what augmentation and checkpoint add to its steps, and what kernels.py gains."""
    data = write_random_data(folder, [20, EPOCH_CLIPS])
    fold, run = make_fold(folder / "fast", data)
    plain = make_fold(folder / "plain", data, fast_blocks=False)
    examples = random_examples(EPOCH_CLIPS, augment.crop_length(AUDIO.n_frames, run.settings))
    whole, steps, plain_blocks = (
        1e3 * seconds / EPOCH_CLIPS
        for seconds in median_times(
            lambda: one_epoch(fold, run),
            lambda: our_steps(fold.network, run.settings, *examples),
            lambda: one_epoch(*plain),
        )
    )
    what = f"{config.MODEL}: a whole epoch, an example of {examples[0].shape[-1]} frames"
    yield row(what, "its steps alone", whole, steps, "≤ 1.08 ×")
    yield row(what, "the same with FAST_BLOCKS = False", whole, plain_blocks)


def memory(folder):
    """Yield the row of train.py's peak memory on as many clips as UrbanSound8K has.

    It trains on few of them: memory is that of the features and of one step, and testing is quicker.
    """
    write_random_data(folder, [400, FULL_SIZE - 1200, 800])
    flags = ["--folds", 0, "--epochs", 1, "--processed_dir", folder, "--assets_dir", folder / "assets"]
    peak, bare = run_python("train.py", *flags), run_python("-c", "import torch")
    bound = 1.5 * (folder / "features.pkl").stat().st_size + bare + 600e6  # bytes
    what = f"peak memory of training, {FULL_SIZE:,} clips"
    yield row(what, "1.5 × features + import torch + 600 MB", peak / 1e6, bound / 1e6, "≤ 1 ×", "MB")


# --- Prediction --------------------------------------------------------------------------------------------------


def prediction(folder):
    """Yield the rows of predict.py as a command, by torch and by an .onnx file."""
    clip = write_clip(folder)
    write_random_data(folder / "data", [20, 20])
    run_python("train.py", "--folds", 0, "--epochs", 1, "--validation", "none", "--assets_dir", folder)
    ours, onnx, bare = median_times(
        lambda: run_python("predict.py", clip, "--assets_dir", folder),
        lambda: run_python("predict.py", clip, "--model_dir", "models/urban_sounds.onnx"),
        lambda: run_python("-c", "import torch"),
    )
    reference = "python -c 'import torch'"
    yield row("predict.py on a 4 s clip, whole command", reference, ours, bare, "≤ 1.3 ×", "s")
    yield row("the same with an .onnx file", reference, onnx, bare, "≤ 0.35 ×", "s")


STAGES = {
    "preprocess": [preprocessing],
    "train": [training_step, epoch, memory],
    "predict": [prediction],
}


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, help="one stage alone (default: all)")
    args = parser.parse_args()
    utils.keep_freed_memory()
    instructions = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()}, {config.WORKERS} cores, {instructions}, torch {torch.__version__}\n")
    print("| what | reference | ours | reference's | ratio | goal |\n|---|---|---|---|---|---|")
    for stage in [args.stage] if args.stage else STAGES:
        for rows in STAGES[stage]:
            with tempfile.TemporaryDirectory() as folder:
                for line in rows(Path(folder)):
                    print(line, flush=True)


if __name__ == "__main__":
    utils.run(main)
