"""The pictures: of the report (write_report draws them), of one recording, and Grad-CAM (predict.py draws those).

Made to be read at half their size, and by the colour-blind: blue and orange of Okabe and Ito's palette, and a solid
against a dashed line wherever two things are compared. matplotlib and torch are imported where they are used: they are
slow to import. matplotlib's `Figure` is used without pyplot, so that no display and no backend is needed.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import utils
from audio import clip_features, hz_to_mel
from utils import UserError

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"
DOT = {"linestyle": "", "marker": "o", "color": "white", "markeredgecolor": "black", "markersize": 6, "clip_on": False}
DPI = 150  # pixels per inch
MAX_LABEL = 60  # characters
MAX_COLUMNS = 2000  # of the picture of a recording; more frames are averaged
TICKS_HZ = (100, 500, 1000, 2000, 5000, 10_000, 20_000)
STYLE = {  # sizes in points
    "font.size": 13,
    "figure.titlesize": 17,
    "axes.titlesize": 15,
    "axes.labelsize": 15,
    "legend.frameon": False,
    "lines.linewidth": 2.5,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
}
MIN_COLUMNS = 16  # of the feature maps that Grad-CAM shows: 4 s in steps of a quarter of a second


def import_matplotlib():
    """Import and return matplotlib, and leave its back end to the user: a notebook's shows figures of theirs.

    The import fails if MPLBACKEND or MATPLOTLIBRC name what can't be used.
    """
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    own = {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    try:
        matplotlib = utils.need("matplotlib", "drawing")
    finally:
        for name, value in own.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value else {})
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = own["MPLBACKEND"] or "agg"
    return matplotlib


@contextlib.contextmanager
def picture(path, title, width, height):
    """Yield an empty matplotlib Figure, which is then written as PNG, atomically; width and height in inches.

    In one style, whatever a user's matplotlibrc says: its LaTeX or fonts could stop a picture. The title goes into the
    file as text, too.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings(), utils.atomic_write(path) as file:
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure((width, height), DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
        figure.suptitle(title)
        yield figure
        figure.savefig(file, format="png", metadata={"Title": title})


def read(path):
    """Return a picture as an array, (height, width, RGBA), of 0 to 1."""
    return utils.need("matplotlib.image", "drawing").imread(path)


def label(name):
    """Return a name as matplotlib shall show it, in one line: without this, a pair of $ would start a formula."""
    return utils.one_line(name, MAX_LABEL).replace("$", r"\$").replace("_", " ")


# --- The report --------------------------------------------------------------------------------------------------


def draw_confusion_matrix(path, results, title):
    """Draw the share of each true class's clips (rows) that went to each predicted class (columns)."""
    names = [label(name) for name in results["class_names"]]
    clips = np.array(results["confusion_matrix"])  # (classes, classes)
    shares = 100 * clips / np.maximum(clips.sum(axis=1, keepdims=True), 1)
    side = max(11, 0.5 * len(names))
    with picture(path, title, side, 0.87 * side) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        rows = [f"{name} ({count})" for name, count in zip(names, clips.sum(axis=1), strict=True)]
        axes.set_yticks(range(len(names)), rows)
        axes.set(xlabel="predicted", ylabel="true (clips)")
        for row, column in zip(*np.nonzero(clips), strict=True):
            share = shares[row, column]
            text, color = f"{share:.0f}" if share >= 0.5 else "<1", "white" if share > 50 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=15, color=color)
        figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")


def draw_classes(path, results, title):
    """Draw F1 and recall of each class over all clips as bars, and each fold's recall as a dot; best class on top."""
    scores = pd.DataFrame.from_dict(results["per_class"], "index").astype(float)  # None is NaN
    scores = scores.sort_values("f1", na_position="first", kind="stable")
    rows = np.arange(len(scores))
    with picture(path, title, 11, max(4, 1.5 + 0.75 * len(rows))) as figure:
        axes = figure.add_subplot()
        axes.barh(rows + 0.2, 100 * scores["f1"].fillna(0), height=0.38, color=BLUE, label="F1")
        axes.barh(rows - 0.2, 100 * scores["recall"].fillna(0), height=0.38, color=ORANGE, label="recall")
        if results["folds_present"] > 1:
            recalls = pd.DataFrame(results["recall_per_fold"], dtype=float)[scores.index]  # (folds, classes)
            axes.plot(100 * recalls.T, rows - 0.2, **DOT)
            axes.plot([], [], label="recall of one fold", **DOT)
        names = [label(name) + ("" if clips else " (no clips)") for name, clips in scores["clips"].items()]
        axes.set_yticks(rows, names)
        axes.set(xlim=(0, 102), xlabel="%")
        axes.grid(axis="x")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_reliability(path, results, title):
    """Draw accuracy against confidence, before and (if there is one) after the temperature.

    Below each, how many of the clips have that confidence.
    """
    parts = {name: values for name, values in results["confidence"].items() if values}
    with picture(path, title, max(8, 6 * len(parts)), 8) as figure:
        grid = figure.subplots(2, len(parts), sharex=True, squeeze=False, height_ratios=(3, 1))  # (2, parts) axes
        for (upper, lower), (name, values) in zip(grid.T, parts.items(), strict=True):
            bins = pd.DataFrame(values["bins"])
            middles, width = 50 * (bins["from"] + bins["to"]), 90 * (bins["to"] - bins["from"])
            upper.bar(middles, 100 * bins["accuracy"], width, color=BLUE, label="accuracy")
            upper.plot([0, 100], [0, 100], color=ORANGE, linestyle="--", label="as it should be")
            lower.bar(middles, 100 * bins["clips"] / results["clips"], width, color=GREY)
            upper.set(ylim=(0, 100), title=f"{name} temperature: ECE {100 * values['ece']:.1f} %")
            lower.set(xlim=(0, 100), xlabel="confidence, %")
        grid[0, 0].set_ylabel("accuracy, %")
        grid[1, 0].set_ylabel("% of clips")
        grid[0, 0].legend(loc="upper left")


