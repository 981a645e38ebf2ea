"""The pictures: of the report (write_report draws them), of one recording, and Grad-CAM (predict.py draws those).

Made to be read at half their size, and by the colour-blind: blue and orange of Okabe and Ito's palette, and a solid
against a dashed line wherever two things are compared. matplotlib and torch are imported where they are used: they are
slow to import. matplotlib's `Figure` is used without pyplot, so that no display and no backend is needed.
"""

import contextlib
from pathlib import Path

import numpy as np

import utils
from audio import hz_to_mel
from utils import UserError

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"
DOT = {"linestyle": "", "marker": "o", "color": "white", "markeredgecolor": "black", "markersize": 6, "clip_on": False}
DPI = 150  # pixels per inch
MAX_NUMBERED = 20  # classes; the cells of a larger matrix are too small for numbers
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


@contextlib.contextmanager
def own_style():
    """Draw in one style, whatever a user's matplotlibrc says: its LaTeX or fonts could stop a picture."""
    matplotlib = utils.need("matplotlib", "drawing")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width, height, title):
    """Return an empty matplotlib Figure with a title; width and height in inches."""
    figure = utils.need("matplotlib.figure", "drawing").Figure((width, height), DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
    figure.suptitle(title)
    return figure


def save(figure, path):
    """Write a picture as PNG, atomically. The title goes into the file as text, too."""
    with utils.atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Title": figure.get_suptitle()})


def label(name):
    """Return a name as matplotlib shall show it, in one line: without this, a pair of $ would start a formula."""
    return utils.one_line(name, MAX_LABEL).replace("$", r"\$").replace("_", " ")


# --- The report --------------------------------------------------------------------------------------------------


@own_style()
def draw_confusion_matrix(path, results, title):
    """Draw the share of each true class's clips (rows) that went to each predicted class (columns)."""
    names = [label(name) for name in results["class_names"]]
    clips = np.array(results["confusion_matrix"])  # (classes, classes)
    shares = clips / np.maximum(clips.sum(axis=1, keepdims=True), 1)
    side = max(11, 0.5 * len(names))
    figure = new_figure(side, 0.87 * side, title)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    rows = [f"{name} ({count})" for name, count in zip(names, clips.sum(axis=1), strict=True)]
    axes.set_yticks(range(len(names)), rows)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (clips)")
    if len(names) <= MAX_NUMBERED:
        for row, column in zip(*np.nonzero(clips), strict=True):
            share = 100 * shares[row, column]
            text, color = f"{share:.0f}" if share >= 0.5 else "<1", "white" if share > 50 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=15, color=color)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("% of the true class")
    save(figure, path)


