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
streamed through windows of 4 s that overlap by half: the mean of their distributions is the recording's, and a timeline
says what sounds when. The model file is all that it needs. A recording that can't be predicted is named at the end,
after the others are done, and makes the exit status 2.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# Ctrl-C during the imports needs no traceback (see utils.run). A shell's background job ignores it, and goes on so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import numpy as np
import torch
from tqdm import tqdm

import utils
from audio import AUDIO_SUFFIXES, AudioSettings, clip_features, duration, find_audio_files, stream_audio, windows
from model_file import find_model, folds_in, load_model
from reports import answers
from reports.answers import Answer
from utils import UserError

VALUES_AT_ONCE = 180_000  # features in one pass of the network: 8 windows; more are no faster and take more memory
OUTPUTS = {"labels": ".txt", "plot": ".png", "explain": ".why.png"}  # flags that write a file for each recording
MAX_NAME = 200  # bytes of a file name that is made from a recording's

# --- What to predict, and with which models ----------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("recordings", nargs="*", metavar="RECORDING", help="files, folders, patterns, or - for standard input")
    add("--mic", action="store_true", help="listen to the microphone instead, until Ctrl-C")
    add("--fold_num", type=fold_or_all, default=0, help="0-indexed fold whose model predicts, or all (default: 0)")
    add("--model_dir", metavar="DIR", help="folder of model files, one file, or hf://owner/name (default: models/)")
    add("--processed_dir", metavar="DIR", help="check the model's class names against this data set's")
    add("--window_seconds", type=utils.positive_float, metavar="S", help="of a long recording (default: a clip's 4 s)")
    add("--hop_seconds", type=utils.positive_float, metavar="S", help="from window to window (default: half a window)")
    add("--top_k", type=utils.positive_int, metavar="K", help="show the K likeliest classes alone")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a JSON object a line")
    output.add_argument("--quiet", action="store_true", help="print the class alone; an empty line for what failed")
    written = parser.add_argument_group("files to write; a PATH is a folder if it ends in / or for several recordings")
    written.add_argument("--csv", metavar="FILE", help="all timelines in a table: file, start, end, class, confidence")
    written.add_argument("--labels", metavar="PATH", help="the timeline as labels for Audacity")
    written.add_argument("--plot", metavar="PATH", help="a picture of waveform, log-mel and timeline")
    written.add_argument("--explain", metavar="PATH", help="a picture of what the decision depends on")
    args = parser.parse_args()
    if args.mic == bool(args.recordings):
        parser.error("name either recordings or --mic")
    for flag in ("csv", *OUTPUTS):
        path = getattr(args, flag) or ""
        if Path(path).suffix.lower() in AUDIO_SUFFIXES:
            raise UserError(f"--{flag} {path} is the name of a recording, which would be overwritten: name another")
    return args


def fold_or_all(text):
    """argparse type: a fold number, or "all"."""
    return text if text == "all" else int(text)


def find_recordings(names):
    """Return the files that names, folders and patterns stand for, in order, each once; - stays as it is.

    UserError for no name, a folder without recordings and a pattern without files. Any other name is checked when it
    is opened.
    """
    found = []
    for name in names:
        path = Path(name)
        if not name:
            raise UserError("a recording's name is empty: name a file or a folder (. is the current one)")
        if os.path.isdir(path):  # False, without an error, where the path can't be looked at
            files = find_audio_files(path)
            if not files:
                suffixes = " ".join(sorted(AUDIO_SUFFIXES))
                raise UserError(f"no recordings in {path}: their names must end in one of {suffixes}")
        elif glob.has_magic(name) and not os.path.exists(path):
            files = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
            if not files:
                raise UserError(f"no file is called {name}: check the pattern")
        else:
            files = [name if name == "-" else path]
        found += files
    return list(dict.fromkeys(found))


def find_models(args):
    """Return the model files that the command line asks for: of one fold or all, from a folder or the Hub."""
    if args.model_dir and args.model_dir.startswith("hf://"):
        from services import hub

        repo_id = args.model_dir.removeprefix("hf://")
        folds = hub.model_folds(repo_id) if args.fold_num == "all" else [args.fold_num]
        return [hub.fetch_model(repo_id, fold) for fold in folds]
    model_dir = utils.run_folders(args).models
    if args.fold_num != "all" or model_dir.is_file():
        return [find_model(model_dir, args.fold_num)]
    return [find_model(model_dir, fold) for fold in folds_in(model_dir) or [0]]  # 0: its error says what is missing