def draw_curves(path, results, title, histories):
    """Draw accuracy and loss over the epochs, training and validation: a line for each fold, a dot where it was tested.

    histories: {fold: DataFrame of history_fold_<k>.csv}.
    """
    best_epochs = {row["fold"]: row["best_epoch"] for row in results["per_fold"]}
    with picture(path, title, 13, 6) as figure:
        both = figure.subplots(1, 2)
        for axes, quantity, scale in zip(both, ("accuracy", "loss"), (100, 1), strict=True):
            for part, style in (("train", {"color": BLUE}), ("validation", {"color": ORANGE, "linestyle": "--"})):
                column = f"{part}_{quantity}"
                rows = {fold: history.dropna(subset=column) for fold, history in histories.items()}
                for fold, history in rows.items():
                    axes.plot(history["epoch"], scale * history[column], linewidth=1.5, **style)
                    tested = history[history["epoch"] == best_epochs[fold]]
                    axes.plot(tested["epoch"], scale * tested[column], marker="o", **style)
                if any(map(len, rows.values())):
                    axes.plot([], [], label=part, **style)
            axes.set(xlabel="epoch", ylabel="accuracy, %" if quantity == "accuracy" else "loss")
            axes.set_ylim(0, 100 if quantity == "accuracy" else None)
            axes.grid()
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        both[0].plot([], [], label="tested epoch", linestyle="", marker="o", color=GREY)
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


# --- A recording -------------------------------------------------------------------------------------------------


