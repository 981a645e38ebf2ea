"""Play random clips of the data set, and see what a model that has never heard them says.

    python play_and_predict_random.py                            # one clip
    python play_and_predict_random.py --class_name siren --count 5
    python play_and_predict_random.py --fold 0 --no_play         # a clip of fold 0, silently

For each clip: its name, the sound, the distribution as bars, then the truth; after several, the running score. Each
clip goes to the model of its own fold, the only one that has not trained on it; clips of folds without a model are
left out, and a line says which. Without a loudspeaker, a line says so, and the bars come without sound.
"""

import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: see train.py

import config
import data_loader
import utils
from audio import read_audio
from classifier import check_one_run, load
from model_file import find_model, folds_in
from reports import answers
from services import sound
from utils import UserError


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--class_name", metavar="NAME", help="clips of this class alone, such as dog_bark")
    add("--fold", type=int, choices=range(utils.MAX_FOLDS), metavar="N", help="clips of this fold alone, 0 to 9")
    add("--count", type=utils.positive_int, default=1, metavar="N", help="clips to play (default: 1)")
    add("--seed", type=int, help="a number that gives the same clips again")
    add("--no_play", action="store_true", help="predict without playing")
    add("--data_dir", metavar="DIR", help="the data set (default: data/UrbanSound8K in the assets)")
    add("--model_dir", metavar="DIR", help="folder of model files (default: models/ in the assets)")
    return parser.parse_args()


def choose_clips(clips, class_name=None, fold=None):
    """Return the rows of the clip table of a class and a 0-indexed fold; None is any. UserError if there are none."""
    for flag, value, present in (("class_name", class_name, clips["class"]), ("fold", fold, clips["fold"] - 1)):
        if value is not None and value not in set(present):
            choices = ", ".join(map(str, sorted(set(present))))
            raise UserError(f"no --{flag} {value} in the data set: it must be one of {choices}")
    if class_name is not None:
        clips = clips[clips["class"] == class_name]
    if fold is not None:
        clips = clips[clips["fold"] == fold + 1]
    if clips.empty:
        raise UserError(f"fold {fold} has no clip of {class_name}: leave one of --fold and --class_name out")
    return clips


def folds_in_use(clips, table):
    """Return the clips' folds as stage 2 stored them: config.py may differ by now. Without its table, as given."""
    if not table.is_file():
        return clips["fold"]
    key = "recording" if "recording" in clips else "slice_file_name"
    stored = data_loader.read_clip_table(table)
    if key not in stored:
        return clips["fold"]
    return clips[key].map(stored.groupby(key)["fold"].first()).fillna(clips["fold"]).astype(int)


def keep_testable(clips, model_dir):
    """Return the clips whose fold has a model, after a line about the others. UserError if none has one."""
    folds = sorted(set(clips["fold"] - 1))
    missing = sorted({*folds} - {*folds_in(model_dir)})
    names = ",".join(map(str, missing))
    if missing == folds:
        raise UserError(f"{model_dir} lacks the model of fold {names}: python train.py --folds {names} makes it")
    if missing:
        print(f"without clips of fold {names}, whose model is missing (python train.py --folds {names})")
    return clips[~(clips["fold"] - 1).isin(missing)]


def play(samples, rate):
    """Play samples; where that is not possible, print one line with the reason and the remedy."""
    try:
        sound.play(samples, rate)
    except UserError as error:
        print(f"not played: {error}")


def present(clip, path, model, is_silent):
    """Play one clip, print bars and truth, and return whether the answer is right. path: of its fold's model."""
    fold, info = int(clip["fold"]) - 1, model.info
    trained_on = info.get("training_folds")
    if not isinstance(trained_on, list):
        raise UserError(f"{path} does not say which folds it was trained on: python train.py makes one that does")
    if fold + 1 in trained_on:
        raise UserError(f"{path} has trained on clips of fold {fold}: python train.py --folds {fold} makes its model")
    rate = info["audio"]["sample_rate"]
    samples = read_audio(clip["path"], rate)  # (n,)
    settings = info.get("settings")
    is_optimistic = isinstance(settings, dict) and settings.get("validation") == "test_fold"
    note = " (optimistic: its epoch was chosen on this fold)" if is_optimistic else ""
    print(f"{clip['path'].name} ({len(samples) / rate:.2f} s) of fold {fold}, {path.name}{note}")
    if not is_silent:
        play(samples, rate)
    answer = model(samples, rate)
    answers.print_distribution(answer.class_names, answer.overall)
    is_right = answer.label == clip["class"]
    print(f"truth: {clip['class']}, {'right' if is_right else f'not {answer.label}'}")
    return is_right


def main():
    args = parse_args()
    data_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    model_dir = utils.run_folders(args).models
    _, clips = data_loader.read_dataset(data_dir)
    clips["fold"] = folds_in_use(clips, utils.run_folders(args).processed / "clips.csv")
    clips = keep_testable(choose_clips(clips, args.class_name, args.fold), model_dir)
    if args.count > len(clips):
        print(f"there are {len(clips)} such clips, not {args.count}")
    chosen = random.Random(args.seed).sample(range(len(clips)), min(args.count, len(clips)))
    paths = {fold: find_model(model_dir, fold - 1) for fold in sorted(set(clips["fold"].iloc[chosen]))}
    models = {fold: load(path) for fold, path in paths.items()}
    check_one_run(list(paths.values()), [model.info for model in models.values()])  # they share a score
    n_right = 0
    for n, row in enumerate(chosen, start=1):
        clip = clips.iloc[row]
        n_right += present(clip, paths[clip["fold"]], models[clip["fold"]], args.no_play)
        if args.count > 1:
            print(f"score: {n_right} of {n} right ({n_right / n:.0%})\n")


if __name__ == "__main__":
    utils.run(main)
