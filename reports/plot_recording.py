"""The pictures of one recording that predict.py draws: what sounds when (--plot), and why (--explain)."""

from pathlib import Path

import numpy as np
import torch

import batches
import front_end
from reports import explain, plots

MOST_COLUMNS = 2000  # of a picture; more frames are averaged
TICKS_MINUTES = (0.5, 1, 2, 5, 10, 30, 60, 120)
TICKS_HZ = (100, 500, 1000, 2000, 5000, 10_000, 20_000)


class Sketch:
    """What the pictures need of a recording, taken down window by window: about 270 bytes a frame of 23 ms."""

    def __init__(self, audio):
        self.audio = audio
        self.log_mels, self.extremes = [], []  # of new frames: (n_mels, frames) dB, (frames, 2) of -1 to 1
        self.frames = 0
        self.strongest = {}  # {place of a class: (probability, first sample, features) of the surest window}

    def add(self, start, samples, features, distribution):
        """Take a window down: its first sample, samples (n,), features (rows, n_frames), distribution (classes,)."""
        hop = self.audio.hop_length
        known = self.frames - round(start / hop)  # frames that the window before had, too
        new = slice(known, -(-len(samples) // hop))
        padded = np.pad(samples, (0, -len(samples) % hop), mode="edge").reshape(-1, hop)[new]  # (frames, hop)
        self.log_mels.append(features[: self.audio.n_mels, new].astype(np.float16))
        self.extremes.append(np.stack([padded.min(axis=1), padded.max(axis=1)], axis=1))
        self.frames += len(padded)
        for place, probability in enumerate(distribution):
            if probability > self.strongest.get(place, (0,))[0]:  # nor is NaN
                self.strongest[place] = probability, start, features


def draw_recording(path, name, answer, sketch):
    """Draw waveform, log-mel spectrogram and each class's probability over one time axis.

    name: of the recording; answer: its Answer; sketch: a Sketch that has seen all its windows.
    """
    best = answer.class_names[answer.best]
    title = f"{plots.label(Path(name).name)}: {plots.label(best)}, {answer.mean[answer.best]:.0%}"
    figure = plots.new_figure(13, 11, title)
    wave, mel, classes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    extremes, step = reduced(np.concatenate(sketch.extremes), np.min, np.max)
    times = np.arange(len(extremes)) * step * sketch.audio.hop_length / sketch.audio.sample_rate
    wave.fill_between(times, extremes[:, 0], extremes[:, 1], color=plots.BLUE, linewidth=0.8, edgecolor=plots.BLUE)
    wave.set_ylabel("amplitude", fontsize=14)
    log_mel = reduced(np.concatenate(sketch.log_mels, axis=1).T.astype(np.float32), np.mean, np.mean)[0].T
    draw_log_mel(figure, mel, log_mel, sketch.audio, (0, answer.seconds))
    draw_probabilities(figure, classes, answer)
    for axes in (wave, mel, classes):
        axes.tick_params(labelsize=12)
        axes.set_xlim(0, answer.seconds)
    in_minutes = answer.seconds > 120
    if in_minutes:
        step = next((step for step in TICKS_MINUTES if answer.seconds <= 600 * step), TICKS_MINUTES[-1])
        ticks = np.arange(0, answer.seconds, 60 * step)
        classes.set_xticks(ticks, [f"{tick / 60:g}" for tick in ticks])
    classes.set_xlabel("time, min" if in_minutes else "time, s", fontsize=14)
    plots.save(figure, path)


def reduced(rows, first, second):
    """Return (rows joined so that there are at most MOST_COLUMNS, rows joined into one); rows: (n, 2) or (n, n_mels).

    first, second: numpy's functions for the first column and for the others.
    """
    step = -(-len(rows) // MOST_COLUMNS)
    groups = np.pad(rows, ((0, -len(rows) % step), (0, 0)), mode="edge").reshape(-1, step, rows.shape[1])
    return np.concatenate([first(groups[..., :1], axis=1), second(groups[..., 1:], axis=1)], axis=1), step


def draw_log_mel(figure, axes, log_mel, audio, times):
    """Draw a log-mel spectrogram, (n_mels, columns) dB, between two times in s; the frequencies are marked in Hz."""
    extent = (*times, 0, audio.n_mels)
    image = axes.imshow(log_mel, cmap="magma", origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.01).set_label("dB", fontsize=13)
    low, high = front_end.hz_to_mel([audio.f_min, audio.f_max])
    ticks = [frequency for frequency in TICKS_HZ if audio.f_min <= frequency <= audio.f_max]
    axes.set_yticks((front_end.hz_to_mel(ticks) - low) / (high - low) * audio.n_mels, ticks)
    axes.set_ylabel("frequency, Hz", fontsize=14)


def draw_probabilities(figure, axes, answer):
    """Draw every class's probability over the parts of a recording; silence stays white."""
    edges, distributions = answer.parts
    rows = np.arange(len(answer.class_names) + 1)
    image = axes.pcolormesh(edges, rows, 100 * distributions.T, cmap="Blues", vmin=0, vmax=100)
    axes.set_yticks(rows[:-1] + 0.5, [plots.label(name) for name in answer.class_names], fontsize=12)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, pad=0.01).set_label("probability, %", fontsize=13)


def draw_explanation(path, name, answer, models, sketch):
    """Draw which part of the spectrogram the likeliest class hangs on, in the window that is surest of it.

    The map is Grad-CAM (explain.py), the mean over models, [(network, info)].
    """
    probability, start, features = sketch.strongest[answer.best]
    target = torch.tensor([answer.best])
    maps = []
    for network, info in models:
        inputs = batches.normalise(torch.from_numpy(features[None]), batches.statistics_of(info))
        maps.append(explain.grad_cam(network, inputs, target)[0])
    heat = torch.stack(maps).mean(dim=0).numpy()  # (n_mels, frames)
    audio, class_name = sketch.audio, plots.label(answer.class_names[answer.best])
    begin = start / audio.sample_rate
    times = begin, begin + audio.clip_seconds
    figure = plots.new_figure(
        13, 9, f"{plots.label(Path(name).name)}: what '{class_name}' ({probability:.0%}) hangs on"
    )
    plain, marked = figure.subplots(2, 1, sharex=True, sharey=True)
    draw_log_mel(figure, plain, features[: audio.n_mels].astype(np.float32), audio, times)
    plain.set_title("log-mel spectrogram, as the network hears it", fontsize=14)
    extent = (*times, 0, audio.n_mels)
    image = marked.imshow(heat, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
    figure.colorbar(image, ax=marked, pad=0.01).set_label("weight in the decision", fontsize=13)
    marked.set_title("Grad-CAM: the brighter, the more it speaks for the class", fontsize=14)
    marked.set_ylabel("frequency, Hz", fontsize=14)
    marked.set_xlabel("time, s", fontsize=14)
    for axes in (plain, marked):
        axes.tick_params(labelsize=12)
    plots.save(figure, path)
