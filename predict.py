"""Stage 4: what is that sound? Classify a recording with a trained model.

    python predict.py recording.wav                        # the model of fold 0
    python predict.py recording.mp3 --fold_num 3
    python predict.py recording.wav --model_dir ~/models   # a folder of model files, or one model file
    python predict.py recording.wav --model_dir hf://owner/name   # from the Hugging Face Hub

Prints the class, its confidence and the whole distribution as bars, the most likely class first. Any format, rate,
channel count and length that soundfile or librosa can decode; longer recordings are cut into clips of 4 s and the mean
over the clips is shown. The model file is all that it needs. Exit status 2 and one line say what can't be predicted.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import numpy as np
import torch

import batches
import config
import data_loader
import utils
from model import load_model, model_path
from utils import UserError

BAR_WIDTH = 40  # characters of a probability of 1
CLIPS_AT_ONCE = 32  # clips of a long recording in one pass of the network


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("audio_file", type=Path, help="the recording")
    parser.add_argument("--fold_num", type=int, default=0, help="0-indexed fold whose model predicts (default: 0)")
    parser.add_argument(
        "--model_dir", metavar="DIR", help="folder of model files, one file, or hf://owner/name (default: models/)"
    )
    parser.add_argument("--from_hub", metavar="OWNER/NAME", help="the same as --model_dir hf://OWNER/NAME")
    parser.add_argument("--processed_dir", metavar="DIR", help="check the model's class names against this data set's")
    return parser.parse_args()


def find_model(model_dir, fold):
    """Return a fold's model file; a path to a file stands for itself. UserError lists the folds there are."""
    if model_dir.is_file():
        return model_dir
    path = model_path(model_dir, fold)
    if not path.is_file():
        there = [str(number) for number in range(10) if model_path(model_dir, number).is_file()]
        remedy = f"--fold_num is one of {', '.join(there)}" if there else "run python train.py, or name its --model_dir"
        raise UserError(f"no model of fold {fold} in {model_dir}: {remedy}")
    return path


def chosen_model(args):
    """Return the model file that the command line asks for: from the Hub, or from a folder."""
    repo_id = args.from_hub or (args.model_dir or "").partition("hf://")[2]
    if not repo_id:
        return find_model(utils.folder(args.model_dir, args.assets_dir, config.MODEL_DIR), args.fold_num)
    import hub

    return hub.fetch_model(repo_id, args.fold_num)


def check_class_names(processed_dir, info):
    """Raise a UserError if a data set's class names are not the model's."""
    names = utils.load_pickle(Path(processed_dir) / "class_mapping.pkl")
    model_names = dict(zip(info["class_ids"], info["class_names"], strict=True))
    if names != model_names:
        raise UserError(f"{processed_dir} has the classes {names}, and the model was trained on {model_names}")


def load_recording(path, sample_rate):
    """Return mono samples at sample_rate, shape (n,). UserError if there is nothing to hear."""
    samples = data_loader.read_audio(path, sample_rate)
    if not samples.any():
        raise UserError(f"{path} is silent: every sample is zero. Check the recording")
    return samples


def cut_clips(samples, audio):
    """Return a recording as clips, a list of arrays: all of full length but the last, which is dropped if under half.

    A recording shorter than a clip is one clip, which `clip_features` lengthens as in training.
    """
    length = audio.clip_samples
    clips = [samples[start : start + length] for start in range(0, len(samples), length)]
    if len(clips) > 1 and len(clips[-1]) < length / 2:
        clips.pop()
    return clips


@torch.inference_mode()
def predict(network, info, samples):
    """Return the class probabilities of mono samples at the model's rate, the mean over clips: (classes,) float32."""
    audio = data_loader.AudioSettings(**info["audio"])
    statistics = batches.statistics_of(info)
    clips = cut_clips(samples, audio)
    total = torch.zeros(len(info["class_names"]))
    for start in range(0, len(clips), CLIPS_AT_ONCE):
        features = [data_loader.clip_features(clip, audio) for clip in clips[start : start + CLIPS_AT_ONCE]]
        inputs = batches.normalise(torch.from_numpy(np.stack(features)), statistics)  # (B, 1, n_mels, frames)
        total += network(inputs).softmax(dim=1).sum(dim=0)
    return (total / len(clips)).numpy()


def print_distribution(class_names, probabilities):
    """Print every class with its probability and a bar, the most likely first."""
    width = max(map(len, class_names))
    for index in np.argsort(-probabilities, kind="stable"):
        bar = "█" * round(float(probabilities[index]) * BAR_WIDTH)
        print(f"  {class_names[index]:<{width}}  {probabilities[index]:6.1%}  {bar}".rstrip())


def main():
    args = parse_args()
    model_path = chosen_model(args)
    network, info = load_model(model_path)
    if args.processed_dir:
        check_class_names(args.processed_dir, info)
    audio = info["audio"]
    samples = load_recording(args.audio_file, audio["sample_rate"])
    probabilities = predict(network, info, samples)
    if not np.isfinite(probabilities).all():
        raise UserError(f"{model_path} gives no probabilities for {args.audio_file}: train or fetch the model again")
    best = int(probabilities.argmax())
    seconds = len(samples) / audio["sample_rate"]
    print(f"{args.audio_file} ({seconds:.2f} s), {model_path.name}")
    print(f"{info['class_names'][best]}, confidence {probabilities[best]:.1%}")
    print_distribution(info["class_names"], probabilities)


if __name__ == "__main__":
    utils.run(main)
