"""Stage 4: what is that sound? Classify recordings with a trained model.

    python predict.py recording.wav                          # your own trained model, else the ready one
    python predict.py street.mp3 --csv timeline.csv --plot street.png
    python predict.py recordings/ 'more/*.wav' --json        # folders, patterns, several files
    cat recording.wav | python predict.py - --quiet          # the class alone
    python predict.py recording.wav --fold_num all           # the mean of all folds' models
    python predict.py recording.wav --model_dir hf://owner/name   # from the Hugging Face Hub; or a file, model.onnx
    python predict.py --mic                                  # a line a second of what the microphone hears

Prints the class, its confidence and the whole distribution as bars, the most likely class first. Any format, rate and
channel count that soundfile can decode, or ffmpeg where it is installed. A recording longer than a clip (4 s) is
streamed through windows of 4 s that overlap by half: the surest and loudest of them say what the recording is, and a
timeline says what sounds when. The model file is all that it needs. A recording that can't be predicted, or whose files
can't be written, is named at the end, after the others are done, and makes the exit status 2.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

# Ctrl-C during the imports needs no traceback (see utils.run). A shell's background job ignores it, and goes on so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

from tqdm import tqdm

import utils
from audio import AUDIO_SUFFIXES, duration, find_audio_files, stream_audio
from classifier import find_models, load, open_models
from reports import answers
from utils import UserError

__all__ = ["load"]  # for Python: see classifier.py

OUTPUTS = {"labels": ".txt", "plot": ".png", "explain": ".why.png"}  # flags that write a file for each recording
MAX_PIPE = 8_000_000_000  # bytes of a recording that comes through a pipe: 11 h at 48 kHz, 16 bits, two channels
MAX_NAME = 200  # bytes of a file name that is made from a recording's

# --- What to predict -----------------------------------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("recordings", nargs="*", metavar="RECORDING", help="files, folders, patterns, or - for standard input")
    add("--mic", action="store_true", help="listen to the microphone instead, until Ctrl-C")
    add("--fold_num", type=utils.fold_or_word, metavar="N", help="0-indexed fold whose model predicts, or all, or none")
    add("--model_dir", metavar="DIR", help="a folder, a file, or hf://owner/name (default: models/)")
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


def check_class_names(processed_dir, info):
    """Raise a UserError if a data set's class names are not the model's."""
    names = utils.load_pickle(utils.home_path(processed_dir) / "class_mapping.pkl")
    model_names = dict(zip(info["class_ids"], info["class_names"], strict=True))
    if str(names) != str(model_names):  # as text: an untrusted file may hold values that can't be compared
        found = utils.one_line(names)
        raise UserError(f"{processed_dir} has the classes {found}, and the model was trained on {model_names}")


# --- The files that a command names ------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(recording):
    """Yield a recording as a path; what comes through a pipe, as - or <(...), is kept in a temporary file meanwhile."""
    if recording != "-" and not str(recording).startswith(("/dev/stdin", "/dev/fd/", "/proc/self/fd/")):
        yield recording
        return
    if recording == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("nothing comes through standard input: cat recording.wav | python predict.py -")
    name, source = name_of(recording), 0 if recording == "-" else str(recording)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        try:
            with open(source, "rb") as pipe, utils.naming(path), open(path, "wb") as file:
                while block := pipe.read(1 << 20):
                    if file.tell() + len(block) > MAX_PIPE:
                        raise UserError(f"{name} is over {MAX_PIPE / 1e9:g} GB: cut it")
                    file.write(block)
        except OSError as error:
            if error.filename == source:
                raise UserError(f"{name} can't be read ({error.strerror}): check where it comes from") from error
            reason = f"{name} can't be copied to {folder}: {error.strerror}"
            raise UserError(f"{reason}. Make room there, or name another folder with TMPDIR") from error
        yield path


def answer_to(recording, model, args, sketch):
    """Return the Answer to one recording; a bar shows the seconds of a long one.

    sketch: the reports.pictures.Sketch that every window is added to, or None.
    """
    rate = model.audio.sample_rate
    with opened(recording) as path:
        total = round(duration(path) or 0)
        with tqdm(total=total, desc=utils.one_line(path.name), unit="s", leave=False, disable=None, delay=1) as bar:

            def watch(start, *window):
                bar.update(round(start / rate) - bar.n)
                if sketch:
                    sketch.add(start, *window)

            try:
                answer = model.classify(stream_audio(path, rate), args.window_seconds, args.hop_seconds, watch)
            except UserError as error:
                name, text = name_of(recording), str(error).replace(str(path), name_of(recording))
                raise UserError(text if name in text else f"{name}: {text}") from error
        note = answers.known_clip_note(path, model.infos, args.assets_dir, args.processed_dir)
        answer.notes += [note] if note else []
    return answer


def files_to_write(args, recordings, model_paths):
    """Return (the files to write for each recording, {flag: path}; the path of the table, or None).

    UserError if one would be written over a recording, a model or another one, or if several recordings have one file.
    """
    many, flags = len(recordings) > 1, {flag: path for flag in OUTPUTS if (path := getattr(args, flag))}
    for flag, path in flags.items():
        if many and utils.home_path(path).exists() and not utils.home_path(path).is_dir():
            raise UserError(f"--{flag} {path} is a file, and {len(recordings)} recordings need a folder: name one")
    table = utils.output_path(args.csv, "timelines.csv") if args.csv else None
    outputs = [
        {flag: utils.output_path(path, name + OUTPUTS[flag], many) for flag, path in flags.items()}
        for name in file_names(recordings)
    ]
    taken = {Path(path).resolve() for path in [*model_paths, *recordings]}
    for path in [*([table] if table else []), *(path for files in outputs for path in files.values())]:
        if path.resolve() in taken and (path.is_file() or not path.exists()):  # /dev/null takes everything
            raise UserError(f"{path} is a recording, the model or another file of this command: name another to write")
        taken.add(path.resolve())
    return outputs, table


def predict_file(recording, model, args, outputs, timelines):
    """Predict one recording: print the answer, add its timeline to `timelines`, and write `outputs`, {flag: path}."""
    sketch = None
    if {"plot", "explain"} & outputs.keys():
        from reports import pictures

        sketch = pictures.Sketch(model.audio)
    answer, name = answer_to(recording, model, args, sketch), name_of(recording)
    if args.quiet:
        print(answer.label)
    elif args.json:
        print(answers.as_json(name, answer, model.names, args.top_k))
    else:
        answers.print_answer(name, answer, model.names, args.top_k)
    timelines[name] = answer.timeline
    if "labels" in outputs:
        answers.save_labels(outputs["labels"], answer.timeline)
    if "plot" in outputs:
        pictures.draw_recording(outputs["plot"], name, answer, sketch)
    if "explain" in outputs:
        pictures.draw_explanation(outputs["explain"], name, answer, model.networks, sketch)


def predict_files(recordings, model, args, outputs, timelines):
    """Predict recordings one after the other, as `predict_file` does. Return a line for each that failed."""
    failures = []
    for recording, files in zip(recordings, outputs, strict=True):
        try:
            predict_file(recording, model, args, files, timelines)
            continue
        except UserError as error:
            reason = str(error)
        except OSError as error:
            if not error.filename or isinstance(error, BrokenPipeError):  # of what all are printed to
                raise
            remedy = utils.REMEDIES.get(error.errno, "check that path and its disk")
            reason = f"{error.filename2 or error.filename}: {error.strerror}: {remedy}"
        failures.append(utils.one_line(reason, longest=1000))
        if name_of(recording) in timelines:  # its answer is printed: a file to write has failed
            continue
        if args.json:
            print(json.dumps({"file": name_of(recording), "error": reason}))
        elif args.quiet and len(recordings) > 1:
            print()
    return failures


def name_of(recording):
    """Return what a recording is called in the output."""
    return "standard input" if recording == "-" else str(recording)


def file_names(recordings):
    """Return a plain file name of at most MAX_NAME bytes for each recording, no two alike."""
    names = {}
    for recording in recordings:
        plain = re.sub(r"[^\w.-]+", "_", name_of(recording)).strip("_").encode()[-MAX_NAME:].decode(errors="ignore")
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        names[next(name for name in itertools.chain([plain], numbered) if name not in names)] = recording
    return list(names)


def main():
    args = parse_args()
    utils.keep_freed_memory()  # features and network take less than half the time over a long recording
    paths = find_models(args.model_dir, args.fold_num, utils.run_folders(args).models)
    model = open_models(paths)
    if args.processed_dir:
        check_class_names(args.processed_dir, model.info)
    if args.explain and not hasattr(model, "networks"):
        raise UserError(f"--explain needs a .safetensors file, not {model.names[0]}: name it with --model_dir")
    model.window_samples(args.window_seconds, args.hop_seconds)  # checks the flags
    if args.mic:
        from services import sound

        return sound.listen_to_microphone(lambda samples: model.classify([samples]).overall, model.info)
    recordings = find_recordings(args.recordings)
    outputs, table = files_to_write(args, recordings, paths)
    timelines = {}
    try:
        failures = predict_files(recordings, model, args, outputs, timelines)
    finally:  # also after Ctrl-C or an error, with what is done
        if table:
            answers.save_csv(table, timelines)
    if failures and len(recordings) > 1:
        failures.insert(0, f"{len(failures)} of {len(recordings)} recordings failed:")
    if failures:
        raise UserError("\n  ".join(failures))


if __name__ == "__main__":
    utils.run(main)
