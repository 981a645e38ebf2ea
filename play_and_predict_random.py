"""Play random clips of the data set, and see what a model that has never heard them says.

    python play_and_predict_random.py                            # one clip
    python play_and_predict_random.py --class_name siren --count 5
    python play_and_predict_random.py --fold 0 --no_play         # a clip of fold 0, silently

For each clip: its name, the sound, the distribution as bars, then the truth; after several, the running score. Each
clip goes to the model of its own fold, the only one that has not trained on it; clips of folds without a model are
left out, and a line says which. No loudspeaker is told in one line, and prediction goes on without sound.
"""

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import audio_reader
import config
import data_loader
import predict
import utils
from model import load_model, model_path
from reports import answers
from services import sound_device
from utils import UserError


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--class_name", metavar="NAME", help="clips of this class alone, such as dog_bark")
    add("--fold", type=fold_number, metavar="N", help="clips of this 0-indexed fold alone")
    add("--count", type=utils.positive_int, default=1, metavar="N", help="clips to play (default: 1)")
    add("--seed", type=int, help="a number that gives the same clips again")
    add("--no_play", action="store_true", help="predict without playing")
    add("--data_dir", metavar="DIR", help="the data set (default: data/UrbanSound8K in the assets)")
    add("--model_dir", metavar="DIR", help="folder of model files (default: models/ in the assets)")
    return parser.parse_args()


def fold_number(text):
    """argparse type: one 0-indexed fold."""
    folds = utils.parse_folds(text)
    if len(folds) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one fold from 0 to 9")
    return folds[0]


def choose_clips(clips, class_name=None, fold=None):
    """Return the clips (metadata rows) of a class and a 0-indexed fold; None is any. UserError if there are none."""
    names = sorted({clip["class"] for clip in clips})
    folds = sorted({clip["fold"] - 1 for clip in clips})
    if class_name is not None and class_name not in names:
        raise UserError(f"no class {class_name!r} in the data set: --class_name is one of {', '.join(names)}")
    if fold is not None and fold not in folds:
        raise UserError(f"no fold {fold} in the data set: --fold is one of {', '.join(map(str, folds))}")
    chosen = [clip for clip in clips if class_name in (None, clip["class"]) and fold in (None, clip["fold"] - 1)]
    if not chosen:
        raise UserError(f"fold {fold} has no clip of {class_name}: leave one of --fold and --class_name out")
    return chosen


def keep_testable(clips, model_dir):
    """Return the clips whose fold has a model, after a line about the others. UserError if none has one."""
    folds = sorted({clip["fold"] - 1 for clip in clips})
    lacking = [fold for fold in folds if not model_path(model_dir, fold).is_file()]
    remedy = f"python train.py --folds {','.join(map(str, lacking))}"
    if lacking == folds:
        raise UserError(
            f"{model_dir} lacks the model of fold {', '.join(map(str, lacking))}, the only one that has not trained on "
            f"those clips: {remedy}, or name another --model_dir"
        )
    if lacking:
        print(f"without clips of fold {', '.join(map(str, lacking))}, whose model is missing ({remedy})")
    return [clip for clip in clips if clip["fold"] - 1 not in lacking]


def load_honest_model(model_dir, clip):
    """Return (path, network, info) of the model that tests a clip's fold. UserError if it has trained on that fold."""
    path = model_path(model_dir, clip["fold"] - 1)
    network, info = load_model(path)
    trained_on = info.get("training_folds")
    if not isinstance(trained_on, list):
        raise UserError(f"{path} does not say which folds it was trained on: python train.py makes one that does")
    if clip["fold"] in trained_on:
        raise UserError(
            f"{path} has trained on clips of fold {clip['fold'] - 1}, so its answers there prove nothing. Is it the "
            f"model of another fold? python train.py --folds {clip['fold'] - 1} makes the right one"
        )
    return path, network, info


def play_or_say_why(samples, rate):
    """Play samples and return whether that was possible; if not, print one line with the reason and the remedy."""
    try:
        sound_device.play(samples, rate)
    except UserError as error:
        print(f"not played: {error}")
        return False
    return True


def present(clip, data_dir, model_dir, plays):
    """Play one clip if `plays`, print bars and truth; return (whether the answer is right, whether it played)."""
    path, network, info = load_honest_model(model_dir, clip)
    rate = info["audio"]["sample_rate"]
    file = Path(data_dir, "audio", f"fold{clip['fold']}", clip["slice_file_name"])
    samples = audio_reader.read_audio(file, rate)
    settings = info.get("settings")
    optimistic = isinstance(settings, dict) and settings.get("validation") == "test_fold"
    print(
        f"{file.name} ({len(samples) / rate:.2f} s) of fold {clip['fold'] - 1}, {path.name}"
        + (" (optimistic: its epoch was chosen on this fold)" if optimistic else "")
    )
    plays = plays and play_or_say_why(samples, rate)
    probabilities = predict.predict(network, info, samples)
    answers.print_distribution(info["class_names"], probabilities)
    answer = info["class_names"][int(probabilities.argmax())]
    is_right = answer == clip["class"]
    print(f"truth: {clip['class']}, {'right' if is_right else f'not {answer}'}")
    return is_right, plays


def main():
    args = parse_args()
    data_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    model_dir = utils.run_folders(args).models
    clips = data_loader.read_clip_table(data_dir / "metadata" / "UrbanSound8K.csv")
    clips = keep_testable(choose_clips(clips, args.class_name, args.fold), model_dir)
    if args.count > len(clips):
        print(f"there are {len(clips)} such clips, not {args.count}")
    plays, right = not args.no_play, 0
    for number, clip in enumerate(random.Random(args.seed).sample(clips, min(args.count, len(clips))), start=1):
        is_right, plays = present(clip, data_dir, model_dir, plays)
        right += is_right
        if args.count > 1:
            print(f"score: {right} of {number} right ({right / number:.0%})\n")


if __name__ == "__main__":
    utils.run(main)
