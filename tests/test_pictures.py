import warnings

import numpy as np
import pytest
from PIL import Image

from reports import metrics, pictures


def results(class_names, folds=2, clips=40, seed=0, temperatures=None):
    rng = np.random.default_rng(seed)
    n_classes = len(class_names)
    predictions = metrics.Predictions(
        class_names=class_names,
        names=[f"clip{clip}.wav" for clip in range(folds * clips)],
        folds=np.repeat(np.arange(folds), clips),
        true=rng.integers(0, n_classes, folds * clips),
        probabilities=rng.dirichlet(np.ones(n_classes), folds * clips),
        clips={},
    )
    return metrics.summarise(predictions, {"best_epochs": {"0": 2}, "temperatures": temperatures or {}})


def history(epochs, validation=True):
    values = np.arange(1.0, epochs + 1)
    columns = {"epoch": values, "train_loss": 2 / values, "train_accuracy": 1 - 0.8 / values}
    for name in ("loss", "accuracy"):
        columns[f"validation_{name}"] = columns[f"train_{name}"] * (0.9 if validation else np.nan)
    return columns


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours(path):
    """Return {colour: pixels} of a picture."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(maxcolors=2**24)
    return {f"#{red:02X}{green:02X}{blue:02X}": pixels for pixels, (red, green, blue) in found}


@pytest.mark.parametrize("class_names", [["one"], ["a_b", "$x$", "50 %"], [f"class {k}" for k in range(25)]])
def test_any_classes_can_be_drawn(tmp_path, class_names):
    values = results(class_names)
    pictures.draw_confusion_matrix(tmp_path / "matrix.png", values, "Matrix")
    pictures.draw_classes(tmp_path / "classes.png", values, "Classes")
    for name in ("matrix.png", "classes.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width >= 1500 and image.height >= 500


@pytest.mark.parametrize("folds", [1, 7])
def test_curves_of_any_number_of_folds(tmp_path, folds):
    histories = {fold: history(epochs=3) for fold in range(folds)}
    pictures.draw_curves(tmp_path / "curves.png", histories, results(["a", "b"], folds), "Training")
    found = colours(tmp_path / "curves.png")
    assert found[pictures.BLUE] > 500 * folds and found[pictures.ORANGE] > 200 * folds


def test_curves_without_validation_show_no_validation(tmp_path):
    pictures.draw_curves(tmp_path / "curves.png", {0: history(3, validation=False)}, results(["a", "b"]), "Training")
    found = colours(tmp_path / "curves.png")
    assert pictures.BLUE in found and pictures.ORANGE not in found


@pytest.mark.parametrize("loss", [np.inf, np.nan])
def test_curves_of_one_epoch_and_of_a_loss_that_left_all_bounds(tmp_path, loss):
    histories = {0: history(1), 1: {**history(3), "train_loss": np.array([2, loss, loss])}}
    pictures.draw_curves(tmp_path / "curves.png", histories, results(["a", "b"]), "Training")
    assert pictures.BLUE in colours(tmp_path / "curves.png")


def test_reliability_before_and_after(tmp_path):
    pictures.draw_reliability(tmp_path / "before.png", results(["a", "b", "c"]), "Confidence")
    both = results(["a", "b", "c"], temperatures={"0": 2.0, "1": 3.0})
    pictures.draw_reliability(tmp_path / "both.png", both, "Confidence")
    before, after = colours(tmp_path / "before.png"), colours(tmp_path / "both.png")
    assert before[pictures.BLUE] > 5000 and before[pictures.ORANGE] > 500 and after[pictures.ORANGE] > 500
    assert after[pictures.BLUE] > 1.3 * before[pictures.BLUE]  # bars of a second diagram, and a second line
    with Image.open(tmp_path / "before.png") as narrow, Image.open(tmp_path / "both.png") as wide:
        assert wide.width > 1.3 * narrow.width


def test_reliability_of_one_clip(tmp_path):
    pictures.draw_reliability(tmp_path / "one.png", results(["a", "b"], folds=1, clips=1), "Confidence")
    assert pictures.ORANGE in colours(tmp_path / "one.png")


def test_title_is_in_the_file(tmp_path):
    pictures.draw_classes(tmp_path / "classes.png", results(["a", "b"]), "Classes (a remark)")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.text["Title"] == "Classes (a remark)"
