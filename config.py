"""Every setting of the project: edit here, then run the scripts.

A script's flags override these for one run. Derived values are derived: change the first value of a chain and the
rest follows. The audio settings are stored in data/features.json and in every model file, so prediction uses the
settings that its model was trained with, whatever stands here by then.
"""

import os
from pathlib import Path
from typing import Literal

# --- Paths -----------------------------------------------------------------------------------------------------
# All that the scripts write is below one folder beside the project. `--assets_dir` changes it for one run.
ASSETS_BASE_DIR: str | Path = Path(__file__).resolve().parent.parent / "assets" / "audio_is_all_you_need"
# Below that folder; an absolute path is taken as it is.
DATASET_DIR: str | Path = "data/UrbanSound8K"  # stage 1: audio/fold1 ... fold10 and metadata/UrbanSound8K.csv
PROCESSED_DIR: str | Path = "data"  # stage 2: features.pkl and its companions
CHECKPOINT_DIR: str | Path = "checkpoints"  # stage 3: fold_<k>/epoch_<e>.pt and training_state.json
MODEL_DIR: str | Path = "models"  # stage 3: model_fold_<k>_best.safetensors, all that prediction needs
RESULTS_DIR: str | Path = "results"  # stage 3: predictions, results.json, report.md, pictures

# --- Audio: clip to log-mel spectrogram --------------------------------------------------------------------------
SAMPLE_RATE: int = 22_050  # Hz; every clip is resampled to it
CLIP_SECONDS: float = 4.0  # s; the longest clip of UrbanSound8K, and the length of one decision
N_FFT: int = 2048  # samples in one frame (93 ms)
HOP_LENGTH: int = 512  # samples from one frame to the next (23 ms)
N_MELS: int = 128  # mel bands (Slaney's scale and area norm, librosa's default)
F_MIN: float = 0.0  # Hz; lower edge of the lowest mel band
F_MAX: float = SAMPLE_RATE / 2  # Hz; upper edge of the highest mel band
TOP_DB: float = 80.0  # dB; cells further below the clip's loudest cell are raised to that level
SHORT_CLIPS: Literal["repeat", "silence"] = "repeat"  # what fills clips under CLIP_SECONDS
FEATURE_DTYPE: Literal["float16", "float32"] = "float16"  # float16 rounds by at most 0.03 dB, in half the memory

# --- Folds of data sets that have none -----------------------------------------------------------------------------
N_FOLDS: int = 5  # 2 to 10; groups stay together, classes are spread evenly

# --- Training ----------------------------------------------------------------------------------------------------
MODEL: str = "SharedAudioCNN"  # a name in model.py: the seed's network on four views of a clip; or "AudioCNN" on one
EPOCHS: int = 80
BATCH_SIZE: int = 32  # clips
LEARNING_RATE: float = 3e-3  # peak of the schedule
SCHEDULE: Literal["one_cycle", "constant"] = "one_cycle"  # "constant" is for the plain recipe of research/RESULTS.md
WARMUP_SHARE: float = 0.3  # of all steps: the learning rate rises until there, then falls to zero
WEIGHT_DECAY: float = 1e-2  # AdamW's, on every weight that is not a bias or a norm
LABEL_SMOOTHING: float = 0.2  # 0.1 more of it cost nothing and made the probabilities better
CLASS_WEIGHTS: Literal["none", "balanced"] = "none"  # of the loss; "balanced": rare classes count more, all the same
BLOCK_DROPOUT: float = 0.1  # after each convolution block
HEAD_DROPOUT: float = 0.5  # before the last linear layer
SEED: int = 0  # of weights, order of clips, augmentation and dropout

# Augmentation, of training batches only (augment.py); 0 turns one off. research/RESULTS.md has what each is worth.
CROP_FRAMES: int = 96  # frames of a random crop (of 173): halves the cost of a step; testing uses whole clips
TIME_STRETCH: float = 0.2  # a crop plays faster or slower by up to this share
MIXUP_ALPHA: float = 0.3  # Beta(a, a) of mixup (Zhang et al. 2018, arXiv:1710.09412)
BAND_STRETCH: float = 0.1  # the mel axis is stretched by up to this share
MASK_BANDS: int = 16  # mel bands; longest SpecAugment frequency mask (Park et al. 2019, arXiv:1904.08779)
MASK_FRAMES: int = 16  # frames; longest SpecAugment time mask

# --- Evaluation --------------------------------------------------------------------------------------------------
# Which clips choose the epoch that is tested. Fold k is tested once, after the choice.
#   "next_fold": fold k+1 (of those present) chooses, the rest train
#   "none":      all other folds train, the last epoch counts
#   "test_fold": the test fold itself chooses. What most public results do; every table then says 'optimistic'
VALIDATION: Literal["next_fold", "none", "test_fold"] = "next_fold"

# --- Running -----------------------------------------------------------------------------------------------------
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or a name such as "cuda:1"
# Of the network in training and validation; "auto" is bfloat16 where the processor computes in it, else float32.
PRECISION: Literal["auto", "bfloat16", "float32"] = "auto"
FAST_BLOCKS: bool = True  # train convolution blocks with kernels.py on CPUs: the same numbers to rounding, in less time
KEEP_EPOCHS: int | None = 2  # newest checkpoints kept of each fold; None keeps all
WORKERS: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # processes

# --- Hugging Face Hub: optional; empty means off -----------------------------------------------------------------
HF_REPO_ID: str = os.environ.get("HF_REPO_ID", "")  # "owner/name" of a data set repository for the processed files
HF_MODEL_REPO_ID: str = os.environ.get("HF_MODEL_REPO_ID", "")  # "owner/name" of a repository for the trained models
HF_COMMIT_MINUTES: float = 5.0  # min between two commits during a fold; the Hub refuses more than about 128 an hour
HF_PRIVATE: bool = True  # a repository that has to be created is private

# --- Weights & Biases: optional; empty means off -----------------------------------------------------------------
WANDB_PROJECT: str = os.environ.get("WANDB_PROJECT", "")  # each fold's curves, best model and mistakes are sent there
WANDB_ENTITY: str = os.environ.get("WANDB_ENTITY", "")  # team or user; empty means the account's own default


def __getattr__(name):
    """Python calls this for a setting that a script asks for and this file lacks: deleted, or misspelt."""
    if not name.isupper():
        raise AttributeError(f"module 'config' has no attribute {name!r}")
    import difflib
    import sys

    near = difflib.get_close_matches(name, [known for known in globals() if known.isupper()], 1)
    hint = f"is {near[0]} meant to be it?" if near else "take its line from the project's own config.py"
    print(f"error: config.py has no {name}: {hint}", file=sys.stderr)
    raise SystemExit(2)