def load_models(paths):
    """Return [(network, info)] of model files. UserError if their classes or settings differ: they are not of a run."""
    models = [load_model(path) for path in paths]
    for path, (_, info) in zip(paths, models, strict=True):
        for key in ("class_names", "audio", "settings"):
            if info.get(key) != models[0][1].get(key):
                raise UserError(f"{path} and {paths[0].name} differ in {key}, so they have no mean: --fold_num N")
    return models


def check_class_names(processed_dir, info):
    """Raise a UserError if a data set's class names are not the model's."""
    names = utils.load_pickle(utils.home_path(processed_dir) / "class_mapping.pkl")
    model_names = dict(zip(info["class_ids"], info["class_names"], strict=True))
    if str(names) != str(model_names):  # as text: an untrusted file may hold values that can't be compared
        found = utils.one_line(names)
        raise UserError(f"{processed_dir} has the classes {found}, and the model was trained on {model_names}")


# --- One recording -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def distributions_of(features, models):
    """Return the class probabilities of clips, (B, classes): the mean over models, [(network, info)].

    features: (B, n_mels, n_frames) in dB.
    """
    features = torch.from_numpy(features).float()
    each = [(network(features) / info.get("temperature", 1)).softmax(dim=1) for network, info in models]
    return torch.stack(each).mean(dim=0).numpy()  # (models, B, classes) -> (B, classes)


def classify(blocks, models, window_seconds=None, hop_seconds=None, watch=None):
    """Return the Answer to a recording, which is streamed through windows.

    blocks: iterable of mono samples at the models' rate; models: [(network, info)], whose distributions are averaged;
    watch: called with (first sample, samples, features, distribution) of each window. UserError for a recording without
    sound, and for models that give no probabilities.
    """
    info = models[0][1]
    audio = AudioSettings(**info["audio"])
    found = windows(blocks, *window_samples(audio, window_seconds, hop_seconds))
    edges, rows = [], []
    at_once = max(VALUES_AT_ONCE // (audio.n_mels * audio.n_frames), 1)
    while group := list(itertools.islice(found, at_once)):
        features = np.stack([clip_features(samples, audio) for _, samples in group])  # (B, n_mels, n_frames)
        distributions = distributions_of(features, models)  # (B, classes)
        if not np.isfinite(distributions).all():
            raise UserError("the model gives no probabilities for it: train or fetch the model again")
        distributions[[not samples.any() for _, samples in group]] = np.nan  # silence
        rows.append(distributions)
        for (start, samples), *results in zip(group, features, distributions, strict=True):
            edges.append((start, start + len(samples)))
            if watch:
                watch(start, samples, *results)
    probabilities = np.concatenate(rows)  # (windows, classes)
    if np.isnan(probabilities).all():
        raise UserError("it is silent: every sample is zero. Check the recording")
    starts, ends = np.array(edges).T / audio.sample_rate  # (windows,) s each
    return Answer(info["class_names"], float(ends[-1]), starts, ends, probabilities, notes=[])


def window_samples(audio, window_seconds=None, hop_seconds=None):
    """Return (length, hop) of the windows in samples. UserError for windows longer than a clip, or with gaps."""
    window_seconds = window_seconds or audio.clip_seconds
    hop_seconds = hop_seconds or window_seconds / 2
    if window_seconds > audio.clip_seconds:
        raise UserError(
            f"--window_seconds {window_seconds:g} is longer than the model's clips of {audio.clip_seconds} s: lower it"
        )
    if hop_seconds > window_seconds:
        raise UserError(f"--hop_seconds {hop_seconds:g} leaves gaps between windows of {window_seconds:g} s: lower it")
    return tuple(max(round(seconds * audio.sample_rate), 1) for seconds in (window_seconds, hop_seconds))


def predict(network, info, samples):
    """Return the class probabilities of mono samples at the model's rate, the mean over windows: (classes,) float32."""
    return classify([samples], [(network, info)]).mean


# --- The files that a command names ------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(recording):
    """Yield a recording as a path; what comes through a pipe, as - or <(...), is kept in a temporary file meanwhile."""
    if recording != "-" and not str(recording).startswith(("/dev/stdin", "/dev/fd/", "/proc/self/fd/")):
        yield recording
        return
    if recording == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("nothing comes through standard input: cat recording.wav | python predict.py -")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        try:
            with open(path, "wb") as file, open(0 if recording == "-" else recording, "rb") as pipe:
                shutil.copyfileobj(pipe, file)
        except OSError as error:
            reason = f"{name_of(recording)} can't be copied to {folder}: {error.strerror}"
            raise UserError(f"{reason}. Make room there, or name another folder with TMPDIR") from error
        yield path


def answer_to(recording, models, args, sketch):
    """Return the Answer to one recording; a bar shows the seconds of a long one.

    sketch: the reports.pictures.Sketch that every window is added to, or None.
    """
    audio = AudioSettings(**models[0][1]["audio"])
    with opened(recording) as path:
        total = round(duration(path) or 0)
        with tqdm(total=total, desc=utils.one_line(path.name), unit="s", leave=False, disable=None, delay=1) as bar:

            def watch(start, *window):
                bar.update(round(start / audio.sample_rate) - bar.n)
                if sketch:
                    sketch.add(start, *window)

            try:
                blocks = stream_audio(path, audio.sample_rate)
                answer = classify(blocks, models, args.window_seconds, args.hop_seconds, watch)
            except UserError as error:
                raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        note = answers.known_clip_note(path, [info for _, info in models], args.assets_dir, args.processed_dir)
        answer.notes += [note] if note else []
    return answer


def predict_file(recording, models, model_names, args, outputs):
    """Predict one recording: print the answer and write `outputs`, {flag: path}. Return its timeline."""
    sketch = None
    if {"plot", "explain"} & outputs.keys():
        from reports import pictures

        sketch = pictures.Sketch(AudioSettings(**models[0][1]["audio"]))
    answer, name = answer_to(recording, models, args, sketch), name_of(recording)
    if args.quiet:
        print(answer.class_names[answer.best])
    elif args.json:
        print(answers.as_json(name, answer, model_names, args.top_k))
    else:
        answers.print_answer(name, answer, model_names, args.top_k)
    if "labels" in outputs:
        answers.save_labels(outputs["labels"], answer.timeline)
    if "plot" in outputs:
        pictures.draw_recording(outputs["plot"], name, answer, sketch)
    if "explain" in outputs:
        pictures.draw_explanation(outputs["explain"], name, answer, models, sketch)
    return answer.timeline


def name_of(recording):
    """Return what a recording is called in the output."""
    return "standard input" if recording == "-" else str(recording)


def file_names(recordings):
    """Return a plain file name of at most MAX_NAME bytes for each recording, no two alike."""
    names = []
    for recording in recordings:
        plain = re.sub(r"[^\w.-]+", "_", name_of(recording)).strip("_").encode()[-MAX_NAME:].decode(errors="ignore")
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([plain], numbered) if name not in names))
    return names


