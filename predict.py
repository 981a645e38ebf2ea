"""Stage 4: what is that sound? Classify recordings with a trained model.

    python predict.py recording.wav                          # the model of fold 0
    python predict.py street.mp3 --csv timeline.csv --plot street.png
    python predict.py recordings/ 'more/*.wav' --json        # folders, patterns, several files
    cat recording.wav | python predict.py - --quiet          # the class alone
    python predict.py recording.wav --fold_num all           # the mean of all folds' models
    python predict.py recording.wav --model_dir hf://owner/name   # from the Hugging Face Hub
    python predict.py --mic                                  # a line a second of what the microphone hears

Prints the class, its confidence and the whole distribution as bars, the most likely class first. Any format, rate and
channel count that soundfile can decode, or ffmpeg where it is installed. A recording longer than a clip (4 s) is
streamed through windows of 4 s that overlap by half: the mean of their distributions is the file's, and a timeline says
what sounds when. --json prints an object a line: file, seconds, models, windows, class, confidence, probabilities,
timeline, notes; or file, error.

The model file is all that it needs. A recording that can't be predicted is named in the end, after the others are done,
and makes the exit status 2.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import numpy as np
import torch
from tqdm import tqdm

import audio as audio_file
import batches
import calibration
import utils
from audio import AudioSettings
from model import find_model, folds_in, load_model
from reports import answers, known_clips
from reports.answers import Answer
from utils import UserError

WINDOWS_AT_ONCE = 8  # in one pass of the network; more are no faster and take more memory
SUFFIXES = {  # of the recordings that are looked for in a folder; a file that is named may be called anything
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64"),  # soundfile's
    *(".m4a", ".aac", ".wma", ".amr", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp"),  # ffmpeg's
}

# --- What to predict, and with which models ----------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("recordings", nargs="*", metavar="RECORDING", help="files, folders, patterns, or - for standard input")
    add("--mic", action="store_true", help="listen to the microphone instead, until Ctrl-C")
    add("--fold_num", type=fold_or_all, default=0, help="0-indexed fold whose model predicts, or all (default: 0)")
    add("--model_dir", metavar="DIR", help="folder of model files, one file, or hf://owner/name (default: models/)")
    add("--from_hub", metavar="OWNER/NAME", help="the same as --model_dir hf://OWNER/NAME")
    add("--processed_dir", metavar="DIR", help="check the model's class names against this data set's")
    add("--window_seconds", type=utils.positive_float, metavar="S", help="of a long recording (default: a clip's 4 s)")
    add("--hop_seconds", type=utils.positive_float, metavar="S", help="from window to window (default: half a window)")
    add("--raw", action="store_true", help="leave out the temperature that training has fitted (calibration.py)")
    add("--top_k", type=utils.positive_int, metavar="K", help="show the K likeliest classes alone")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a JSON object a line")
    output.add_argument("--quiet", action="store_true", help="print the class alone; an empty line for what failed")
    add("--csv", type=Path, metavar="FILE", help="write the timelines: file, start, end, class, confidence")
    add("--labels", type=Path, metavar="PATH", help="write the timeline as labels for Audacity; for several: a folder")
    add("--plot", type=Path, metavar="PATH", help="draw waveform, log-mel and timeline; for several: a folder")
    add("--explain", type=Path, metavar="PATH", help="draw what the decision hangs on; for several: a folder")
    args = parser.parse_args()
    if args.mic == bool(args.recordings):
        parser.error("name either recordings or --mic")
    return args


def fold_or_all(text):
    """argparse type: a fold number, or "all"."""
    return text if text == "all" else int(text)


def find_recordings(names):
    """Return the files that names, folders and patterns stand for, in order, each once; - stays as it is.

    UserError for a folder without recordings and a pattern without files. Any other name is left to who opens it.
    """
    found = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                raise UserError(f"no recordings in {path}: their names must end in one of {' '.join(sorted(SUFFIXES))}")
        elif glob.has_magic(name) and not path.exists():
            files = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
            if not files:
                raise UserError(f"no file is called {name}: check the pattern")
        else:
            files = [name if name == "-" else path]
        found += files
    return list(dict.fromkeys(found))


def find_models(args):
    """Return the model files that the command line asks for: of one fold or all, from a folder or the Hub."""
    repo_id = args.from_hub or (args.model_dir or "").partition("hf://")[2]
    if repo_id:
        from services import hub

        folds = hub.model_folds(repo_id) if args.fold_num == "all" else [args.fold_num]
        return [hub.fetch_model(repo_id, fold) for fold in folds]
    model_dir = utils.run_folders(args).models
    if args.fold_num != "all" or model_dir.is_file():
        return [find_model(model_dir, args.fold_num)]
    return [find_model(model_dir, fold) for fold in folds_in(model_dir) or [0]]  # 0: it says what is missing


def load_models(paths):
    """Return [(network, info)] of model files. UserError if their classes or audio settings differ."""
    models = [load_model(path) for path in paths]
    for path, (_, info) in zip(paths, models, strict=True):
        for key in ("class_names", "audio"):
            if info[key] != models[0][1][key]:
                raise UserError(f"{path} and {paths[0].name} differ in {key}, so they have no mean: --fold_num N")
    return models


def check_class_names(processed_dir, info):
    """Raise a UserError if a data set's class names are not the model's."""
    names = utils.load_pickle(Path(processed_dir) / "class_mapping.pkl")
    model_names = dict(zip(info["class_ids"], info["class_names"], strict=True))
    if names != model_names:
        raise UserError(f"{processed_dir} has the classes {names}, and the model was trained on {model_names}")


# --- One recording -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def window_logits(models, windows):
    """Return the logits of windows of sound, (models, B, classes), and their features, (B, rows, n_frames).

    windows: list of B arrays of mono samples at the models' rate, up to a clip long; models: [(network, info)].
    """
    audio = AudioSettings(**models[0][1]["audio"])
    features = np.stack([audio_file.clip_features(window, audio) for window in windows])
    logits = []
    for network, info in models:
        inputs = batches.normalise(torch.from_numpy(features), batches.statistics_of(info))  # (B, 1, rows, frames)
        logits.append(network(inputs.contiguous(memory_format=torch.channels_last)))  # (B, classes)
    return torch.stack(logits), features


def classify(blocks, models, window_seconds=None, hop_seconds=None, raw=False, watch=None):
    """Return the Answer to a recording, which is streamed through windows.

    blocks: iterable of mono samples at the models' rate; models: [(network, info)], whose distributions are averaged;
    raw: leave the temperatures out; watch: called with (first sample, samples, features, distribution) of each window.
    UserError for a recording without sound, and for models that give no probabilities.
    """
    infos = [info for _, info in models]
    audio = AudioSettings(**infos[0]["audio"])
    length, hop = window_samples(audio, window_seconds, hop_seconds)
    starts, ends, rows, scores = [], [], [], []
    for group in grouped(audio_file.windows(blocks, length, hop), WINDOWS_AT_ONCE):
        logits, features = window_logits(models, [window for _, window in group])
        scaled = [calibration.probabilities(each, info, raw) for each, info in zip(logits, infos, strict=True)]
        distributions = torch.stack(scaled).mean(dim=0).numpy()  # (B, classes)
        if not np.isfinite(distributions).all():
            raise UserError("the model gives no probabilities for it: train or fetch the model again")
        for place, (start, window) in enumerate(group):
            if window.any():
                scores.append(calibration.unknown_score(logits[:, place]))  # (models,)
            else:
                distributions[place] = np.nan
            starts.append(start)
            ends.append(start + len(window))
            if watch:
                watch(start, window, features[place], distributions[place])
        rows.append(distributions)
    if not scores:
        raise UserError("it is silent: every sample is zero. Check the recording")
    starts, ends = (np.array(places) / audio.sample_rate for places in (starts, ends))
    warning = calibration.unknown_warning(torch.stack(scores).mean(dim=0), infos)
    notes = [warning] if warning else []
    return Answer(infos[0]["class_names"], float(ends[-1]), starts, ends, np.concatenate(rows), notes)


def window_samples(audio, window_seconds=None, hop_seconds=None):
    """Return (length, hop) of the windows in samples. UserError for windows longer than a clip, or with gaps."""
    window_seconds = window_seconds or audio.clip_seconds
    hop_seconds = hop_seconds or window_seconds / 2
    if window_seconds > audio.clip_seconds:
        raise UserError(
            f"--window_seconds {window_seconds:g} is longer than the model's clips of {audio.clip_seconds} s"
        )
    if hop_seconds > window_seconds:
        raise UserError(f"--hop_seconds {hop_seconds:g} leaves gaps between windows of {window_seconds:g} s")
    samples = (round(seconds * audio.sample_rate) for seconds in (window_seconds, hop_seconds))
    return tuple(max(count, 1) for count in samples)


def grouped(items, size):
    """Yield lists of up to `size` items."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def predict(network, info, samples):
    """Return the class probabilities of mono samples at the model's rate, the mean over windows: (classes,) float32."""
    return classify([samples], [(network, info)]).mean


