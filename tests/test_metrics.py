import math

import numpy as np
import pytest
from sklearn import metrics as reference

from reports import metrics


def labels(seed, n_classes=6, clips=300):
    """Random labels, and predictions that are right in about half the cases."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, clips)
    return true, np.where(rng.random(clips) < 0.5, true, rng.integers(0, n_classes, clips))


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learns(seed):
    true, predicted = labels(seed)
    confusion = metrics.confusion_matrix(true, predicted, 6)
    assert (confusion == reference.confusion_matrix(true, predicted)).all()
    expected = reference.precision_recall_fscore_support(true, predicted)
    np.testing.assert_allclose(metrics.class_scores(confusion), expected[:3], rtol=1e-12)
    assert metrics.macro_f1(confusion) == pytest.approx(reference.f1_score(true, predicted, average="macro"))


def test_scores_where_a_class_has_no_clips_or_is_never_predicted():
    true = np.array([0, 0, 0, 1, 1, 3])  # class 2 has no clips
    predicted = np.array([0, 0, 2, 1, 1, 0])  # class 3 is never predicted
    precision, recall, f1 = metrics.class_scores(metrics.confusion_matrix(true, predicted, 4))
    np.testing.assert_allclose(precision, [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(recall, [2 / 3, 1, np.nan, 0])
    np.testing.assert_allclose(f1, [2 / 3, 1, np.nan, 0])
    expected = reference.f1_score(true, predicted, labels=[0, 1, 3], average="macro")
    assert metrics.macro_f1(metrics.confusion_matrix(true, predicted, 4)) == pytest.approx(expected)


def test_interval_is_students():
    low, high = metrics.interval_95([0.70, 0.75, 0.80])  # t(0.975, 2) = 4.302653, standard deviation 0.05
    half = 4.302653 * 0.05 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))
    assert metrics.sample_std([0.70, 0.75, 0.80]) == pytest.approx(0.05)


def test_interval_stays_between_0_and_1():
    assert metrics.interval_95([0.1, 0.9]) == [0.0, 1.0]


def test_one_fold_has_no_spread():
    assert metrics.sample_std([0.7]) is None
    assert metrics.interval_95([0.7]) is None


def answers(both, only_a, only_b, neither):
    parts = np.repeat(
        [(True, True), (True, False), (False, True), (False, False)], [both, only_a, only_b, neither], axis=0
    )
    return parts[:, 0], parts[:, 1]


def test_paired_test_equals_the_binomial_sum():
    values = metrics.paired_test(*answers(both=100, only_a=6, only_b=16, neither=8))
    p = 2 * sum(math.comb(22, k) for k in range(7)) / 2**22
    assert values["p_value"] == pytest.approx(p)
    assert p == pytest.approx(0.0525, abs=1e-4)
    assert (values["clips"], values["only_a"], values["only_b"]) == (130, 6, 16)
    assert (values["accuracy_a"], values["accuracy_b"]) == (106 / 130, 116 / 130)


def test_paired_test_of_equal_answers():
    assert metrics.paired_test(*answers(both=5, only_a=0, only_b=0, neither=2))["p_value"] == 1.0


def test_worst_confusions_come_with_the_surest_mistakes():
    sure = [0.9, 0.6, 0.8, 0.7, 0.75, 0.65, 0.95]  # of clips a ... g; a to f are cats taken for dogs, g a dog for a cat
    probabilities = np.array([[1 - p, p] for p in sure[:-1]] + [[sure[-1], 1 - sure[-1]]])
    predictions = metrics.Predictions(
        class_names=["cat", "dog"],
        names=list("abcdefg"),
        folds=np.zeros(7, int),
        true=np.array([0] * 6 + [1]),
        probabilities=probabilities,
        clips={},
    )
    worst = metrics.summarise(predictions, {})["worst_confusions"]
    assert worst[0] == {"true": "cat", "predicted": "dog", "clips": 6, "share": 1.0, "examples": list("acedf")}
    assert worst[1] == {"true": "dog", "predicted": "cat", "clips": 1, "share": 1.0, "examples": ["g"]}


# --- Confidence --------------------------------------------------------------------------------------------------


def sampled_confidence(clips=60_000, seed=0):
    """Confidences, and answers of which each is right with that probability."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1, clips)
    return confidence, rng.random(clips) < confidence


