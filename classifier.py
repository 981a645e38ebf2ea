"""Models that answer: what is that sound?

    from predict import load
    model = load()                      # your own trained model, else the ready one; or load("model.onnx"), ...
    answer = model("street.wav")        # answer.label, .confidence, .probabilities, .timeline
    vector = model.embed("street.wav")  # (128,), what the last hidden layer says

A .safetensors file is computed by torch. An .onnx file, which export.py makes, is computed by onnxruntime: the same
answers without the seconds that torch takes to import. An .onnx file is a program: an untrusted one may take any time
and memory, which a .safetensors file can't.
"""

import itertools
import json
import numbers
import os
import re
import sys
from pathlib import Path

import numpy as np
import soxr

import config
import utils
from audio import AudioSettings, check_rate, checked, clip_features, stream_audio, windows
from model_file import check_info, find_model, folds_in, load_model, model_path
from reports.answers import Answer
from utils import UserError

READY_MODEL = Path(__file__).resolve().parent / "models" / "urban_sounds.onnx"  # comes along: models/README.md
MAX_SUM_ERROR = 1e-3  # of a distribution
LOOPS = re.compile(rb"(?:[\x04\x0b]|[\x84\x8b]\x80*\0)(Loop|Scan|SequenceMap)")  # in an .onnx file: length and operator
SILENT = "it is silent: its samples do not change. Check the recording"
VALUES_AT_ONCE = 180_000  # features in one pass of the network: 8 windows; more are no faster and take more memory

# --- Which models ------------------------------------------------------------------------------------------------


def load(source=None, fold=None):
    """Return the Classifier of a model file, a folder of them, or hf://owner/name; None: see `find_models`.

    fold: 0-indexed fold whose model answers, "all" for the mean of all folds' models, "none" for the model of all
    clips; None takes that one, else fold 0's. UserError if there is no such model, or it can't be used.
    """
    return open_models(find_models(source, fold))


def find_models(source=None, fold=None, own_dir=None):
    """Return the model files that `source` and `fold` of `load` stand for.

    Without a source they are the user's own, in own_dir (default: MODEL_DIR in the assets of config.py). If nothing is
    trained there and no fold is asked for, it is READY_MODEL, and a line on stderr says so.
    """
    if str(source).startswith("hf://"):
        from services import hub

        repo_id = str(source).removeprefix("hf://")
        folds = hub.model_folds(repo_id) if fold == "all" else [fold or 0]
        return [hub.fetch_model(repo_id, number) for number in folds]
    default_dir = own_dir or utils.folder(None, utils.home_path(config.ASSETS_BASE_DIR), config.MODEL_DIR)
    folder = default_dir if source is None else utils.home_path(source)
    if folder.is_file():
        return [folder]
    if fold == "all":
        return [find_model(folder, number) for number in folds_in(folder) or [0]]  # 0: its error says what is missing
    if fold is None:
        has_all = model_path(folder, utils.NO_FOLD).is_file()
        if source is None and not has_all and not folds_in(folder):
            print(f"no trained model in {folder}: the ready one answers, see models/README.md", file=sys.stderr)
            return [READY_MODEL]
        fold = utils.NO_FOLD if has_all else 0
    return [find_model(folder, fold)]


def open_models(paths):
    """Return the Classifier of model files. UserError if they are not of one run, or can't be used."""
    if paths[0].suffix != ".onnx":
        return TorchClassifier(paths)
    if len(paths) > 1:
        raise UserError(f"{paths[0]}: an .onnx file answers alone, not as one of {len(paths)}")
    return OnnxClassifier(paths[0])


def check_one_run(paths, infos):
    """Raise a UserError if models, by their files' metadata, are not of one run."""
    for path, info in zip(paths, infos, strict=True):
        for key in ("class_names", "audio", "settings"):
            if info.get(key) != infos[0].get(key):
                reason = f"{path} and {paths[0].name} differ in {key}, so they are not of one run"
                raise UserError(f"{reason}: name one fold, or train the others again")


# --- One recording -----------------------------------------------------------------------------------------------


