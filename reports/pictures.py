"""The pictures of the report: confusion matrix, scores of classes, confidence, curves. evaluate.py draws them.

Made to be read at half their size, and by the colour-blind: blue and orange of Okabe and Ito's palette, and a solid
against a dashed line wherever two things are compared. Each function takes the finished title. Only they import
matplotlib, which is slow to import; its `Figure` is used without pyplot, whose state is shared by a whole program.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate, relu

import batches
import front_end
import utils

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"
DOT = {"linestyle": "", "marker": "o", "color": "white", "markeredgecolor": "black", "markersize": 6, "clip_on": False}
DPI = 150  # pixels per inch
MAX_NUMBERED = 20  # classes; the cells of a larger matrix are too small for numbers
CURVES_A_ROW = 5  # folds


def new_figure(width, height, title):
    """Return an empty matplotlib Figure with a title; width and height in inches."""
    figure = utils.need("matplotlib.figure", "drawing the report").Figure((width, height), DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
    figure.suptitle(title, fontsize=17)
    return figure


def save(figure, path):
    """Write a picture as PNG, atomically. The title goes into the file as text, too."""
    with utils.atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Title": figure.get_suptitle()})


def label(name):
    """Return a class name as matplotlib shall show it: without this, a pair of $ would start a formula."""
    return name.replace("$", r"\$").replace("_", " ")


def draw_confusion_matrix(path, results, title):
    """Draw the share of each true class's clips (rows) that went to each predicted class (columns)."""
    names = [label(name) for name in results["class_names"]]
    clips = np.array(results["confusion_matrix"])  # (classes, classes)
    shares = clips / np.maximum(clips.sum(axis=1, keepdims=True), 1)
    side = max(11, 0.5 * len(names))
    figure = new_figure(side, 0.87 * side, title)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=14)
    rows = [f"{name} ({count})" for name, count in zip(names, clips.sum(axis=1), strict=True)]
    axes.set_yticks(range(len(names)), rows, fontsize=14)
    axes.set_xlabel("predicted", fontsize=15)
    axes.set_ylabel("true (clips)", fontsize=15)
    if len(names) <= MAX_NUMBERED:
        for row, column in zip(*np.nonzero(clips), strict=True):
            share = 100 * shares[row, column]
            text = f"{share:.0f}" if share >= 0.5 else "<1"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=15, color="white" if share > 50 else "black"
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("% of the true class", fontsize=15)
    bar.ax.tick_params(labelsize=13)
    save(figure, path)


def draw_classes(path, results, title):
    """Draw a bar of F1 and one of recall for each class over all clips, and a dot for each fold; best class on top."""
    scores = results["per_class"]
    names = sorted(scores, key=lambda name: -1 if scores[name]["f1"] is None else scores[name]["f1"])
    figure = new_figure(11, max(4, 1.5 + 0.75 * len(names)), title)
    axes = figure.add_subplot()
    many = results["folds_present"] > 1
    for score, offset, colour, text in (("f1", 0.2, BLUE, "F1"), ("recall", -0.2, ORANGE, "recall")):
        places = np.arange(len(names)) + offset
        values = [100 * (scores[name][score] or 0) for name in names]
        axes.barh(places, values, height=0.38, color=colour, label=text)
        if not many:
            continue
        for place, name in zip(places, names, strict=True):
            folds = [100 * value for value in results["agreement"]["per_class"][name][score] if value is not None]
            axes.plot(folds, [place] * len(folds), **DOT)
    if many:
        axes.plot([], [], label="one fold", **DOT)
    rows = [label(name) + ("" if scores[name]["clips"] else " (no clips)") for name in names]
    axes.set_yticks(range(len(names)), rows, fontsize=14)
    axes.set_xlim(0, 102)
    axes.tick_params(axis="x", labelsize=13)
    axes.set_xlabel("%", fontsize=15)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=14, frameon=False)
    save(figure, path)


def draw_reliability(path, results, title):
    """Draw accuracy against confidence, before and (if there is one) after the temperature, and what is answered.

    Below each of the first two, how many of the clips have that confidence.
    """
    parts = {name: results["confidence"][name] for name in ("before", "after") if results["confidence"][name]}
    columns = len(parts) + 1
    figure = new_figure(1 + 5 * columns, 7, title)
    grid = figure.add_gridspec(2, columns, height_ratios=(3, 1))
    for column, (name, values) in enumerate(parts.items()):
        upper, lower = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        draw_bins(upper, lower, values["bins"])
        upper.set_title(f"{name} temperature: ECE {100 * values['ece']:.1f} %", fontsize=15)
        if column == 0:
            upper.set_ylabel("accuracy, %", fontsize=15)
            lower.set_ylabel("% of clips", fontsize=15)
            upper.legend(loc="upper left", fontsize=13, frameon=False)
    draw_answered(figure.add_subplot(grid[:, -1]), parts)
    save(figure, path)


