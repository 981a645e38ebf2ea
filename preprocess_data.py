"""Stage 2: turn the data set's clips into log-mel spectrograms, and store them as pickles for training.

    python preprocess_data.py                     # <assets>/data/UrbanSound8K -> <assets>/data
    python preprocess_data.py --data_dir ~/UrbanSound8K --workers 8
    python preprocess_data.py --shard 3/8         # the third of eight parts, on any machine that sees the folders
    python preprocess_data.py --join              # when all parts are there: the files as one call would have made them

Prints a progress bar, what was written, and the clips per fold and class. Running it again does nothing while the
files are there and fit config.py's audio settings. A clip that is missing or can't be decoded is named and stops the
run before anything is written, unless --allow_missing leaves such clips out.
"""

import argparse
import collections
import contextlib
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

import audio as audio_file
import config
import data_loader
import utils
from services import hub
from utils import UserError

SHARD_DIR = "shards"  # below the output folder: <k>_of_<n>/, each with a whole set of processed files
JOINED_CLIPS = 1000  # copied at once
TASKS_AT_ONCE = 2  # of a worker: one in work, one at hand
TASKS_AHEAD = 4  # per worker, of the result that is next: few enough that memory does not grow with the data
CLIPS_PER_TASK = 8  # clips a worker takes at once: enough to make the messages cheap, few enough to stop quickly
SPARE_DISK = 100e6  # bytes left free beside the processed files


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
    parser.add_argument("--output_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    parser.add_argument(
        "--workers", type=utils.positive_int, default=config.WORKERS, help="processes (default: one a core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make the files again, whatever is there")
    parser.add_argument("--allow_missing", action="store_true", help="leave out clips that are missing or unreadable")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--shard", type=parse_shard, metavar="K/N", help="make the K-th of N parts only, as in 3/8")
    parts.add_argument("--join", action="store_true", help="join the parts that --shard has made")
    return parser.parse_args()


def parse_shard(text):
    """Return (k, n) of "k/n": the k-th of n parts, counted from 1."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 3/8: the third of eight")
    return int(match[1]), int(match[2])


def clips_stored(output_dir, clips, allow_missing):
    """Return how many clips' features output_dir holds, if they are these clips'; else 0.

    UserError if it holds others: the user decides.
    """
    if not all((output_dir / name).is_file() for name in data_loader.PROCESSED_FILES):
        return 0
    info = data_loader.read_info(output_dir)
    data_loader.check_audio_settings(info["audio"])
    left_out = info["left_out"] if allow_missing else []
    wanted = [clip_key(clip) for clip in clips if clip["slice_file_name"] not in left_out]
    try:
        stored = [clip_key(clip) for clip in data_loader.read_clip_table(output_dir / "clips.csv")]
    except UserError as error:
        raise UserError(f"{error}; --overwrite makes the files again") from error
    if stored == wanted:
        return len(stored)
    new = len(set(wanted) - set(stored))
    raise UserError(
        f"{output_dir} holds {len(stored)} clips and the data set lists {len(wanted)}, {new} of them new or changed: "
        "run with --overwrite to make the files again, or with another --output_dir"
    )


def clip_key(clip):
    return clip["slice_file_name"], clip["fold"], clip["classID"]


# --- Clips -------------------------------------------------------------------------------------------------------


def process_clip(path, audio):
    """Return (features, None) of one clip, or (None, the reason) if it can't be read."""
    try:
        return audio_file.clip_features(audio_file.read_audio(path, audio.sample_rate), audio), None
    except UserError as error:
        return None, str(error)


def process_group(paths, audio):
    return [process_clip(path, audio) for path in paths]


def process_clips(paths, audio, workers):
    """Yield process_clip's result for each path, in order, from `workers` processes."""
    if len(paths) <= CLIPS_PER_TASK:  # done before a worker has started
        yield from process_group(paths, audio)
        return
    # The workers have the cores already. And the last bit of a product depends on its threads: without this, features
    # would depend on --workers.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    groups = [paths[start : start + CLIPS_PER_TASK] for start in range(0, len(paths), CLIPS_PER_TASK)]
    with contextlib.closing(map_in_order(functools.partial(process_group, audio=audio), groups, workers)) as results:
        for result in results:
            yield from result


def clip_paths(data_dir, clips):
    """Return each clip's audio file, and {name: reason} of those that are not there."""
    paths = [data_dir / "audio" / f"fold{clip['fold']}" / clip["slice_file_name"] for clip in clips]
    return paths, {path.name: "no such file" for path in paths if not path.is_file()}


def extract_features(paths, audio, workers, append):
    """Append the features of the readable clips. Return (their positions in `paths`, {name: reason} of the others)."""
    kept, unreadable = [], {}
    bar = tqdm(process_clips(paths, audio, workers), "log-mel", len(paths), unit="clip", disable=None)
    for position, (clip, reason) in enumerate(bar):
        if reason:
            unreadable[paths[position].name] = reason
        else:
            append(clip[None])  # (1, rows, n_frames)
            kept.append(position)
    return kept, unreadable