class Classifier:
    """Models that answer together. .names: of their files; .infos: their metadata; .info: the first one's.

    A subclass adds `probabilities` and `embeddings` of windows: a list of mono samples (n,) at the model's rate, of a
    clip at most.
    """

    def __init__(self, paths, infos):
        self.names, self.infos, self.info = [path.name for path in paths], infos, infos[0]
        self.audio = AudioSettings(**self.info["audio"])

    def __call__(self, recording, rate=None):
        """Return the Answer to a recording: a path, or samples (n,) or (n, channels) at `rate` Hz.

        Full scale of samples is 1, or the range of their type if they are whole numbers. UserError for what can't be
        decoded, has no sound or is silent.
        """
        return self.classify(self.blocks(recording, rate))

    def embed(self, recording, rate=None):
        """Return what the last hidden layer says of a recording, (size,) float32: the mean over windows with sound."""
        found = windows(self.blocks(recording, rate), *self.window_samples())
        groups = self.groups(samples for _, samples in found if not is_silent(samples))
        if not (rows := [self.embeddings(group) for group in groups]):  # (B, size) each
            raise UserError(SILENT)
        vector = np.concatenate(rows).mean(axis=0)
        if not np.isfinite(vector).all():
            raise UserError("the model gives no numbers for it: train or fetch the model again")
        return vector

    def blocks(self, recording, rate):
        """Return an iterable of a recording's mono samples at the model's rate."""
        is_path, name = isinstance(recording, (str, os.PathLike)), "the array of samples"
        if is_path != (rate is None) or not isinstance(rate, (numbers.Real, type(None))):
            raise UserError(f"rate is {rate!r}: pass a path alone, or samples and their rate in Hz: (samples, 44_100)")
        if is_path:
            return stream_audio(recording, self.audio.sample_rate)
        samples = as_samples(recording, name)
        check_rate(name, rate, samples.shape[1])
        resampled = soxr.resample(next(checked(iter([samples]), name, None)), rate, self.audio.sample_rate)  # (n,)
        if not resampled.size:
            raise UserError(f"{name} is too short: no sample is left at {self.audio.sample_rate} Hz. Pass more")
        return [resampled]

    def classify(self, blocks, window_seconds=None, hop_seconds=None, watch=None):
        """Return the Answer to a recording, which is streamed through windows.

        blocks: iterable of mono samples at the models' rate; watch: called with (first sample, samples, distribution)
        of each window. UserError for a recording without sound, and for models that give no probabilities.
        """
        edges, rows, levels = [], [], []
        for group in self.groups(windows(blocks, *self.window_samples(window_seconds, hop_seconds))):
            distributions = self.probabilities([samples for _, samples in group])  # (B, classes)
            sums = distributions.sum(axis=1, dtype=np.float64)
            if not ((distributions >= 0).all() and (np.abs(sums - 1) <= MAX_SUM_ERROR).all()):  # nor is NaN
                raise UserError("the model gives no probabilities for it: train or fetch the model again")
            distributions[[is_silent(samples) for _, samples in group]] = np.nan
            rows.append(distributions)
            for (start, samples), distribution in zip(group, distributions, strict=True):
                edges.append((start, start + len(samples)))
                levels.append(float(np.sqrt(np.mean(samples**2, dtype=np.float64))))
                if watch:
                    watch(start, samples, distribution)
        distributions = np.concatenate(rows)  # (windows, classes)
        if np.isnan(distributions).all():
            raise UserError(SILENT)
        starts, ends = np.array(edges).T / self.audio.sample_rate  # (windows,) s each
        return Answer(
            self.info["class_names"], float(ends[-1]), starts, ends, distributions, np.array(levels), notes=[]
        )

    def groups(self, found):
        """Yield lists of windows, as many as one pass of the network takes."""
        at_once = max(VALUES_AT_ONCE // (self.audio.n_mels * self.audio.n_frames), 1)
        while group := list(itertools.islice(found, at_once)):
            yield group

    def window_samples(self, window_seconds=None, hop_seconds=None):
        """Return (length, hop) of the windows in samples. UserError for windows longer than a clip, or with gaps."""
        clip_seconds = self.audio.clip_seconds
        window_seconds = window_seconds or clip_seconds
        hop_seconds = hop_seconds or window_seconds / 2
        if window_seconds > clip_seconds:
            raise UserError(
                f"--window_seconds {window_seconds:g} is over the model's clips of {clip_seconds} s: lower it"
            )
        if hop_seconds > window_seconds:
            reason = f"--hop_seconds {hop_seconds:g} leaves gaps between windows of {window_seconds:g} s"
            raise UserError(f"{reason}: lower it")
        return tuple(max(round(seconds * self.audio.sample_rate), 1) for seconds in (window_seconds, hop_seconds))


def as_samples(values, name):
    """Return an array of samples as (n, channels), int16 or float32 with full scale 1. UserError for what is none."""
    samples = np.asarray(values)
    is_whole = samples.dtype.kind in "iu" and samples.itemsize <= 4  # int64 is no format of sound: no scale is known
    if not (is_whole or samples.dtype.kind == "f") or samples.ndim not in (1, 2) or not samples.size:
        reason = f"{name} is of type {samples.dtype} and shape {samples.shape}"
        raise UserError(f"{reason}: pass (n,) or (n, channels) of floats up to 1, or of whole numbers of 8 to 32 bits")
    samples = samples.reshape(len(samples), -1)
    if samples.dtype == np.int16:
        return samples
    if is_whole:
        half = 2.0 ** (8 * samples.itemsize - 1)
        samples = samples / half - (samples.dtype.kind == "u")  # silence is in the middle of an unsigned type
    return samples.astype(np.float32)


def is_silent(samples):
    """Return whether the samples of a window do not change: all zero, or the offset of a converter alone."""
    return np.ptp(samples) == 0


class TorchClassifier(Classifier):
    """The mean of networks from .safetensors files, .networks, all of one run."""

    def __init__(self, paths):
        loaded = [load_model(path) for path in paths]
        self.networks, infos = [network for network, _ in loaded], [info for _, info in loaded]
        check_one_run(paths, infos)
        super().__init__(paths, infos)

    def features(self, found):
        """Return the features of windows, (B, n_mels, n_frames) in dB, as a tensor."""
        import torch

        return torch.from_numpy(np.stack([clip_features(samples, self.audio) for samples in found])).float()

    def probabilities(self, found):
        """Return the class probabilities of windows, (B, classes): the mean over networks."""
        import torch

        features = self.features(found)
        with torch.inference_mode():
            logits = [network(features) for network in self.networks]  # (B, classes) each
        each = [x.div(info.get("temperature", 1)).softmax(1) for x, info in zip(logits, self.infos, strict=True)]
        return torch.stack(each).mean(dim=0).numpy()  # (networks, B, classes) -> (B, classes)

    def embeddings(self, found):
        """Return what the last hidden layer says of windows, (B, size): the first network's, as each has its own."""
        import torch

        with torch.inference_mode():
            return self.networks[0].embed(self.features(found)).numpy()


class OnnxClassifier(Classifier):
    """An .onnx file as export.py writes it: samples in, `probabilities` and `embedding` out."""

    def __init__(self, path):
        onnxruntime = utils.need("onnxruntime", "an .onnx model")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors come as exceptions, and the rest is of no use here
        try:
            content = path.read_bytes()
            if found := LOOPS.search(content):  # which not even Ctrl-C would stop
                raise UserError(f"it loops, by the operator {found[1].decode()}")
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            texts = self.session.get_modelmeta().custom_metadata_map
            info = {key: json.loads(text) for key, text in texts.items()}
            outputs = {output.name for output in self.session.get_outputs()}
        except Exception as error:  # onnxruntime raises its own for each kind of damage
            raise UserError(
                f"{path} is not a readable .onnx file ({utils.one_line(error)}): export it again"
            ) from error
        check_info(path, info)
        if [each.name for each in self.session.get_inputs()] != ["samples"] or not {"probabilities"} <= outputs:
            raise UserError(f"{path} does not take samples and give probabilities: make it with export.py")
        super().__init__([path], [info])

    def probabilities(self, found):
        """Return the class probabilities of windows, (B, classes)."""
        return self.run("probabilities", found)

    def embeddings(self, found):
        """Return what the last hidden layer says of windows, (B, size)."""
        return self.run("embedding", found)

    def run(self, output, found):
        """Return an output of the file for windows, (B, size) of floats."""
        try:
            each = [self.session.run([output], {"samples": samples[None]})[0] for samples in found]
        except Exception as error:
            raise UserError(f"{self.names[0]} fails ({utils.one_line(error)}): export it again") from error
        size = len(self.info["class_names"]) if output == "probabilities" else np.size(each[0])
        for row in each:
            if not (isinstance(row, np.ndarray) and row.dtype.kind == "f" and row.shape == (1, size)):
                raise UserError(f"{self.names[0]} gives no {output} of shape (1, {size}): export it again")
        return np.concatenate(each)