def draw_bins(upper, lower, bins):
    """Draw the bins of a reliability diagram: accuracy above, share of clips below."""
    middles = [50 * (row["from"] + row["to"]) for row in bins]
    width = 100 / len(bins)
    upper.bar(middles, [100 * (row["accuracy"] or 0) for row in bins], 0.9 * width, color=BLUE, label="accuracy")
    upper.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=2, label="as it should be")
    total = sum(row["clips"] for row in bins)
    lower.bar(middles, [100 * row["clips"] / total for row in bins], 0.9 * width, color=GREY)
    lower.set_xlabel("confidence, %", fontsize=15)
    upper.set_ylim(0, 100)
    for axes in (upper, lower):
        axes.set_xlim(0, 100)
        axes.tick_params(labelsize=13)
        axes.grid(axis="y", color="#DDDDDD")
        axes.set_axisbelow(True)


def draw_answered(axes, parts):
    """Draw accuracy against the share of clips answered; parts: {"before" and perhaps "after": its values}."""
    styles = {"before": {"color": ORANGE, "linestyle": "--"}, "after": {"color": BLUE}}
    for name, values in parts.items():
        shares = [100 * row["share"] for row in values["answered"]]
        accuracies = [100 * row["accuracy"] for row in values["answered"]]
        axes.plot(shares, accuracies, linewidth=2.5, label=f"{name} temperature", **styles[name])
    axes.set_title("the least sure left out", fontsize=15)
    axes.set_xlabel("% of clips answered", fontsize=15)
    axes.set_ylabel("accuracy of the answers, %", fontsize=15)
    axes.set_xlim(100, 0)
    axes.set_ylim(0, 102)
    axes.tick_params(labelsize=13)
    axes.grid(color="#DDDDDD")
    axes.legend(loc="lower right", fontsize=13, frameon=False)


