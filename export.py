"""Write a model as one .onnx file, samples in and probabilities out, for anything that runs ONNX.

    python export.py                                        # predict.py's model -> such as model_fold_0_best.onnx
    python export.py --model_dir models/urban_sounds.safetensors --output urban_sounds.onnx

The log-mel spectrogram is inside, so nothing of this project is needed to use the file. Input `samples`: (batch, n)
float32, mono at the model's rate, n from one sample to a clip. Outputs: `probabilities` (batch, classes), temperature
applied, and `embedding` (batch, size), what the last hidden layer says. The metadata has class names, rate and all that
the model file has. Prints the file, its size, and the largest difference from predict.py's probabilities on CHECKS
sounds; exit status 2, and no file, if that is over TOLERANCE.
"""

import json
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torchaudio

import utils
from classifier import READY_MODEL, OnnxClassifier, TorchClassifier, find_models
from utils import UserError

CHECKS = 24  # sounds: noise and tones of many lengths and levels
TOLERANCE = 1e-3  # of a probability
OPSET = 18


class SoundToProbabilities(torch.nn.Module):
    """audio.py's front-end and a network, from samples (batch, n) to (probabilities, embedding)."""

    def __init__(self, network, info, audio):
        super().__init__()
        self.network, self.audio, self.temperature = network, audio, info.get("temperature", 1)
        self.register_buffer("window", torch.hann_window(audio.n_fft))  # periodic
        edges = audio.n_fft // 2 + 1, audio.f_min, audio.f_max, audio.n_mels, audio.sample_rate
        filters = torchaudio.functional.melscale_fbanks(*edges, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters.T.contiguous())  # (n_mels, 1 + n_fft // 2)

    def forward(self, samples):
        features = self.log_mel(self.fit_clip(samples))  # (batch, n_mels, n_frames) dB
        features = features.to(getattr(torch, self.audio.feature_dtype)).float()  # rounded as in training
        logits = self.network(features) / self.temperature
        return logits.softmax(dim=1), self.network.embed(features)

    def fit_clip(self, samples):
        """Samples (batch, n) -> (batch, clip_samples): repeated from the start, or followed by silence."""
        at = torch.arange(self.audio.clip_samples)
        length = torch.full((1,), samples.shape[1])  # a tensor, which ONNX can divide by
        fitted = samples[:, at % length]
        if self.audio.short_clips == "silence":
            fitted = torch.where(at < samples.shape[1], fitted, 0.0)
        return fitted

    def log_mel(self, samples):
        """Samples (batch, clip_samples) -> log-mel (batch, n_mels, n_frames) in dB, as audio.py's `log_mel`."""
        size, hop = self.audio.n_fft, self.audio.hop_length
        spectrum = torch.stft(samples, size, hop, window=self.window, pad_mode="constant", return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(dim=3)  # (batch, 1 + n_fft // 2, n_frames)
        decibels = 10 / math.log(10) * (self.filters @ power).clamp(min=1e-10).log()
        return torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - self.audio.top_db)


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--fold_num", type=utils.fold_or_word, metavar="N", help="0-indexed fold whose model is written, or none")
    add("--model_dir", metavar="DIR", help="a folder, a .safetensors file, or hf://owner/name (default: models/)")
    add("--output", default="", metavar="FILE", help="default: the model's name with .onnx, here")
    return parser.parse_args()


def onnx_bytes(model):
    """Return the contents of the .onnx file, with its metadata, of a TorchClassifier of one network."""
    onnx = utils.need("onnx", "the export")
    utils.need("onnxscript", "the export")
    module = SoundToProbabilities(model.networks[0], model.info, model.audio).eval()
    shapes = {"samples": {0: torch.export.Dim("batch"), 1: torch.export.Dim("n", max=model.audio.clip_samples)}}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            (torch.zeros(2, model.audio.clip_samples // 2),),
            file,
            input_names=["samples"],
            output_names=["probabilities", "embedding"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(file)
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in model.info.items()})
    return graph.SerializeToString()


def largest_difference(one, other):
    """Return the largest difference of two classifiers' probabilities, on CHECKS sounds of one window each."""
    rng, clip = np.random.default_rng(0), one.audio.clip_samples
    worst = 0.0
    for _ in range(CHECKS):
        n = int(rng.integers(1, clip + 1))
        tone = np.sin(2 * np.pi * rng.uniform(50, 8000) / one.audio.sample_rate * np.arange(n))
        samples = (10 ** rng.uniform(-3, 0) * (tone + rng.uniform(0, 1) * rng.normal(size=n))).astype(np.float32)
        worst = max(worst, float(np.abs(one.probabilities([samples]) - other.probabilities([samples])).max()))
    return worst


def main():
    args = parse_args()
    paths = find_models(args.model_dir, args.fold_num, utils.run_folders(args).models)
    if paths == [READY_MODEL]:
        paths = [READY_MODEL.with_suffix(".safetensors")]
    if len(paths) > 1 or paths[0].suffix == ".onnx":
        raise UserError(f"{paths[0]}: name one .safetensors file with --model_dir, or one fold with --fold_num")
    model, output = TorchClassifier(paths), utils.output_path(args.output, paths[0].with_suffix(".onnx").name)
    if output.resolve() == paths[0].resolve():
        raise UserError(f"--output {output} is the model itself: name another file")
    content = onnx_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        draft.write_bytes(content)
        difference = largest_difference(model, OnnxClassifier(draft))
    if not difference <= TOLERANCE:  # nor is NaN
        raise UserError(f"the .onnx file's probabilities are up to {difference:.2g} off, over {TOLERANCE}: not written")
    with utils.atomic_write(output) as file:
        file.write(content)
    within = f"on {CHECKS} sounds its probabilities are within {difference:.1e} of {paths[0].name}'s"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; {within}")


if __name__ == "__main__":
    utils.run(main)
