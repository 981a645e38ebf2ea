"""Every path, hyperparameter and service id of the project: edit here, then run the numbered scripts.

Each script's flags override these for one run. Derived values are derived: change the first value of a chain
and the rest follows. The audio settings go into data/features.json and into every model file, so prediction
uses the settings that its model was trained with, whatever stands here by then.
"""

import os
from pathlib import Path

# --- Paths -----------------------------------------------------------------------------------------------------
# Everything that the scripts write lies below one folder beside the project. `--assets_dir` moves it for one run.
ASSETS_BASE_DIR = Path(__file__).resolve().parent.parent / "assets" / "audio_is_all_you_need"
# Below that folder; an absolute path here is taken as it is.
DATASET_DIR = "data/UrbanSound8K"  # stage 1: audio/fold1 ... fold10 and metadata/UrbanSound8K.csv
PROCESSED_DIR = "data"  # stage 2: features.pkl and its companions
CHECKPOINT_DIR = "checkpoints"  # stage 3: fold_<k>/epoch_<e>.pt and training_state.json
MODEL_DIR = "models"  # stage 3: model_fold_<k>_best.safetensors, all that prediction needs
RESULTS_DIR = "results"  # stage 3: predictions, results.json, report.md, pictures

# --- Audio: clip to log-mel spectrogram --------------------------------------------------------------------------
SAMPLE_RATE = 22_050  # Hz; every clip is resampled to it
CLIP_SECONDS = 4.0  # s; the longest clip of UrbanSound8K, and the length of one decision
N_FFT = 2048  # samples in one FFT frame (93 ms)
HOP_LENGTH = 512  # samples from one frame to the next (23 ms)
N_MELS = 128  # mel bands (Slaney's scale and area norm, as librosa's default)
# A second log-mel, below the first: its short FFT frames tell moments apart, and pitches less. AudioViews sees both.
FINE_FRAMES = 2  # of it, for each frame of the first
FINE_N_FFT = 512  # samples in one of its FFT frames (23 ms)
FINE_N_MELS = 32  # its mel bands
F_MIN = 0.0  # Hz; lower edge of the lowest mel band
F_MAX = SAMPLE_RATE / 2  # Hz; upper edge of the highest mel band
TOP_DB = 80.0  # dB; everything further below the clip's loudest cell is raised to that level
SHORT_CLIPS = "repeat"  # clips under CLIP_SECONDS: "repeat" them to full length, or pad with "silence"
FEATURE_DTYPE = "float16"  # of the stored features; float16 rounds by at most 0.03 dB and halves file and memory

# --- Training ----------------------------------------------------------------------------------------------------
# A class in model.py: "AudioViews", three small networks, each on a view of its own of a clip; "SharedAudioCNN", one
# network on four views; or "AudioCNN", one on all frames
MODEL = "AudioViews"
EPOCHS = 80
QUICK_SHARE = 0.1  # of EPOCHS that train.py --quick trains
BATCH_SIZE = 32  # clips
LEARNING_RATE = 3e-3  # peak of the schedule
SCHEDULE = "one_cycle"  # or "constant"
WARMUP_SHARE = 0.3  # of all steps of the one cycle; the learning rate rises until there, then falls to zero
WEIGHT_DECAY = 1e-2  # AdamW's, on every weight that is not a bias or a norm
LABEL_SMOOTHING = 0.2
BLOCK_DROPOUT = 0.1  # after each convolution block
HEAD_DROPOUT = 0.5  # before the last linear layer
SEED = 0

# Augmentation, of training batches only; 0 turns a part off. RESULTS.md has what each part is worth.
CROP_FRAMES = 96  # frames of a random crop (of 173): halves the cost of a step; testing uses whole clips
TIME_STRETCH = 0.2  # a crop plays faster or slower by up to this share: nearest frames, so that it costs nothing
MIXUP_ALPHA = 0.3  # Beta(a, a) of mixup (Zhang et al. 2018, arXiv:1710.09412)
BAND_SHIFT = 0  # mel bands; random shift up or down by at most this many; 5 cost 5 points
BAND_STRETCH = 0.1  # random stretch of the mel axis by up to this share
GAIN_DB = 6.0  # dB; random level up or down by at most this
FILTER_DB = 6.0  # dB; random frequency response within this, as of another microphone (Nam et al., arXiv:2110.03282)
MASK_BANDS = 16  # mel bands; longest SpecAugment frequency mask (Park et al. 2019, arXiv:1904.08779)
MASK_FRAMES = 16  # frames; longest SpecAugment time mask

# --- Evaluation --------------------------------------------------------------------------------------------------
# Which clips choose the epoch that is tested. Fold k is tested once, after the choice.
#   "next_fold": fold k+1 (of those present) chooses, the rest train
#   "none":      all other folds train, the last epoch counts
#   "test_fold": the test fold itself chooses. What most public results do; every table then says 'optimistic'
VALIDATION = "next_fold"

# --- Running -----------------------------------------------------------------------------------------------------
DEVICE = "auto"  # "auto": cuda, else mps, else cpu; or a name such as "cuda:1"
PRECISION = "auto"  # "bfloat16" autocast, "float32", or "auto": bfloat16 where the processor computes in it
KEEP_EPOCHS = 2  # newest checkpoints kept per fold; None keeps all
WORKERS = os.cpu_count() or 1  # preprocessing processes

# --- Hugging Face Hub: optional; empty means off -----------------------------------------------------------------
HF_REPO_ID = os.environ.get("HF_REPO_ID", "")  # "owner/name" of a data set repository for the processed files
HF_MODEL_REPO_ID = os.environ.get("HF_MODEL_REPO_ID", "")  # "owner/name" of a model repository for what training makes
HF_COMMIT_MINUTES = 5  # min between two commits during a fold; the Hub refuses more than about 128 an hour
HF_PRIVATE = True  # a repository that has to be created is private

# --- Weights & Biases: optional; empty means off -----------------------------------------------------------------
WANDB_PROJECT = os.environ.get("WANDB_PROJECT", "")  # each fold's curves, best model and mistakes go there
WANDB_ENTITY = os.environ.get("WANDB_ENTITY", "")  # team or user; empty means the account's own default


def __getattr__(name):
    """Python calls this for a setting that a script asks for and this file lacks: misspelt, or deleted."""
    if not name.isupper():
        raise AttributeError(f"module 'config' has no attribute {name!r}")
    import difflib
    import sys

    near = difflib.get_close_matches(name, [known for known in globals() if known.isupper()], 1)
    hint = f"is {near[0]} meant to be it?" if near else "take the line back from the project's own config.py"
    print(f"error: config.py has no {name}: {hint}", file=sys.stderr)
    raise SystemExit(2)