def test_calibrated_answers_have_hardly_any_calibration_error():
    values = metrics.reliability(*sampled_confidence())
    assert values["ece"] < 0.01
    assert sum(row["clips"] for row in values["bins"]) == 60_000


def test_calibration_error_of_an_overconfident_network_is_the_gap():
    correct = np.arange(100) < 60
    assert metrics.reliability(np.full(100, 0.99), correct)["ece"] == pytest.approx(0.39)
    assert metrics.reliability(np.full(100, 0.21), correct)["ece"] == pytest.approx(0.39)  # underconfident
    # Two bins of 50 clips: sure and always right, and 30 % sure with 10 right.
    both = metrics.reliability(np.repeat([1.0, 0.3], 50), np.arange(100) < 60)
    assert both["ece"] == pytest.approx(0.5 * 0 + 0.5 * abs(10 / 50 - 0.3))


def test_bins_take_the_edges_and_rounding_errors():
    values = metrics.reliability(np.array([0.0, 1 / 15, 1.0, 1.0005]), np.array([True, False, True, True]))
    filled = {number: row["clips"] for number, row in enumerate(values["bins"]) if row["clips"]}
    assert filled == {0: 2, 14: 2}
    assert all(row["accuracy"] is None for row in values["bins"] if not row["clips"])


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0, 20.0])
def test_temperature_after_the_softmax_is_the_same_as_before_it(temperature):
    logits = np.random.default_rng(0).normal(0, 3, (50, 10))
    expected = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.with_temperature(shares, temperature), expected, rtol=1e-9, atol=1e-300)


def test_temperature_of_probabilities_that_are_0():
    np.testing.assert_allclose(metrics.with_temperature(np.array([[0, 0.2, 0.8]]), 2)[0], [0, 1 / 3, 2 / 3])


def test_selective_accuracy_leaves_out_the_least_sure():
    confidence = np.array([0.5, 0.9, 0.3, 0.8, 0.6, 0.7, 0.4, 0.95, 0.2, 0.1])
    correct = confidence > 0.35
    rows = {row["share"]: row for row in metrics.selective_accuracy(confidence, correct)}
    assert (rows[1.0]["accuracy"], rows[0.9]["accuracy"], rows[0.7]["accuracy"]) == (0.7, pytest.approx(7 / 9), 1.0)
    assert (rows[0.5]["clips"], rows[0.5]["least_confidence"]) == (5, 0.6)
    assert metrics.selective_accuracy(np.array([0.4]), np.array([True]))[-1]["clips"] == 1


def test_recordings_count_once_and_the_worst_come_first():
    """Recording 7 has three clips, two wrong; 8 has one, right; 9 is two sounds, of which one is wrong."""
    rows = [("7-a", 7, 0, 1), ("7-b", 7, 0, 1), ("7-c", 7, 0, 0), ("8-a", 8, 1, 1), ("9-a", 9, 1, 0), ("9-b", 9, 2, 2)]
    predictions = metrics.Predictions(
        class_names=["dog", "car", "gun"],
        names=[name for name, *_ in rows],
        folds=np.zeros(6, int),
        true=np.array([true for _, _, true, _ in rows]),
        probabilities=np.eye(3)[[guess for *_, guess in rows]],
        clips={name: {"fsID": str(recording)} for name, recording, *_ in rows},
    )
    result = metrics.summarise_recordings(predictions)
    assert result["count"] == 4
    assert result["accuracy"] == pytest.approx((1 / 3 + 1 + 0 + 1) / 4)
    assert result["most_errors"] == [
        {"recording": "7", "class": "dog", "clips": 3, "wrong": 2, "taken_for": "car"},
        {"recording": "9", "class": "car", "clips": 1, "wrong": 1, "taken_for": "dog"},
    ]
    predictions.clips = {}
    assert metrics.summarise_recordings(predictions) is None
