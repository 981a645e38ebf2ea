"""Stage 2: turn a data set's clips into log-mel spectrograms, and store them as pickles for training.

    python preprocess_data.py                     # <assets>/data/UrbanSound8K -> <assets>/data
    python preprocess_data.py --data_dir my_sounds --assets_dir ../assets/mine    # your own: a folder for each class

Prints what kind of data set it found, a progress bar, the clips per fold and class, and what was written. Running it
again does nothing while the files are there and fit config.py's audio settings. A clip that is missing or can't be
decoded is named and stops the run before anything is written, unless --allow_missing leaves such clips out.

A data set is UrbanSound8K, ESC-50, a table (metadata.csv) or a folder for each class: see data_loader.py.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import utils
from audio import MAX_HOURS, MIN_TAIL, AudioSettings, clip_features, stream_audio, windows
from utils import UserError

if __name__ != "__mp_main__":  # the worker processes import this file too, and start faster without pandas
    import data_loader

CLIPS_PER_TASK = 8  # files of one clip a worker takes at a time: makes messages cheap, and is quick to stop
SHOWN = 10  # pairs of clips that are named
SILENCE = 1e-3  # of a recording's peak (-60 dB): quieter windows at its ends make no clips
EDGE = 0.02  # s at the ends of a window that are no sound: resampling makes an offset of the converter ring there
ROUNDING = 1e-5  # of an offset: what resampling leaves of it as noise
END_SLACK = 1  # s that a table's end may lie behind a recording's, as where it is rounded
TASKS_AHEAD = 4  # per worker, of the result that is next: few enough that memory does not grow with the data


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
    add("--output_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    add("--group_by", choices=("pieces", "file"), default="pieces", help="see `read_dataset` (default: pieces)")
    add("--workers", type=utils.positive_int, default=str(config.WORKERS), help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="make the files again, whatever is there")
    add("--allow_missing", action="store_true", help="leave out clips that are missing or unreadable")
    return parser.parse_args()


# --- Worker processes --------------------------------------------------------------------------------------------


def process_clips(tasks, audio, workers):
    """Yield the clips of each recording, in order: a list of (start in s, end in s, features), or why it has none.

    tasks: [(path, what to cut)], see `cut_recording`. The same bits for any number of `workers`. UserError if one of
    them is killed.
    """
    size = CLIPS_PER_TASK if all(part is None for _, part in tasks) else 1  # a recording may have thousands of clips
    groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    if len(groups) <= 1:  # done before a worker has started
        yield from process_group(tasks, audio)
        return
    pool, ahead = start_pool(min(workers, len(groups))), collections.deque()
    try:
        for group in groups:
            ahead.append(pool.submit(process_group, group, audio))
            if len(ahead) > TASKS_AHEAD * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, out of memory perhaps: try fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def process_group(tasks, audio):
    """Return the results of a few recordings: see `process_clips`."""
    results = []
    for path, part in tasks:
        try:
            results.append(cut_recording(path, part, audio))
        except UserError as error:
            results.append(str(error))
    return results


def cut_recording(path, part, audio):
    """Return the clips of a recording, [(start in s, end in s, features (n_mels, n_frames))].

    part: None for one clip, its beginning; (start, end) in s, as text or "", for windows of a clip's length that
    overlap by half, without the silence at the ends. UserError if it can't be read, is silent, or is not as long as
    `part` says; and beyond MAX_HOURS, as its clips are held in memory.
    """
    if part is None:
        beginning = section(stream_audio(path, audio.sample_rate), 0, audio.clip_samples)
        return [(None, None, clip_features(np.concatenate([*beginning]), audio))]
    rate, length = audio.sample_rate, audio.clip_samples
    first = round(float(part[0] or 0) * rate)
    last = round(float(part[1]) * rate) if part[1] else None
    hop = max(length // 2, 1)
    clips, peaks = [], []
    for start, samples in windows(section(stream_audio(path, rate), first, last), length, hop):
        if not len(samples):
            raise UserError(f"{path} has no sound from {part[0] or 0} s on: correct its start")
        if start + len(samples) > MAX_HOURS * 3600 * rate:
            raise UserError(f"{path} is longer than {MAX_HOURS} h: cut it, or give a start and end in metadata.csv")
        peaks.append(loudness(samples, rate))
        end = (first + start + len(samples)) / rate
        clips.append(((first + start) / rate, end, clip_features(samples, audio)))
    if last is not None and end + MIN_TAIL * hop / rate + END_SLACK < last / rate:
        raise UserError(f"{path} ends at {end:.1f} s: correct its end in metadata.csv, {part[1]}, or leave that empty")
    is_loud = np.flatnonzero(np.array(peaks) > SILENCE * max(peaks))
    if not len(is_loud):
        raise UserError(f"{path} is silent: its samples are all the same. Record it again, or remove it")
    return clips[is_loud[0] : is_loud[-1] + 1]


def loudness(samples, rate):
    """Return the range of a window's samples, 0 if they are all the same: an offset of the converter is no sound."""
    edge = round(EDGE * rate) if len(samples) > 4 * EDGE * rate else 0
    inner = samples[edge : len(samples) - edge]
    span = np.ptp(inner)
    return span if span > ROUNDING * np.abs(inner).max() else 0