def draw_curves(path, histories, results, title):
    """Draw accuracy and loss over the epochs, training and validation, a column of two axes for each fold.

    histories: {fold: {column of history_fold_<k>.csv: (epochs,) floats}}. The epoch that was tested is marked.
    """
    best_epochs = {row["fold"]: row["best_epoch"] for row in results["per_fold"]}
    columns = min(len(histories), CURVES_A_ROW)
    groups = -(-len(histories) // CURVES_A_ROW)
    figure = new_figure(max(9, 3 * columns), 1.2 + 5 * groups, title)
    grid = figure.subplots(2 * groups, columns, squeeze=False, sharex=True)  # (2 * groups, columns) axes
    for place in range(groups * columns):
        pair = [grid[2 * (place // columns) + row, place % columns] for row in (0, 1)]
        if place >= len(histories):
            for axes in pair:
                axes.set_axis_off()
            continue
        fold = list(histories)[place]
        for axes, quantity, scale in zip(pair, ("accuracy", "loss"), (100, 1), strict=True):
            for part, style in (("train", {"color": BLUE}), ("validation", {"color": ORANGE, "linestyle": "--"})):
                values = scale * histories[fold][f"{part}_{quantity}"]
                if np.isfinite(values).any():
                    marker = "o" if len(values) == 1 else None  # a line needs two epochs
                    axes.plot(histories[fold]["epoch"], values, linewidth=2.5, marker=marker, label=part, **style)
            if isinstance(best_epochs[fold], int):
                axes.axvline(best_epochs[fold], color=GREY, linestyle=":", linewidth=2, label="tested epoch")
            axes.grid(color="#DDDDDD")
            axes.tick_params(labelsize=12)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        pair[0].set_title(f"fold {fold}", fontsize=15)
        pair[1].set_xlabel("epoch", fontsize=14)
        pair[1].tick_params(labelbottom=True)
        if place % columns == 0:
            pair[0].set_ylabel("accuracy, %", fontsize=14)
            pair[1].set_ylabel("loss", fontsize=14)
    share_limits(grid[0::2].ravel(), low=0, high=100)
    share_limits(grid[1::2].ravel(), low=0)
    handles = {
        text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=14, frameon=False)
    save(figure, path)


def share_limits(axes_list, low, high=None):
    """Give all axes the same vertical range, so that folds can be compared by eye."""
    high = high or max(axes.get_ylim()[1] for axes in axes_list)
    for axes in axes_list:
        axes.set_ylim(low, high)


# --- A recording

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
    title = f"{label(Path(name).name)}: {label(best)}, {answer.mean[answer.best]:.0%}"
    figure = new_figure(13, 11, title)
    wave, mel, classes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    extremes, step = reduced(np.concatenate(sketch.extremes), np.min, np.max)
    times = np.arange(len(extremes)) * step * sketch.audio.hop_length / sketch.audio.sample_rate
    wave.fill_between(times, extremes[:, 0], extremes[:, 1], color=BLUE, linewidth=0.8, edgecolor=BLUE)
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
    save(figure, path)


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
    axes.set_yticks(rows[:-1] + 0.5, [label(name) for name in answer.class_names], fontsize=12)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, pad=0.01).set_label("probability, %", fontsize=13)


def draw_explanation(path, name, answer, models, sketch):
    """Draw which part of the spectrogram the likeliest class hangs on, in the window that is surest of it.

    The map is Grad-CAM (py), the mean over models, [(network, info)].
    """
    probability, start, features = sketch.strongest[answer.best]
    target = torch.tensor([answer.best])
    maps = []
    for network, info in models:
        inputs = batches.normalise(torch.from_numpy(features[None]), batches.statistics_of(info))
        maps.append(grad_cam(network, inputs, target)[0])
    heat = torch.stack(maps).mean(dim=0).numpy()  # (n_mels, frames)
    audio, class_name = sketch.audio, label(answer.class_names[answer.best])
    begin = start / audio.sample_rate
    times = begin, begin + audio.clip_seconds
    figure = new_figure(13, 9, f"{label(Path(name).name)}: what '{class_name}' ({probability:.0%}) hangs on")
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
    save(figure, path)


# --- Grad-CAM

MASKED_SHARE = 0.1  # of a spectrogram's cells
CLIPS_AT_ONCE = 32


def grad_cam(network, inputs, targets):
    """Return which cells of the log-mel speak for a class, (B, n_mels, frames), each from 0 to 1 (the most).

    inputs: normalised features (B, 1, rows, frames); targets: (B,) places of the classes. Selvaraju et al. 2017
    (arXiv:1610.02391): the feature maps of a convolution block (the network's `shown_blocks`), weighted by the gradient
    of the class's logit, summed, and cut at 0; of a network with branches or views, the sum of their maps. The gradient
    is not averaged over the map, as HiResCAM has it (Draelos and Carin 2020, arXiv:2011.08891): AudioCNN's head weighs
    each mel band by itself, and with the mean, masking what the map rates highest costs less confidence than masking
    cells at random.
    """
    maps = []
    blocks = [network.get_submodule(name) for name in network.shown_blocks]
    hooks = [block.register_forward_hook(lambda _, __, output: maps.append(output)) for block in blocks]
    try:
        with torch.enable_grad():
            logits = network(inputs.requires_grad_())
            gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps)  # (B, C, H, W) each
    finally:
        for hook in hooks:
            hook.remove()
    heat, shape = 0, (network.n_mels, inputs.shape[3])
    for gradient, values in zip(gradients, maps, strict=True):
        weight = relu((gradient * values.detach()).sum(dim=1, keepdim=True))  # (B, 1, H, W), once for each view
        weight = weight.unflatten(0, (-1, len(inputs))).sum(dim=0)
        heat = heat + interpolate(weight, shape, mode="bilinear")[:, 0]  # (B, n_mels, frames)
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def highest(values, share=MASKED_SHARE):
    """Return a mask, (B, n_mels, frames), of the `share` of each clip's cells with the highest values."""
    flat = values.flatten(1)  # (B, cells)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(1, flat.topk(round(share * flat.shape[1])).indices, True).view_as(values)


def moved(masks, generator):
    """Return masks, (B, n_mels, frames), each at a random place: as many cells in the same shape, rolled around."""
    n_mels, frames = masks.shape[1:]
    shifts = [[torch.randint(size, (), generator=generator).item() for size in (n_mels, frames)] for _ in masks]
    return torch.stack([mask.roll(shift, (0, 1)) for mask, shift in zip(masks, shifts, strict=True)])


@torch.no_grad()
def confidence_without(network, rows, inputs, targets, masks):
    """Return each clip's probability of its class, (B,), where the masked cells have the mean of their band.

    masks: (B, n_mels, frames), of the log-mel; what they cover is masked in the fine log-mel, too.
    """
    masks = masks[:, None, rows.band.long()]  # (B, 1, rows, frames)
    probabilities = network(inputs.masked_fill(masks, 0.0)).softmax(dim=1)
    return probabilities.gather(1, targets[:, None])[:, 0]


def deletion_falls(network, rows, inputs, seed=0):
    """Return by how much the confidence in the predicted class falls when cells are masked, {what is masked: (B,)}.

    rows: the features' Rows (batches.py); inputs: normalised features (B, 1, rows, frames). Masked are the MASKED_SHARE
    of highest Grad-CAM, the same shape at a random place, and single cells at random.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        confidence, targets = network(inputs).softmax(dim=1).max(dim=1)  # (B,)
    top = highest(grad_cam(network, inputs.clone(), targets))  # (B, n_mels, frames)
    masks = {
        "the highest tenth": top,
        "the same shape elsewhere": moved(top, generator),
        "a tenth of the cells at random": highest(torch.rand(top.shape, generator=generator)),
    }
    return {what: confidence - confidence_without(network, rows, inputs, targets, mask) for what, mask in masks.items()}