class Sketch:
    """What the pictures need of a recording, added window by window: about 270 bytes for a frame of 23 ms."""

    def __init__(self, audio):
        self.audio = audio
        self.log_mels, self.extremes = [], []  # of new frames: (n_mels, frames) dB, (frames, 2) of -1 to 1
        self.frames = 0
        self.strongest = {}  # {class index: (probability, first sample, features) of the surest window}

    def add(self, start, samples, distribution):
        """Add a window: its first sample, samples (n,), distribution (classes,)."""
        hop, features = self.audio.hop_length, clip_features(samples, self.audio)  # (n_mels, n_frames) dB
        known = self.frames - round(start / hop)  # frames that the window before had, too
        new = slice(known, -(-len(samples) // hop))
        padded = np.pad(samples, (0, -len(samples) % hop), mode="edge").reshape(-1, hop)[new]  # (frames, hop)
        self.log_mels.append(features[:, new].astype(np.float16))
        self.extremes.append(np.stack([padded.min(axis=1), padded.max(axis=1)], axis=1))
        self.frames += len(padded)
        for index, probability in enumerate(distribution):
            if probability > self.strongest.get(index, (0,))[0]:  # NaN, of silence, is not
                self.strongest[index] = probability, start, features


def draw_recording(path, name, answer, sketch):
    """Draw waveform, log-mel spectrogram and each class's probability over one time axis.

    name: of the recording; answer: its Answer; sketch: a Sketch that has seen all its windows.
    """
    title = f"{label(Path(name).name)}: {label(answer.label)}, {answer.confidence:.0%}"
    extremes = grouped(np.concatenate(sketch.extremes))  # (columns, frames in a column, 2)
    times = np.arange(len(extremes)) * extremes.shape[1] * sketch.audio.hop_length / sketch.audio.sample_rate
    low, high = extremes[..., 0].min(axis=1), extremes[..., 1].max(axis=1)
    log_mel = grouped(np.concatenate(sketch.log_mels, axis=1).T.astype(np.float32)).mean(axis=1)  # (columns, n_mels)
    edges, distributions = answer.parts
    rows = np.arange(len(answer.class_names) + 1)
    with picture(path, title, 13, 11) as figure:
        wave, mel, classes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
        wave.fill_between(times, low, high, color=BLUE, linewidth=0.8, edgecolor=BLUE)
        wave.set_ylabel("amplitude")
        draw_log_mel(figure, mel, log_mel.T, sketch.audio, (0, answer.seconds))
        image = classes.pcolormesh(edges, rows, 100 * distributions.T, cmap="Blues", vmin=0, vmax=100)  # silence: white
        classes.set_yticks(rows[:-1] + 0.5, [label(name) for name in answer.class_names])
        classes.invert_yaxis()
        figure.colorbar(image, ax=classes, pad=0.01, label="probability, %")
        classes.set(xlim=(0, answer.seconds), xlabel="time, s")
        if answer.seconds > 120:
            classes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds // 60:.0f}:{seconds % 60:02.0f}")
            classes.set_xlabel("time, min:s")


def grouped(rows):
    """Return rows, (n, k), in groups of neighbours, (columns, rows in a group, k): at most MAX_COLUMNS columns."""
    size = -(-len(rows) // MAX_COLUMNS)
    padded = np.pad(rows, ((0, -len(rows) % size), (0, 0)), mode="edge")
    return padded.reshape(-1, size, rows.shape[1])


def draw_log_mel(figure, axes, log_mel, audio, times):
    """Draw a log-mel spectrogram, (n_mels, columns) dB, between two times in s; the frequencies are marked in Hz."""
    extent = (*times, 0, audio.n_mels)
    image = axes.imshow(log_mel, cmap="magma", origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.01, label="dB")
    low, high = hz_to_mel([audio.f_min, audio.f_max])
    ticks = [frequency for frequency in TICKS_HZ if audio.f_min <= frequency <= audio.f_max]
    axes.set_yticks((hz_to_mel(ticks) - low) / (high - low) * audio.n_mels, ticks)
    axes.set_ylabel("frequency, Hz")


# --- What a decision depends on ------------------------------------------------------------------------------------


def draw_explanation(path, name, answer, networks, sketch):
    """Draw which part of the spectrogram the likeliest class depends on, in the window that is surest of it.

    The map is the mean of `grad_cam` over networks; name, answer, sketch: see `draw_recording`.
    """
    import torch

    probability, start, features = sketch.strongest[answer.best]
    inputs, target = torch.from_numpy(features[None]).float(), torch.tensor([answer.best])  # (1, n_mels, n_frames)
    maps = torch.cat([grad_cam(network, inputs, target) for network in networks])  # (networks, n_mels, n_frames)
    audio, class_name = sketch.audio, label(answer.label)
    times = start / audio.sample_rate, start / audio.sample_rate + audio.clip_seconds
    title = f"{label(Path(name).name)}: what '{class_name}' ({probability:.0%}) depends on"
    with picture(path, title, 13, 9) as figure:
        plain, marked = figure.subplots(2, 1, sharex=True, sharey=True)
        draw_log_mel(figure, plain, features.astype(np.float32), audio, times)
        plain.set_title("log-mel spectrogram")
        heat, extent = maps.mean(dim=0).numpy(), (*times, 0, audio.n_mels)
        image = marked.imshow(heat, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
        figure.colorbar(image, ax=marked, pad=0.01, label="weight in the decision")
        marked.set_title("Grad-CAM: the brighter, the more it speaks for the class")
        marked.set(xlabel="time, s", ylabel="frequency, Hz")


def grad_cam(network, features, targets):
    """Return which cells of the log-mel speak for a class, (B, n_mels, frames), each from 0 to 1 (the most).

    features: (B, n_mels, frames) in dB; targets: (B,) indices of classes. UserError if the network has no map that is
    fine enough. Selvaraju et al. 2017 (arXiv:1610.02391): the last maps of its parts with at least MIN_COLUMNS columns,
    weighted by the gradient of the class's logit, summed over channels, and cut at 0; of a network with views, the sum
    of the views' maps. The gradient is not averaged over the map, as in HiResCAM (Draelos and Carin 2020,
    arXiv:2011.08891), because the head weighs each mel band by itself.
    """
    import torch
    from torch.nn.functional import interpolate, relu

    maps = []

    def keep(_, __, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[3] >= MIN_COLUMNS:
            maps.append(output)

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in network.children():
            hooks.enter_context(module.register_forward_hook(keep))
        logits = network(features.clone().requires_grad_())  # (B, classes)
    if not maps:
        raise UserError(f"Grad-CAM needs feature maps of {MIN_COLUMNS} columns, and {type(network).__name__} has none")
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps[-1])  # (views x B, C, H, W)
    weight = relu((gradient * maps[-1].detach()).sum(dim=1, keepdim=True))  # (views x B, 1, H, W)
    weight = weight.unflatten(0, (-1, len(features))).sum(dim=0)  # (B, 1, H, W)
    heat = interpolate(weight, features.shape[1:], mode="bilinear")[:, 0]  # (B, n_mels, frames)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