def output_path(path, name, is_one_of_many):
    """Return the file that a flag's path stands for: `name` in it, if it is a folder or has to be one."""
    file = utils.home_path(path)
    is_folder = is_one_of_many or path.endswith(("/", os.sep)) or file.is_dir()
    return file / name if is_folder else file


def main():
    args = parse_args()
    utils.keep_freed_memory()  # features and network take less than half the time over a long recording
    paths = find_models(args)
    models = load_models(paths)
    model_names, info = [path.name for path in paths], models[0][1]
    if args.processed_dir:
        check_class_names(args.processed_dir, info)
    window_samples(AudioSettings(**info["audio"]), args.window_seconds, args.hop_seconds)  # checks the flags
    if args.mic:
        from services import sound

        return sound.listen_to_microphone(lambda samples: classify([samples], models).mean, info)
    recordings = find_recordings(args.recordings)
    timelines, failures, many = {}, [], len(recordings) > 1
    try:
        for recording, name in zip(recordings, file_names(recordings), strict=True):
            flags = {flag: path for flag in OUTPUTS if (path := getattr(args, flag))}
            outputs = {flag: output_path(path, name + OUTPUTS[flag], many) for flag, path in flags.items()}
            try:
                timelines[str(recording)] = predict_file(recording, models, model_names, args, outputs)
            except UserError as error:
                failures.append(utils.one_line(error, longest=1000))
                if args.json:
                    print(json.dumps({"file": str(recording), "error": str(error)}))
                elif args.quiet and many:
                    print()
    finally:  # also after Ctrl-C or an error, with what is done
        if args.csv:
            answers.save_csv(output_path(args.csv, "timelines.csv", False), timelines)
    if failures and many:
        failures.insert(0, f"{len(failures)} of {len(recordings)} recordings can't be predicted:")
    if failures:
        raise UserError("\n  ".join(failures))


if __name__ == "__main__":
    utils.run(main)
