"""Models that answer: what is that sound?

    from predict import load
    model = load()                      # your own trained model, else the ready one; or load("model.onnx"), ...
    answer = model("street.wav")        # answer.label, .confidence, .probabilities, .timeline
    vector = model.embed("street.wav")  # (128,), what the last hidden layer says

A .safetensors file is computed by torch. An .onnx file, which export.py makes, is computed by onnxruntime: the same
answers without the seconds that torch takes to import.
"""

import itertools
import json
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

        UserError for what can't be decoded, has no sound or is silent.
        """
        return self.classify(self.blocks(recording, rate))

    def embed(self, recording, rate=None):
        """Return what the last hidden layer says of a recording, (size,) float32: the mean over its windows."""
        groups = self.groups(windows(self.blocks(recording, rate), *self.window_samples()))
        return np.concatenate([self.embeddings([samples for _, samples in group]) for group in groups]).mean(axis=0)

    def blocks(self, recording, rate):
        """Return an iterable of a recording's mono samples at the model's rate."""
        if rate is None:
            return stream_audio(recording, self.audio.sample_rate)
        samples = np.asarray(recording)
        samples = samples.reshape(len(samples), -1)  # (n, channels)
        samples = samples if samples.dtype == np.int16 else samples.astype(np.float32)
        name = "the array of samples"
        check_rate(name, rate, samples.shape[1])
        return [soxr.resample(mono, rate, self.audio.sample_rate) for mono in checked(iter([samples]), name, None)]

    def classify(self, blocks, window_seconds=None, hop_seconds=None, watch=None):
        """Return the Answer to a recording, which is streamed through windows.

        blocks: iterable of mono samples at the models' rate; watch: called with (first sample, samples, distribution)
        of each window. UserError for a recording without sound, and for models that give no probabilities.
        """
        edges, rows, levels = [], [], []
        for group in self.groups(windows(blocks, *self.window_samples(window_seconds, hop_seconds))):
            distributions = self.probabilities([samples for _, samples in group])  # (B, classes)
            if not np.isfinite(distributions).all():
                raise UserError("the model gives no probabilities for it: train or fetch the model again")
            distributions[[not samples.any() for _, samples in group]] = np.nan  # silence
            rows.append(distributions)
            for (start, samples), distribution in zip(group, distributions, strict=True):
                edges.append((start, start + len(samples)))
                levels.append(float(np.sqrt(np.mean(samples**2, dtype=np.float64))))
                if watch:
                    watch(start, samples, distribution)
        distributions = np.concatenate(rows)  # (windows, classes)
        if np.isnan(distributions).all():
            raise UserError("it is silent: every sample is zero. Check the recording")
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


class TorchClassifier(Classifier):
    """The mean of networks from .safetensors files, .networks, all of one run."""

    def __init__(self, paths):
        loaded = [load_model(path) for path in paths]
        self.networks, infos = [network for network, _ in loaded], [info for _, info in loaded]
        for path, info in zip(paths, infos, strict=True):
            for key in ("class_names", "audio", "settings"):
                if info.get(key) != infos[0].get(key):
                    raise UserError(f"{path} and {paths[0].name} differ in {key}, so they have no mean: --fold_num N")
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
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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
        """Return an output of the file for windows, (B, ...)."""
        try:
            each = [self.session.run([output], {"samples": samples[None]})[0] for samples in found]
        except Exception as error:
            raise UserError(f"{self.names[0]} fails ({utils.one_line(error)}): export it again") from error
        return np.concatenate(each)