# --- Worker processes --------------------------------------------------------------------------------------------


def map_in_order(function, tasks, workers):
    """Yield function(task) for each task, in order, from `workers` processes of their own.

    function and its results are pickled; tasks: a list. UserError if a worker is killed. Closing the generator ends
    the workers.
    """
    team = {}  # connection: (process, numbers of the tasks that it has)
    sent, results = 0, {}
    try:
        for _ in range(min(workers, len(tasks))):
            connection, process = start_worker(function)
            team[connection] = process, collections.deque()
        for number in range(len(tasks)):
            while True:
                for connection, (process, has) in team.items():
                    while len(has) < TASKS_AT_ONCE and sent < min(len(tasks), number + TASKS_AHEAD * workers):
                        with death_told(process, workers):
                            connection.send(tasks[sent])
                        has.append(sent)
                        sent += 1
                if number in results:
                    break
                for connection in wait([connection for connection, (_, has) in team.items() if has]):
                    process, has = team[connection]
                    with death_told(process, workers):
                        results[has.popleft()] = connection.recv()
            yield results.pop(number)
    finally:
        for connection, (process, _) in team.items():
            connection.close()
            process.terminate()
        for process, _ in team.values():
            process.join()


def start_worker(function):
    """Return (our end of its pipe, the process) of a new worker."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, function), daemon=True)
    with interrupts_held():
        process.start()
    theirs.close()  # so that the pipe ends with the worker
    return ours, process


def work(connection, function):
    """Answer tasks until the process that sends them is gone, even if it was killed and can't say so."""
    utils.keep_freed_memory()  # fresh pages for each clip took a third of its time
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(function(connection.recv()))


@contextlib.contextmanager
def interrupts_held():
    """Keep a Ctrl-C until the block ends. It goes to every process of a terminal: those born here never see one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and lets interrupts through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is born here inherits it
    kept = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: kept.append(arguments))  # a thread of BLAS has no mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if kept and callable(handler):
            handler(*kept[0])


@contextlib.contextmanager
def death_told(process, workers):
    """Turn the end of a worker's pipe into a UserError."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        process.join()
        if process.exitcode > 0:
            raise UserError("a worker process has failed; its error stands above") from error
        raise UserError(f"a worker process was killed (out of memory?): try fewer than --workers {workers}") from error


# --- The stage ---------------------------------------------------------------------------------------------------


def report_left_out(left_out, allow_missing):
    """Print each clip that can't be used and why. UserError unless the user allowed it."""
    for name, reason in left_out.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    if left_out and not allow_missing:
        raise UserError(
            f"{len(left_out)} of the metadata's clips, named above, can't be used, and nothing was written: get them "
            "again (python download_data.py --force), or leave them out with --allow_missing"
        )


def feature_bytes(n_clips, audio):
    return n_clips * math.prod(audio.shape) * np.dtype(audio.feature_dtype).itemsize


def check_disk_space(output_dir, n_clips, audio):
    needed = feature_bytes(n_clips, audio) + SPARE_DISK
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "features.pkl.tmp").unlink(missing_ok=True)  # of a run that was killed
    remedy = "make room, or name another --output_dir"
    utils.need_space(output_dir, needed, f" and {needed / 1e6:,.0f} MB are needed: {remedy}")


def print_counts(clips):
    """Print clips per class and fold."""
    folds, counts = data_loader.count_clips(clips)
    print(f"{'class':<18}" + "".join(f"{f'fold {fold}':>8}" for fold in folds) + f"{'all':>8}")
    for name, row in counts.items():
        print(f"{name:<18}" + "".join(f"{count:>8}" for count in row) + f"{sum(row):>8}")


def report_oddities(data_dir, clips):
    """Print what is worth knowing about a data set and is left as it is."""
    listed = {(f"fold{clip['fold']}", clip["slice_file_name"]) for clip in clips}
    there = {(path.parent.name, path.name) for path in data_dir.glob("audio/fold*/*.wav")}
    if strangers := len(there - listed):
        print(f"{strangers} WAV files that the metadata does not list are ignored")
    folds_of = {}
    for clip in clips:
        folds_of.setdefault(clip["fsID"], set()).add(clip["fold"])
    if straddling := sorted(recording for recording, folds in folds_of.items() if len(folds) > 1):
        print(f"recordings with clips in more than one fold, as the data set has them: {', '.join(straddling)}")


def preprocess(clips, data_dir, output_dir, args):
    """Make the processed files of `clips` and print what is in them."""
    audio = data_loader.AudioSettings()
    check_disk_space(output_dir, len(clips), audio)
    report_oddities(data_dir, clips)
    paths, missing = clip_paths(data_dir, clips)
    report_left_out(missing, args.allow_missing)
    present = [position for position, path in enumerate(paths) if path.name not in missing]
    start = time.perf_counter()
    try:
        with data_loader.features_writer(output_dir, audio) as append:
            usable = [paths[position] for position in present]
            kept, unreadable = extract_features(usable, audio, args.workers, append)
            report_left_out(unreadable, args.allow_missing)
            if not kept:
                raise UserError(f"no clip of {data_dir} could be read")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. Nothing was changed; the same command starts again.") from None
    clips = [clips[present[position]] for position in kept]
    left_out = sorted({**missing, **unreadable})
    data_loader.save_tables(output_dir, clips, audio, data_dir.resolve().name, left_out)
    print_result(output_dir, clips, audio, left_out, time.perf_counter() - start)