# --- The files that a command names ------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(recording):
    """Yield a recording as a path; standard input is kept in a temporary file meanwhile."""
    if recording != "-":
        yield recording
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("nothing comes through standard input: cat recording.wav | python predict.py -")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def answer_to(path, models, args, watchers):
    """Return the Answer to one recording, with what there is to say about it. A bar shows a long one's seconds."""
    audio = AudioSettings(**models[0][1]["audio"])
    blocks = audio_file.stream_audio(path, audio.sample_rate)
    seconds = audio_file.duration(path) or 0
    with tqdm(total=round(seconds), desc=path.name, unit="s", leave=False, disable=None, delay=1) as bar:
        watchers = [*watchers, lambda start, *_: bar.update(round(start / audio.sample_rate) - bar.n)]
        try:
            answer = classify(
                blocks,
                models,
                args.window_seconds,
                args.hop_seconds,
                args.raw,
                lambda *window: [w(*window) for w in watchers],
            )
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    fold = known_clips.find_fold(path, args.assets_dir, args.processed_dir)
    if fold:
        answer.notes.insert(0, known_clips.note(fold, [info for _, info in models]))
    return answer


def predict_file(recording, models, model_names, args, n_recordings):
    """Predict one recording: print the answer and write the files that the flags ask for. Return its timeline."""
    watchers = []
    if args.plot or args.explain:
        from reports import plot_recording

        sketch = plot_recording.Sketch(AudioSettings(**models[0][1]["audio"]))
        watchers = [sketch.add]
    with opened(recording) as path:
        answer = answer_to(path, models, args, watchers)
    name = "standard input" if recording == "-" else str(recording)
    if args.quiet:
        print(answer.class_names[answer.best])
    elif args.json:
        print(answers.as_json(name, answer, model_names, args.top_k))
    else:
        answers.print_answer(name, answer, model_names, args.top_k)
    parts = answer.timeline
    if args.labels:
        answers.save_labels(path_for(args.labels, name, ".txt", n_recordings), parts)
    if args.plot:
        plot_recording.draw_recording(path_for(args.plot, name, ".png", n_recordings), name, answer, sketch)
    if args.explain:
        plot_recording.draw_explanation(
            path_for(args.explain, name, ".png", n_recordings), name, answer, models, sketch
        )
    return parts


