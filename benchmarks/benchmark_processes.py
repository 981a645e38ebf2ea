"""What more processes bring, and what larger data costs: wall time, speed-up and memory, on this machine.

    python -m benchmarks.benchmark_processes                                   # folds and memory, about 25 minutes on 2 cores
    python -m benchmarks.benchmark_processes --stage folds --processes 1,2,4   # train.py by torchrun with so many processes
    python -m benchmarks.benchmark_processes --stage memory --clips 2000,200000

Prints a table for each stage. Memory is that of a command with all its processes at its peak: `own` is what they hold
by themselves, `mapped` what the system keeps for them of files and takes back when it needs room; what several share
counts once (Linux' proportional set size). Data, clips and checkpoints are synthetic and in a temporary folder; 200,000
clips take 9 GB of disk.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import data_loader
import demo_data
import utils
from reports import report
from utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = ("folds", "memory")
FOLDS_CLIPS = 4_000
FOLDS = "0-3"
LINKED_FILES = 100  # real files behind the synthetic clips of any number
WRITTEN_CLIPS = 1_000  # at once
SAMPLE_SECONDS = 0.25  # between two looks at a command's memory
MEMORY_CLIPS = "2000,20000,200000"
# Of the training whose memory is looked at: short, as the features' size does not depend on it.
SHORT = "--model", "AudioCNN", "--crop_frames", 16
AUDIO = data_loader.AudioSettings()


# --- A command, its time and its memory ------------------------------------------------------------------------------


def family(pid):
    """Return a process and all that it has started, as process ids."""
    found = [pid]
    for each in found:
        for tasks in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def memory_of(pid):
    """Return (own, mapped) memory of a process and all that it has started, in bytes."""
    own = mapped = 0
    for each in family(pid):
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
        except OSError:  # ended meanwhile
            continue
        values = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
        own += values["Pss_Anon"]
        mapped += values["Pss_File"]
    return own, mapped


def measure(command, env=None):
    """Run a command and return (its seconds, its output, its own memory and mapped memory at their peaks, bytes)."""
    start, own, mapped = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as output:
        env = {**os.environ, **(env or {})}
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            here = memory_of(process.pid)
            own, mapped = max(own, here[0]), max(mapped, here[1])
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise UserError(f"{' '.join(map(str, command[:4]))} ... ended with {process.returncode}: {text[-2000:]}")
    return seconds, text, own, mapped


# --- Synthetic data of any size --------------------------------------------------------------------------------------


def clip_rows(n_clips):
    """Return the metadata rows of n clips, in ten folds and ten classes."""
    same = {"fsID": 0, "start": 0, "end": 4, "salience": 1}
    return [
        {
            "slice_file_name": f"{n}.wav",
            "fold": 1 + n % 10,
            "classID": n // 10 % 10,
            "class": f"class {n // 10 % 10}",
            **same,
        }
        for n in range(n_clips)
    ]


def write_features(folder, n_clips):
    """Write the processed files of n clips of noise."""
    rng = np.random.default_rng(0)
    with data_loader.features_writer(folder, AUDIO) as append:
        for start in range(0, n_clips, WRITTEN_CLIPS):
            shape = (min(WRITTEN_CLIPS, n_clips - start), *AUDIO.shape)
            append(rng.standard_normal(shape, np.float32) * 10 - 40)
    data_loader.save_tables(folder, clip_rows(n_clips), AUDIO, "random", [])


def write_data_set(folder, n_clips):
    """Write a data set of n clips: as many names, for a few files of 4 s."""
    demo_data.make_miniature(folder / "few", folds=1, clips_per_class=LINKED_FILES // 10)
    files = sorted((folder / "few" / "audio").rglob("*.wav"))
    rows = clip_rows(n_clips)
    for row, number in zip(rows, range(n_clips), strict=True):
        path = folder / "audio" / f"fold{row['fold']}" / row["slice_file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[number % len(files)], path)
    (folder / "metadata").mkdir()
    lines = [",".join(data_loader.CLIP_COLUMNS)]
    lines += [",".join(str(row[column]) for column in data_loader.CLIP_COLUMNS) for row in rows]
    (folder / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")


# --- Stages ----------------------------------------------------------------------------------------------------------


def benchmark_folds(folder, numbers):
    """Return a table: the same folds trained by so many processes, with all cores each time."""
    write_features(folder / "data", FOLDS_CLIPS)
    cores = os.cpu_count()
    cases = [(1, 1), *((number, max(cores // number, 1)) for number in numbers)]
    rows, first = [], None
    for number, threads in dict.fromkeys(cases):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}"]
        command = [*(launcher if number > 1 else [sys.executable]), REPOSITORY / "train.py", "--folds", FOLDS]
        command += ["--epochs", 1, "--processed_dir", folder / "data", "--assets_dir", folder / f"{number}_{threads}"]
        seconds, _, own, mapped = measure(command, {"OMP_NUM_THREADS": str(threads)})
        first = first or seconds
        rows.append([number, threads, f"{seconds:.0f} s", f"{first / seconds:.2f}", megabytes(own), megabytes(mapped)])
    return report.table(["processes", "threads each", "wall time", "speed-up", "own memory", "mapped"], rows)


def benchmark_memory(folder, numbers):
    """Return a table: preprocessing, and training one epoch of one fold, on so many clips."""
    rows = []
    for n_clips in numbers:
        place = folder / str(n_clips)
        write_data_set(place / "set", n_clips)
        command = [sys.executable, REPOSITORY / "preprocess_data.py", "--data_dir", place / "set"]
        seconds, _, own, mapped = measure([*command, "--assets_dir", place])
        rows.append([f"preprocess {n_clips:,} clips", f"{seconds:.0f} s", megabytes(own), megabytes(mapped)])
        command = [sys.executable, REPOSITORY / "train.py", "--folds", 0, "--epochs", 1, *SHORT]
        seconds, _, own, mapped = measure([*command, "--assets_dir", place])
        rows.append([f"train on {n_clips:,} clips", f"{seconds:.0f} s", megabytes(own), megabytes(mapped)])
        shutil.rmtree(place)
    return report.table(["what", "wall time", "own memory", "mapped"], rows)


def megabytes(n_bytes):
    return f"{n_bytes / 1e6:,.0f} MB"


# --- Command line ----------------------------------------------------------------------------------------------------


def numbers(text):
    """argparse type: whole numbers with commas between."""
    return [utils.positive_int(part) for part in text.split(",")]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="default: all")
    parser.add_argument("--processes", type=numbers, default=[1, os.cpu_count()], help="default: 1 and one a core")
    parser.add_argument("--clips", type=numbers, default=numbers(MEMORY_CLIPS), help=f"default: {MEMORY_CLIPS}")
    parser.add_argument("--temporary_dir", type=Path, help="where to make the temporary folder")
    return parser.parse_args()


def main():
    args = parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this reads memory from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(dir=args.temporary_dir) as folder:
        for stage in [args.stage] if args.stage else STAGES:
            if stage == "folds":
                print(benchmark_folds(Path(folder) / stage, args.processes))
            else:
                print(benchmark_memory(Path(folder) / stage, args.clips))


if __name__ == "__main__":
    utils.run(main)
