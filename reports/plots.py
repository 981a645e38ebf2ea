"""The pictures of the report: confusion matrix, scores of classes, confidence, curves. evaluate.py draws them.

Made to be read at half their size, and by the colour-blind: blue and orange of Okabe and Ito's palette, and a solid
against a dashed line wherever two things are compared. Each function takes the finished title. Only they import
matplotlib, which is slow to import; its `Figure` is used without pyplot, whose state is shared by a whole program.
"""

import numpy as np

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