def print_result(output_dir, clips, audio, left_out, seconds):
    """Print what is in the processed files, and what they took."""
    print_counts(clips)
    n_bytes = feature_bytes(len(clips), audio)
    print(
        f"{len(clips)} clips in {seconds:.1f} s ({len(clips) / seconds:.0f} clips/s)"
        + (f", {len(left_out)} left out" if left_out else "")
        + f" -> {output_dir}: features {(len(clips), *audio.shape)} {audio.feature_dtype}, {n_bytes / 1e6:,.0f} MB"
    )


# --- In parts ----------------------------------------------------------------------------------------------------


def clips_of_shard(clips, shard):
    """Return the clips of the k-th of n parts, in the order of the table: parts of the same size, within one."""
    k, n = shard
    if n > len(clips):
        raise UserError(f"--shard {k}/{n}: the data set has {len(clips)} clips, fewer than parts")
    return clips[len(clips) * (k - 1) // n : len(clips) * k // n]


def find_shards(output_dir):
    """Return the folders of all parts, in order. UserError names those that are missing."""
    there = {path.name: path for path in (output_dir / SHARD_DIR).glob("*_of_*")}
    counts = {int(match[1]) for match in (re.fullmatch(r"\d+_of_(\d+)", name) for name in there) if match}
    if len(counts) != 1:
        found = f"parts of {', '.join(map(str, sorted(counts)))}" if counts else "no parts"
        raise UserError(f"{output_dir / SHARD_DIR} has {found}: --join needs all parts of one number, as --shard 1/8")
    (n,) = counts
    names = [f"{k}_of_{n}" for k in range(1, n + 1)]
    missing = [name for name in names if name not in there or not (there[name] / "features.json").is_file()]
    if missing:
        remedy = f"python preprocess_data.py --shard {missing[0].replace('_of_', '/')}"
        raise UserError(f"{output_dir / SHARD_DIR} lacks {', '.join(missing)}: run {remedy} first")
    return [there[name] for name in names]


def join_shards(output_dir):
    """Join the parts below an output folder to the files that one call would have made, and remove the parts.

    The features go through memory JOINED_CLIPS at a time. UserError if parts are missing, damaged or do not fit.
    """
    start = time.perf_counter()
    shards = find_shards(output_dir)
    infos = [data_loader.read_info(folder) for folder in shards]
    audio = data_loader.AudioSettings()
    clips, left_out = [], []
    for folder, info in zip(shards, infos, strict=True):
        data_loader.check_audio_settings(info["audio"])
        if info["source"] != infos[0]["source"]:
            raise UserError(f"{folder} is of {info['source']} and {shards[0]} of {infos[0]['source']}: make them again")
        left_out += info["left_out"]
    check_disk_space(output_dir, sum(info["clips"] for info in infos), audio)
    with data_loader.features_writer(output_dir, audio) as append:
        for folder in tqdm(shards, "join", unit="part", disable=None):
            part = data_loader.load_processed(folder)  # checked
            for first in range(0, len(part.features), JOINED_CLIPS):
                append(part.features[first : first + JOINED_CLIPS])
            clips += part.clips
    data_loader.save_tables(output_dir, clips, audio, infos[0]["source"], sorted(left_out))
    shutil.rmtree(output_dir / SHARD_DIR)
    print_result(output_dir, clips, audio, left_out, time.perf_counter() - start)


def main():
    args = parse_args()
    data_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    output_dir = utils.folder(args.output_dir, args.assets_dir, config.PROCESSED_DIR)
    if args.join:
        with utils.only_one(output_dir, "preprocess_data.py"):
            join_shards(output_dir)
    else:
        make_processed(data_dir, output_dir, args)
    if config.HF_REPO_ID and not args.shard:
        hub.upload_processed(output_dir, config.HF_REPO_ID)


def make_processed(data_dir, output_dir, args):
    """Make the processed files, or one part of them, unless they are there."""
    clips = data_loader.read_clip_table(data_dir / "metadata" / "UrbanSound8K.csv")
    if args.shard:
        clips = clips_of_shard(clips, args.shard)
        output_dir = output_dir / SHARD_DIR / "{}_of_{}".format(*args.shard)
    with utils.only_one(output_dir, "preprocess_data.py"):
        if not args.overwrite and (stored := clips_stored(output_dir, clips, args.allow_missing)):
            count = f"all {stored}" if stored == len(clips) else f"{stored} of {len(clips)}"
            print(f"Nothing to do: {output_dir} holds the features of {count} clips (--overwrite: again)")
        else:
            preprocess(clips, data_dir, output_dir, args)


if __name__ == "__main__":
    utils.run(main)