@own_style()
def draw_classes(path, results, title):
    """Draw F1 and recall of each class over all clips as bars, and each fold's recall as a dot; best class on top."""
    scores = results["per_class"]
    names = sorted(scores, key=lambda name: -1 if scores[name]["f1"] is None else scores[name]["f1"])
    figure = new_figure(11, max(4, 1.5 + 0.75 * len(names)), title)
    axes = figure.add_subplot()
    rows = np.arange(len(names))
    for score, offset, colour, text in (("f1", 0.2, BLUE, "F1"), ("recall", -0.2, ORANGE, "recall")):
        values = [100 * (scores[name][score] or 0) for name in names]
        axes.barh(rows + offset, values, height=0.38, color=colour, label=text)
    if results["folds_present"] > 1:
        recalls = np.array([results["recall_per_fold"][name] for name in names], float)  # (classes, folds); None is NaN
        axes.plot(100 * recalls, rows - 0.2, **DOT)
        axes.plot([], [], label="recall of one fold", **DOT)
    axes.set_yticks(rows, [label(name) + ("" if scores[name]["clips"] else " (no clips)") for name in names])
    axes.set_xlim(0, 102)
    axes.set_xlabel("%")
    axes.grid(axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


@own_style()
def draw_reliability(path, results, title):
    """Draw accuracy against confidence, before and (if there is one) after the temperature.

    Below each, how many of the clips have that confidence.
    """
    parts = {name: results["confidence"][name] for name in ("before", "after") if results["confidence"][name]}
    figure = new_figure(max(8, 6 * len(parts)), 8, title)
    grid = figure.subplots(2, len(parts), sharex=True, squeeze=False, height_ratios=(3, 1))  # (2, parts) axes
    for (upper, lower), (name, values) in zip(grid.T, parts.items(), strict=True):
        bins = values["bins"]
        width = 100 * (bins[0]["to"] - bins[0]["from"])
        middles = [50 * (row["from"] + row["to"]) for row in bins]
        upper.bar(middles, [100 * row["accuracy"] for row in bins], 0.9 * width, color=BLUE, label="accuracy")
        upper.plot([0, 100], [0, 100], color=ORANGE, linestyle="--", label="as it should be")
        lower.bar(middles, [100 * row["clips"] / results["clips"] for row in bins], 0.9 * width, color=GREY)
        upper.set_title(f"{name} temperature: ECE {100 * values['ece']:.1f} %")
        lower.set_xlabel("confidence, %")
        upper.set_ylim(0, 100)
        lower.set_xlim(0, 100)
    grid[0, 0].set_ylabel("accuracy, %")
    grid[1, 0].set_ylabel("% of clips")
    grid[0, 0].legend(loc="upper left")
    save(figure, path)


@own_style()
def draw_curves(path, results, title, histories):
    """Draw accuracy and loss over the epochs, training and validation: a line for each fold, a dot where it was tested.

    histories: {fold: {column of history_fold_<k>.csv: (epochs,) floats}}.
    """
    figure = new_figure(13, 6, title)
    both = figure.subplots(1, 2)
    best_epochs = {row["fold"]: row["best_epoch"] for row in results["per_fold"]}
    parts = {"train": {"color": BLUE}, "validation": {"color": ORANGE, "linestyle": "--"}}
    for axes, quantity, text, scale in zip(both, ("accuracy", "loss"), ("accuracy, %", "loss"), (100, 1), strict=True):
        for part, style in parts.items():
            for fold, history in histories.items():
                epochs, values = history["epoch"], scale * history[f"{part}_{quantity}"]
                is_finite = np.isfinite(values)
                axes.plot(epochs[is_finite], values[is_finite], linewidth=1.5, **style)
                is_tested = is_finite & (epochs == best_epochs[fold])
                axes.plot(epochs[is_tested], values[is_tested], marker="o", **style)
            if any(np.isfinite(history[f"{part}_{quantity}"]).any() for history in histories.values()):
                axes.plot([], [], label=part, **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel(text)
        axes.set_ylim(0, 100 if quantity == "accuracy" else None)
        axes.grid()
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    both[0].plot([], [], label="tested epoch", linestyle="", marker="o", color=GREY)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


# --- A recording -------------------------------------------------------------------------------------------------


class Sketch:
    """What the pictures need of a recording, added window by window: about 270 bytes for a frame of 23 ms."""

    def __init__(self, audio):
        self.audio = audio
        self.log_mels, self.extremes = [], []  # of new frames: (n_mels, frames) dB, (frames, 2) of -1 to 1
        self.frames = 0
        self.strongest = {}  # {class index: (probability, first sample, features) of the surest window}

    def add(self, start, samples, features, distribution):
        """Add a window: its first sample, samples (n,), features (n_mels, n_frames) in dB, distribution (classes,)."""
        hop = self.audio.hop_length
        known = self.frames - round(start / hop)  # frames that the window before had, too
        new = slice(known, -(-len(samples) // hop))
        padded = np.pad(samples, (0, -len(samples) % hop), mode="edge").reshape(-1, hop)[new]  # (frames, hop)
        self.log_mels.append(features[:, new].astype(np.float16))
        self.extremes.append(np.stack([padded.min(axis=1), padded.max(axis=1)], axis=1))
        self.frames += len(padded)
        for index, probability in enumerate(distribution):
            if probability > self.strongest.get(index, (0,))[0]:  # NaN, of silence, is not
                self.strongest[index] = probability, start, features


@own_style()
def draw_recording(path, name, answer, sketch):
    """Draw waveform, log-mel spectrogram and each class's probability over one time axis.

    name: of the recording; answer: its Answer; sketch: a Sketch that has seen all its windows.
    """
    best = answer.class_names[answer.best]
    title = f"{label(Path(name).name)}: {label(best)}, {answer.mean[answer.best]:.0%}"
    figure = new_figure(13, 11, title)
    wave, mel, classes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    extremes = grouped(np.concatenate(sketch.extremes))  # (columns, frames in a column, 2)
    times = np.arange(len(extremes)) * extremes.shape[1] * sketch.audio.hop_length / sketch.audio.sample_rate
    low, high = extremes[..., 0].min(axis=1), extremes[..., 1].max(axis=1)
    wave.fill_between(times, low, high, color=BLUE, linewidth=0.8, edgecolor=BLUE)
    wave.set_ylabel("amplitude")
    log_mel = grouped(np.concatenate(sketch.log_mels, axis=1).T.astype(np.float32)).mean(axis=1)  # (columns, n_mels)
    draw_log_mel(figure, mel, log_mel.T, sketch.audio, (0, answer.seconds))
    draw_probabilities(figure, classes, answer)
    for axes in (wave, mel, classes):
        axes.set_xlim(0, answer.seconds)
    if answer.seconds > 120:
        classes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds // 60:.0f}:{seconds % 60:02.0f}")
    classes.set_xlabel("time, min:s" if answer.seconds > 120 else "time, s")
    save(figure, path)


def grouped(rows):
    """Return rows, (n, k), in groups of neighbours, (columns, rows in a group, k): at most MAX_COLUMNS columns."""
    size = -(-len(rows) // MAX_COLUMNS)
    padded = np.pad(rows, ((0, -len(rows) % size), (0, 0)), mode="edge")
    return padded.reshape(-1, size, rows.shape[1])


def draw_log_mel(figure, axes, log_mel, audio, times):
    """Draw a log-mel spectrogram, (n_mels, columns) dB, between two times in s; the frequencies are marked in Hz."""
    extent = (*times, 0, audio.n_mels)
    image = axes.imshow(log_mel, cmap="magma", origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.01).set_label("dB")
    low, high = hz_to_mel([audio.f_min, audio.f_max])
    ticks = [frequency for frequency in TICKS_HZ if audio.f_min <= frequency <= audio.f_max]
    axes.set_yticks((hz_to_mel(ticks) - low) / (high - low) * audio.n_mels, ticks)
    axes.set_ylabel("frequency, Hz")


def draw_probabilities(figure, axes, answer):
    """Draw every class's probability over the parts of a recording; silence stays white."""
    edges, distributions = answer.parts
    rows = np.arange(len(answer.class_names) + 1)
    image = axes.pcolormesh(edges, rows, 100 * distributions.T, cmap="Blues", vmin=0, vmax=100)
    axes.set_yticks(rows[:-1] + 0.5, [label(name) for name in answer.class_names])
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, pad=0.01).set_label("probability, %")


# --- What a decision depends on ------------------------------------------------------------------------------------


@own_style()
def draw_explanation(path, name, answer, models, sketch):
    """Draw which part of the spectrogram the likeliest class depends on, in the window that is surest of it.

    The map is the mean of `grad_cam` over models, [(network, info)]; name, answer, sketch: see `draw_recording`.
    """
    import torch

    probability, start, features = sketch.strongest[answer.best]
    inputs, target = torch.from_numpy(features[None]).float(), torch.tensor([answer.best])  # (1, n_mels, n_frames)
    maps = torch.cat([grad_cam(network, inputs, target) for network, _ in models])  # (models, n_mels, n_frames)
    audio, class_name = sketch.audio, label(answer.class_names[answer.best])
    times = start / audio.sample_rate, start / audio.sample_rate + audio.clip_seconds
    title = f"{label(Path(name).name)}: what '{class_name}' ({probability:.0%}) depends on"
    figure = new_figure(13, 9, title)
    plain, marked = figure.subplots(2, 1, sharex=True, sharey=True)
    draw_log_mel(figure, plain, features.astype(np.float32), audio, times)
    plain.set_title("log-mel spectrogram")
    heat, extent = maps.mean(dim=0).numpy(), (*times, 0, audio.n_mels)
    image = marked.imshow(heat, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
    figure.colorbar(image, ax=marked, pad=0.01).set_label("weight in the decision")
    marked.set_title("Grad-CAM: the brighter, the more it speaks for the class")
    marked.set_ylabel("frequency, Hz")
    marked.set_xlabel("time, s")
    save(figure, path)


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

    hooks = [module.register_forward_hook(keep) for module in network.children()]
    try:
        with torch.enable_grad():
            logits = network(features.clone().requires_grad_())  # (B, classes)
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise UserError(f"Grad-CAM needs feature maps of {MIN_COLUMNS} columns, and {type(network).__name__} has none")
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps[-1])  # (views x B, C, H, W)
    weight = relu((gradient * maps[-1].detach()).sum(dim=1, keepdim=True))  # (views x B, 1, H, W)
    weight = weight.unflatten(0, (-1, len(features))).sum(dim=0)  # (B, 1, H, W)
    heat = interpolate(weight, features.shape[1:], mode="bilinear")[:, 0]  # (B, n_mels, frames)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
