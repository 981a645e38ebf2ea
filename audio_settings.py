"""How audio becomes features: the settings of config.py as one value, which travels with the features and the model.

The same values come back from features.json and from model files, which a stranger may have written, so they are
checked wherever they come from.
"""

import dataclasses
import functools

import config
from utils import UserError

SETTING_LIMITS = {  # least and most that make sense; files from strangers have settings too
    "sample_rate": (100, 768_000),
    "clip_seconds": (0.001, 600),
    "n_fft": (2, 32_768),
    "hop_length": (1, 32_768),
    "n_mels": (1, 1024),
    "fine_frames": (1, 64),
    "fine_n_fft": (2, 32_768),
    "fine_n_mels": (4, 1024),
    "f_min": (0, 384_000),
    "f_max": (1, 384_000),
    "top_db": (0, 1000),
}
SETTING_CHOICES = {"short_clips": ("repeat", "silence"), "feature_dtype": ("float16", "float32")}
MOST_FFT_SAMPLES = 2**27  # frames x n_fft of one clip


@dataclasses.dataclass(frozen=True)
class AudioSettings:
    """How audio becomes features; the defaults are config.py's, where each is explained."""

    sample_rate: int = config.SAMPLE_RATE  # Hz
    clip_seconds: float = config.CLIP_SECONDS  # s
    n_fft: int = config.N_FFT  # samples
    hop_length: int = config.HOP_LENGTH  # samples
    n_mels: int = config.N_MELS
    fine_frames: int = config.FINE_FRAMES  # of each frame
    fine_n_fft: int = config.FINE_N_FFT  # samples
    fine_n_mels: int = config.FINE_N_MELS
    f_min: float = config.F_MIN  # Hz
    f_max: float = config.F_MAX  # Hz
    top_db: float = config.TOP_DB  # dB
    short_clips: str = config.SHORT_CLIPS
    feature_dtype: str = config.FEATURE_DTYPE

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, what = getattr(self, field.name), f"the audio setting {field.name}"
            if field.type is str:
                if value not in SETTING_CHOICES[field.name]:
                    raise UserError(f"{what} is {value!r}: it must be one of {', '.join(SETTING_CHOICES[field.name])}")
                continue
            least, most = SETTING_LIMITS[field.name]
            if not isinstance(value, (int, field.type)) or not least <= value <= most:
                kind = "whole number" if field.type is int else "number"
                raise UserError(f"{what} is {value!r}: it must be a {kind} from {least} to {most}")
        for name in ("n_fft", "fine_n_fft"):
            if getattr(self, name) % 2:
                raise UserError(f"the audio setting {name} is {getattr(self, name)}: it must be even")
        if self.hop_length % self.fine_frames:
            raise UserError(
                f"the audio setting hop_length is {self.hop_length}: it must be a multiple of fine_frames, "
                f"{self.fine_frames}"
            )
        if self.f_min >= self.f_max:
            raise UserError(f"the audio setting f_min is {self.f_min} and f_max {self.f_max}: f_max must be higher")
        for frames, n_fft in ((self.n_frames, self.n_fft), (self.n_frames * self.fine_frames, self.fine_n_fft)):
            if frames * n_fft > MOST_FFT_SAMPLES:
                raise UserError(f"the audio settings make {frames} frames of {n_fft} samples: raise hop_length")

    @property
    def clip_samples(self):
        """Samples in one clip: 88,200 for 4 s at 22,050 Hz."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def n_frames(self):
        """Frames in one clip: 173 for 88,200 samples and a hop of 512."""
        return 1 + self.clip_samples // self.hop_length

    @property
    def blocks(self):
        """Mel bands of each block of a clip's rows: of the log-mel, then of each of a frame's fine frames."""
        return [self.n_mels] + [self.fine_n_mels] * self.fine_frames

    @property
    def shape(self):
        """(rows, frames) of one clip's features; front_end.py's `clip_features` says what the rows are."""
        return sum(self.blocks), self.n_frames

    @functools.cached_property
    def fine(self):
        """The settings of the fine log-mel by itself."""
        hop_length = self.hop_length // self.fine_frames
        changes = {"n_fft": self.fine_n_fft, "hop_length": hop_length, "n_mels": self.fine_n_mels, "fine_frames": 1}
        return dataclasses.replace(self, **changes)