def section(blocks, first, last):
    """Yield the samples from index `first` to before `last` (None: to the end) of a recording's blocks."""
    position = 0
    for block in blocks:
        yield block[max(first - position, 0) : None if last is None else max(last - position, 0)]
        position += len(block)
        if last is not None and position >= last:
            return


def start_pool(workers):
    """Return a pool of processes that leave Ctrl-C to this one, which then ends them."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the workers have all cores already
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # new processes inherit it
    for _ in range(workers):
        pool.submit(int)  # starts a process, as none is idle yet
    signal.signal(signal.SIGINT, handler)
    return pool


def start_worker():
    """Set up a worker process. It ends with the process that started it, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    utils.keep_freed_memory()  # fresh pages for each clip took a third of its time
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


# --- The stage ---------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    data_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    output_dir = utils.folder(args.output_dir, args.assets_dir, config.PROCESSED_DIR)
    if os.path.realpath(output_dir) == os.path.realpath(data_dir):  # whose clips.csv may be the user's own
        raise UserError(f"{output_dir} is the data set itself: name another folder with --output_dir")
    kind, clips = data_loader.read_dataset(data_dir, args.group_by)
    print_found(data_dir, kind, clips)
    with utils.only_one(output_dir, "preprocess_data.py"):
        data_loader.install(output_dir / data_loader.NEW_FILES, output_dir)  # what a kill has cut short
        if not args.overwrite and (stored := clips_stored(output_dir, clips, args.allow_missing)):
            print(f"Nothing to do: {output_dir} holds the features of {stored} clips (--overwrite: again)")
        else:
            preprocess(clips, data_dir, output_dir, args)
    if config.HF_REPO_ID:
        from services import hub

        hub.upload_processed(output_dir, config.HF_REPO_ID)


def print_found(data_dir, kind, clips):
    """Print what kind of data set a folder holds, and how its folds were made."""
    n_classes, n_folds = clips["class"].nunique(), clips["fold"].nunique()
    print(f"{data_dir}: {kind}, {len(clips)} recordings, {n_classes} classes, {n_folds} folds")
    if "group" in clips:
        groups = clips.groupby("group").size()
        together = groups[groups > 1]
        if len(together):
            example = utils.one_line(together.index[0])
            print(f"{together.sum()} of them are in {len(together)} groups that stay in one fold, such as {example}")


def clips_stored(output_dir, clips, allow_missing):
    """Return how many clips' features output_dir holds, if they are of these recordings; else 0.

    UserError if it holds different ones, or features of different settings: the user decides.
    """
    if not all((output_dir / name).is_file() for name in data_loader.PROCESSED_FILES):
        return 0
    data = data_loader.load_processed(output_dir)  # with its checks
    info, count = data.info, len(data.labels)
    what = f"{output_dir} holds {count} clips of a different list of files, classes and folds"
    if info.get("listing") == data_loader.listing_digest(clips):
        if allow_missing or not info["left_out"]:
            return count
        what = (
            f"{output_dir} lacks {len(info['left_out'])} clips that could not be read (--allow_missing leaves them out)"
        )
    raise UserError(f"{what}: run with --overwrite to make the files again, or with a different --output_dir")


