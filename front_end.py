"""From a clip's samples to its log-mel spectrogram: the one front-end, for training and prediction.

`read_audio` (audio_reader.py) and `clip_features` make the features of the data set (preprocess_data.py) and of a
stranger's recording (predict.py), with the same AudioSettings, which travel inside features.json and every model file.

Nothing here imports torch: the preprocessing workers need only numpy and scipy.
"""

import functools

import numpy as np
from scipy.fft import rfft

GROUP_BANDS = 8  # mel bands of one matrix product
# Multiplications in one such product. OpenBLAS shares those of over 2**18 among its threads, and where it cuts them
# decides the last bit: training and prediction would differ by the threads that each has.
PRODUCT_SIZE = 2**17


def fit_clip(samples, audio):
    """Return `samples` cut or lengthened to one clip, shape (audio.clip_samples,)."""
    if len(samples) >= audio.clip_samples:
        return samples[: audio.clip_samples]
    if audio.short_clips == "silence":
        return np.pad(samples, (0, audio.clip_samples - len(samples)))
    return np.resize(samples, audio.clip_samples)  # repeats from the start


def hz_to_mel(frequency):
    """Slaney's mel scale: linear to 1 kHz (3 mel per 200 Hz), then logarithmic (27 steps for a factor of 6.4).

    M. Slaney, "Auditory Toolbox: Version 2", Interval Research, 1998; librosa's default.
    """
    frequency = np.asarray(frequency, np.float64)
    return np.where(
        frequency < 1000, frequency * 3 / 200, 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / np.log(6.4)
    )


def mel_to_hz(mel):
    """The inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


@functools.lru_cache
def mel_filters(audio):
    """Return the triangular mel filters, shape (1 + n_fft // 2, n_mels) float32, each of unit area over Hz."""
    fft_frequencies = np.fft.rfftfreq(audio.n_fft, 1 / audio.sample_rate)  # (1 + n_fft // 2,) Hz
    mels = np.linspace(hz_to_mel(audio.f_min), hz_to_mel(audio.f_max), audio.n_mels + 2)
    lower, centre, upper = (mel_to_hz(mels)[k : k + audio.n_mels] for k in range(3))  # (n_mels,) Hz each
    rising = (fft_frequencies[:, None] - lower) / (centre - lower)
    falling = (upper - fft_frequencies[:, None]) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))  # (1 + n_fft // 2, n_mels)
    return (triangles * 2 / (upper - lower)).astype(np.float32)


@functools.lru_cache
def mel_groups(audio):
    """Return the mel filters as [(slice of the spectrum's numbers, slice of the mel bands, matrix)], GROUP_BANDS each.

    A band needs few of the frequencies, so that narrow products take a quarter of the time of the whole one. Real and
    imaginary parts each have a row: squares of both, side by side as rfft gives them, add up to power in the product.
    """
    filters = mel_filters(audio)
    groups = []
    for first in range(0, audio.n_mels, GROUP_BANDS):
        bands = slice(first, min(first + GROUP_BANDS, audio.n_mels))
        used = np.flatnonzero(filters[:, bands].any(axis=1))
        low, high = (used[0], used[-1] + 1) if len(used) else (0, 1)  # bands narrower than one FFT bin may be empty
        groups.append((slice(2 * low, 2 * high), bands, np.repeat(filters[low:high, bands], 2, axis=0)))
    return groups


@functools.lru_cache
def hann_window(length):
    """Return the periodic Hann window, shape (length,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def spectrum(samples, audio):
    """Return the spectrum of each frame, centred on zero padding: (1 + n // hop_length, 1 + n_fft // 2) complex64."""
    padded = np.pad(samples, audio.n_fft // 2)  # (n + n_fft,)
    frames = np.lib.stride_tricks.sliding_window_view(padded, audio.n_fft)[:: audio.hop_length]  # (frames, n_fft)
    return rfft(frames * hann_window(audio.n_fft), axis=1)


def log_mel(samples, audio):
    """Return the log-mel spectrogram of mono samples in dB, shape (n_mels, 1 + n // hop_length) float32.

    Equals librosa's `power_to_db(melspectrogram(...))` with its defaults (frames centred on zero padding, power 2,
    reference 1, floor 1e-10) to within rounding.
    """
    squares = spectrum(samples, audio).view(np.float32)  # (frames, 2 + n_fft): real, imaginary, real, ...
    squares *= squares
    mel = np.empty((len(squares), audio.n_mels), np.float32)  # (frames, n_mels)
    for numbers, bands, filters in mel_groups(audio):
        step = max(PRODUCT_SIZE // filters.size, 1)  # frames
        for first in range(0, len(squares), step):
            mel[first : first + step, bands] = squares[first : first + step, numbers] @ filters
    decibels = 10 * np.log10(np.maximum(mel, 1e-10))
    return np.maximum(decibels, decibels.max() - audio.top_db).T


def fine_log_mel(samples, audio):
    """Return the log-mel spectrogram in fine frames, (fine_n_mels, fine_frames for each frame of `log_mel`), in dB."""
    n_frames = audio.fine_frames * (1 + len(samples) // audio.hop_length)
    needed = (n_frames - 1) * audio.fine.hop_length  # samples, for as many frames
    return log_mel(np.pad(samples, (0, max(needed - len(samples), 0))), audio.fine)[:, :n_frames]


def clip_features(samples, audio):
    """Return the features of one clip as they are stored and trained on, shape (rows, n_frames), in dB.

    The rows are the n_mels bands of the log-mel, then the fine_n_mels bands of the first fine frame of each frame, then
    those of the next: so all that sounds at one time stands in one column. `unfold` (model.py) joins the fine frames.
    """
    samples = fit_clip(samples, audio)
    fine = fine_log_mel(samples, audio)  # (fine_n_mels, fine_frames x n_frames)
    fine = [fine[:, first :: audio.fine_frames] for first in range(audio.fine_frames)]
    return np.concatenate([log_mel(samples, audio), *fine]).astype(audio.feature_dtype)