def path_for(path, name, ending, n_recordings):
    """Return where a recording's labels or picture go: `path` for one recording, a file in that folder for several."""
    return path if n_recordings == 1 else path / (re.sub(r"[^\w.-]+", "_", name).strip("_") + ending)


def main():
    args = parse_args()
    utils.keep_freed_memory()  # features and network take less than half the time over a long recording
    paths = find_models(args)
    models = load_models(paths)
    if args.processed_dir:
        check_class_names(args.processed_dir, models[0][1])
    window_samples(AudioSettings(**models[0][1]["audio"]), args.window_seconds, args.hop_seconds)
    if args.mic:
        from services import listen

        return listen.listen_to_microphone(lambda part: classify([part], models, raw=args.raw).mean, models[0][1])
    recordings = find_recordings(args.recordings)
    timelines, failures = {}, []
    many = len(recordings) > 1
    with tqdm(recordings, "recordings", unit="file", leave=False, disable=None if many else True) as bar:
        for recording in bar:
            try:
                with bar.external_write_mode(nolock=True):
                    timelines[str(recording)] = predict_file(
                        recording, models, [path.name for path in paths], args, len(recordings)
                    )
            except UserError as error:
                failures.append(str(error))
                if args.json:
                    print(json.dumps({"file": str(recording), "error": str(error)}, ensure_ascii=False))
                elif args.quiet and many:
                    print()
    if args.csv:
        answers.save_csv(args.csv, timelines)
    if failures and many:
        raise UserError(
            f"{len(failures)} of {len(recordings)} recordings can't be predicted:\n  " + "\n  ".join(failures)
        )
    if failures:
        raise UserError(failures[0])


if __name__ == "__main__":
    utils.run(main)