def preprocess(clips, data_dir, output_dir, args):
    """Make the processed files of `clips` and print what is in them."""
    audio = AudioSettings()
    listing = data_loader.listing_digest(clips)
    report_oddities(data_dir, clips)
    start = time.perf_counter()
    names = clips["slice_file_name"]
    is_missing = ~clips["path"].map(Path.is_file)
    left_out = dict.fromkeys(names[is_missing], "no such file")
    report_left_out(left_out, args.allow_missing)
    clips = clips[~is_missing]
    try:
        with data_loader.replacing(output_dir) as new:
            clips, unreadable = write_features(new, clips, audio, args.workers)
            left_out |= unreadable
            report_left_out(unreadable, args.allow_missing)
            if clips.empty:
                raise UserError(f"no clip of {data_dir} could be read: run python download_data.py --force")
            data_loader.save_tables(new, clips, audio, data_dir.resolve().name, sorted(left_out), listing)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. Nothing was changed; the same command starts again.") from None
    seconds = time.perf_counter() - start
    print_counts(clips)
    if "group" in clips:
        report_same_sounds(output_dir, clips)
    print(
        f"{len(clips)} clips in {seconds:.1f} s ({len(clips) / seconds:.0f} clips/s)"
        + (f", {len(left_out)} left out" if left_out else "")
        + f" -> {output_dir}: features {(len(clips), *audio.shape)} {audio.feature_dtype}, "
        + f"{(output_dir / 'features.pkl').stat().st_size / 1e6:,.0f} MB"
    )


def write_features(folder, recordings, audio, workers):
    """Write features.pkl. Return (clips, {name: reason} of the recordings that can't be read).

    clips: a row of `recordings` for each clip, in the order of the features.
    """
    is_cut = {"recording", "start", "end"} <= {*recordings}  # UrbanSound8K's and ESC-50's files are clips as they are
    parts = zip(recordings["start"], recordings["end"], strict=True) if is_cut else [None] * len(recordings)
    tasks = list(zip(recordings["path"], parts, strict=True))
    rows, starts, ends, unreadable = [], [], [], {}
    with data_loader.features_writer(folder, audio) as append:
        results = tqdm(process_clips(tasks, audio, workers), "log-mel", len(tasks), unit="file", disable=None)
        for row, found in enumerate(results):
            if isinstance(found, str):
                unreadable[recordings["slice_file_name"].iloc[row]] = found
                continue
            for start, end, features in found:
                append(features[None])  # (1, n_mels, n_frames)
                rows.append(row)
                starts.append(start)
                ends.append(end)
    clips = recordings.iloc[rows].reset_index(drop=True)
    if is_cut:
        names = clips["recording"] + [f"@{start:.2f}" for start in starts]
        clips = clips.assign(slice_file_name=names, start=np.round(starts, 3), end=np.round(ends, 3))
        if len(twice := names[names.duplicated()]):
            raise UserError(f"{twice.iloc[0]} is in two parts of a recording: correct start and end in metadata.csv")
    return clips, unreadable


def report_left_out(left_out, allow_missing):
    """Print each clip that can't be used and why. UserError unless the user allowed it."""
    for name, reason in left_out.items():
        print(f"  {utils.one_line(name)}: {utils.one_line(reason, longest=1000)}", file=sys.stderr)
    if left_out and not allow_missing:
        raise UserError(
            f"{len(left_out)} of the metadata's clips, named above, can't be used, and nothing was written: get them "
            "again (python download_data.py --force), remove them, or leave them out with --allow_missing"
        )


def report_oddities(data_dir, clips):
    """Print what is worth knowing about UrbanSound8K's table and files, and is left as it is."""
    if extra := len(set(data_dir.glob("audio/fold*/*.wav")).difference(clips["path"])):
        print(f"{extra} WAV files that the metadata does not list are ignored")
    if "fsID" not in clips:
        return
    folds_of = clips.groupby("fsID")["fold"].nunique()
    if len(straddling := sorted(folds_of.index[folds_of > 1])):
        names = utils.one_line(", ".join(straddling))
        print(f"recordings with clips in more than one fold, as the data set has them: {names}")


def report_same_sounds(output_dir, clips):
    """Name on stderr the clips of different groups that sound the same, and the remedy."""
    features = utils.load_pickle(output_dir / "features.pkl", memory_map=True)
    found = data_loader.find_same_sounds(features, clips)
    for one, other in found[:SHOWN]:
        print(f"warning: {one} and {other} sound the same and are in different groups", file=sys.stderr)
    if found:
        more = f"{len(found) - SHOWN} more pairs like these. " if len(found) > SHOWN else ""
        print(
            f"warning: {more}If one is tested by a network that trained on the other, the score flatters: remove one, "
            "or give both the same group in metadata.csv",
            file=sys.stderr,
        )


def print_counts(clips):
    """Print clips per class and fold."""
    counts = clips.groupby(["classID", "class", "fold"]).size().unstack(fill_value=0)  # classes x folds
    print(f"{'class':<18}" + "".join(f"{f'fold {fold}':>8}" for fold in counts.columns) + f"{'all':>8}")
    for (_, name), row in counts.iterrows():
        print(f"{name:<18}" + "".join(f"{count:>8}" for count in row) + f"{sum(row):>8}")


if __name__ == "__main__":
    utils.run(main)
