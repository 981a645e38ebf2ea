"""Stage 2: turn the data set's clips into log-mel spectrograms, and store them as pickles for training.

    python preprocess_data.py                     # <assets>/data/UrbanSound8K -> <assets>/data
    python preprocess_data.py --data_dir ~/UrbanSound8K --workers 8

Prints a progress bar, the clips per fold and class, and what was written. Running it again does nothing while the
files are there and fit config.py's audio settings. A clip that is missing or can't be decoded is named and stops the
run before anything is written, unless --allow_missing leaves such clips out.
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

from tqdm import tqdm

import config
import utils
from audio import AudioSettings, clip_features, read_audio
from utils import UserError

if __name__ != "__mp_main__":  # the worker processes import this file too, and start faster without pandas
    import data_loader

CLIPS_PER_TASK = 8  # clips a worker takes at a time: enough to make messages cheap, few enough to stop quickly
TASKS_AHEAD = 4  # per worker, of the result that is next: few enough that memory does not grow with the data


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
    add("--output_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    add("--workers", type=utils.positive_int, default=config.WORKERS, help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="make the files again, whatever is there")
    add("--allow_missing", action="store_true", help="leave out clips that are missing or unreadable")
    return parser.parse_args()


# --- Worker processes --------------------------------------------------------------------------------------------


def process_clips(paths, audio, workers):
    """Yield (features (n_mels, n_frames), None) of each clip, or (None, the reason) if it can't be read, in order.

    The same bits for any number of `workers`. UserError if one of them is killed.
    """
    groups = [paths[start : start + CLIPS_PER_TASK] for start in range(0, len(paths), CLIPS_PER_TASK)]
    if len(groups) <= 1:  # done before a worker has started
        yield from process_group(paths, audio)
        return
    pool = start_pool(min(workers, len(groups)))
    tasks = collections.deque()
    try:
        for group in groups:
            tasks.append(pool.submit(process_group, group, audio))
            if len(tasks) > TASKS_AHEAD * workers:
                yield from tasks.popleft().result()
        while tasks:
            yield from tasks.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, out of memory perhaps: try fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def process_group(paths, audio):
    """Return the results of a few clips: see `process_clips`."""
    results = []
    for path in paths:
        try:
            results.append((clip_features(read_audio(path, audio.sample_rate), audio), None))
        except UserError as error:
            results.append((None, str(error)))
    return results


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
    clips = data_loader.read_clip_table(data_loader.find_dataset(data_dir)[0])
    with utils.only_one(output_dir, "preprocess_data.py"):
        data_loader.install(output_dir / "new", output_dir)  # what a kill has cut short
        if not args.overwrite and (stored := clips_stored(output_dir, clips, args.allow_missing)):
            count = f"all {stored}" if stored == len(clips) else f"{stored} of {len(clips)}"
            print(f"Nothing to do: {output_dir} holds the features of {count} clips (--overwrite: again)")
        else:
            preprocess(clips, data_dir, output_dir, args)
    if config.HF_REPO_ID:
        from services import hub

        hub.upload_processed(output_dir, config.HF_REPO_ID)


def clips_stored(output_dir, clips, allow_missing):
    """Return how many clips' features output_dir holds, if they are these clips'; else 0.

    UserError if it holds different ones, or features of different settings: the user decides.
    """
    if not all((output_dir / name).is_file() for name in data_loader.PROCESSED_FILES):
        return 0
    info = data_loader.read_info(output_dir)
    data_loader.check_audio_settings(info["audio"])
    left_out = info["left_out"] if allow_missing else []
    # The lines of both tables, as clips.csv has them, below the header.
    listed = data_loader.table_text(clips[~clips["slice_file_name"].isin(left_out)]).splitlines()[1:]
    stored = (output_dir / "clips.csv").read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    if stored == listed:
        return len(stored)
    new = len(set(listed) - set(stored))
    raise UserError(
        f"{output_dir} holds {len(stored)} clips and the data set lists {len(listed)}, {new} of them new or changed: "
        "run with --overwrite to make the files again, or with a different --output_dir"
    )


def preprocess(clips, data_dir, output_dir, args):
    """Make the processed files of `clips` and print what is in them."""
    audio = AudioSettings()
    places = "fold" + clips["fold"].astype(str) + "/" + clips["slice_file_name"]
    paths = [data_loader.find_dataset(data_dir)[1] / place for place in places]
    report_oddities(data_dir, clips, paths)
    start = time.perf_counter()
    left_out = {path.name: "no such file" for path in paths if not path.is_file()}
    report_left_out(left_out, args.allow_missing)
    paths = [path for path in paths if path.name not in left_out]
    try:
        with data_loader.replacing(output_dir) as new:
            unreadable = write_features(new, paths, audio, args.workers)
            report_left_out(unreadable, args.allow_missing)
            left_out |= unreadable
            if len(left_out) == len(clips):
                raise UserError(f"no clip of {data_dir} could be read: run python download_data.py --force")
            clips = clips[~clips["slice_file_name"].isin(left_out)].reset_index(drop=True)
            data_loader.save_tables(new, clips, audio, data_dir.resolve().name, sorted(left_out))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. Nothing was changed; the same command starts again.") from None
    seconds = time.perf_counter() - start
    print_counts(clips)
    print(
        f"{len(clips)} clips in {seconds:.1f} s ({len(clips) / seconds:.0f} clips/s)"
        + (f", {len(left_out)} left out" if left_out else "")
        + f" -> {output_dir}: features {(len(clips), *audio.shape)} {audio.feature_dtype}, "
        + f"{(output_dir / 'features.pkl').stat().st_size / 1e6:,.0f} MB"
    )


def write_features(folder, paths, audio, workers):
    """Write features.pkl of those recordings that can be read. Return {file name: reason} of the others."""
    unreadable = {}
    with data_loader.features_writer(folder, audio) as append:
        results = tqdm(process_clips(paths, audio, workers), "log-mel", len(paths), unit="clip", disable=None)
        for path, (features, reason) in zip(paths, results, strict=True):
            if reason:
                unreadable[path.name] = reason
            else:
                append(features[None])  # (1, n_mels, n_frames)
    return unreadable


def report_left_out(left_out, allow_missing):
    """Print each clip that can't be used and why. UserError unless the user allowed it."""
    for name, reason in left_out.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    if left_out and not allow_missing:
        raise UserError(
            f"{len(left_out)} of the metadata's clips, named above, can't be used, and nothing was written: get them "
            "again (python download_data.py --force), or leave them out with --allow_missing"
        )


def report_oddities(data_dir, clips, paths):
    """Print what is worth knowing about a data set, the table and paths of its clips, and is left as it is."""
    if extra := len(set(data_dir.glob("audio/fold*/*.wav")).difference(paths)):
        print(f"{extra} WAV files that the metadata does not list are ignored")
    folds_of = clips.groupby("fsID")["fold"].nunique()
    if len(straddling := sorted(folds_of.index[folds_of > 1])):
        print(f"recordings with clips in more than one fold, as the data set has them: {', '.join(straddling)}")


def print_counts(clips):
    """Print clips per class and fold."""
    counts = clips.groupby(["classID", "class", "fold"]).size().unstack(fill_value=0)  # classes x folds
    print(f"{'class':<18}" + "".join(f"{f'fold {fold}':>8}" for fold in counts.columns) + f"{'all':>8}")
    for (_, name), row in counts.iterrows():
        print(f"{name:<18}" + "".join(f"{count:>8}" for count in row) + f"{sum(row):>8}")


if __name__ == "__main__":
    utils.run(main)
