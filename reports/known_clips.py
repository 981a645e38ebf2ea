"""Clips of the data set, recognised among recordings to predict: the answer to what a model has trained on is no test.

A clip is known by its name in clips.csv of the processed files, and by its content where the data set's own copy is at
hand. A clip under another name is not recognised.
"""

import contextlib
import filecmp
import functools
import re

import config
import data_loader
import utils
from utils import UserError

CLIP_NAME = re.compile(r"\d+-\d+-\d+-\d+\.wav")  # recording, classID, occurrence, slice


def find_fold(path, assets_dir, processed_dir=None):
    """Return the data set's fold (1 to 10) of a recording that is one of its clips, else None."""
    if not CLIP_NAME.fullmatch(path.name):
        return None
    fold = read_folds(utils.folder(processed_dir, assets_dir, config.PROCESSED_DIR) / "clips.csv").get(path.name)
    if fold is None:
        return None
    own = assets_dir / config.DATASET_DIR / "audio" / f"fold{fold}" / path.name
    is_other = own.is_file() and not filecmp.cmp(own, path, shallow=False)
    return None if is_other else fold


@functools.cache  # one reading for a whole folder of clips
def read_folds(table):
    """Return {clip's file name: fold} of a clips.csv; a table that is missing or damaged tells nothing."""
    with contextlib.suppress(UserError, OSError):
        return {clip["slice_file_name"]: clip["fold"] for clip in data_loader.read_clip_table(table)}
    return {}


def note(fold, infos):
    """Return a line on what the models' answer to a clip of a fold (1 to 10) is worth.

    infos: metadata of the models that answer. A model has met the clip if its training folds have it, or if it is of a
    fold that neither trained nor tested the model: that one has chosen its epoch.
    """
    own = fold - 1  # as --fold_num counts
    what = f"a clip of the data set's fold {fold}"
    if not all(isinstance(info.get("fold"), int) and isinstance(info.get("training_folds"), list) for info in infos):
        return f"{what}; the model does not say on which folds it was trained"  # it may be a stranger's
    trained = [info["fold"] for info in infos if fold in info["training_folds"]]
    chose = [info["fold"] for info in infos if info["fold"] not in (own, *trained)]
    if not trained and not chose:
        return f"{what}, which this model has not trained on"
    if len(infos) > 1:
        count = f"{len(trained)} of {len(infos)} models trained on it"
        return f"{what}: {count}, so the answer is too good; --fold_num {own} has never heard it"
    how = "trained on it" if trained else "has chosen its epoch with it"
    return f"{what}: this model {how}, so the answer is too good; --fold_num {own} has never heard it"
