import math

import pytest
import torch

import calibration

N_CLASSES = 10


def sampled(temperature, clips=20_000, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature): that temperature calibrates them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(clips, N_CLASSES, generator=generator)
    targets = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    return logits, targets


def loss(logits, targets, temperature):
    return torch.nn.functional.cross_entropy(logits.double() / temperature, targets).item()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_the_temperature_of_sampled_labels_is_found(temperature):
    assert calibration.fit_temperature(*sampled(temperature)) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_temperature_has_a_smaller_loss(seed):
    logits, targets = sampled(1.7, clips=50, seed=seed)
    found = calibration.fit_temperature(logits, targets)
    grid = torch.linspace(*map(math.log, calibration.TEMPERATURE_RANGE), 400).exp().tolist()
    assert loss(logits, targets, found) <= min(loss(logits, targets, other) for other in grid) + 1e-7


def test_temperature_stays_in_its_range():
    """Labels that are all right, or all wrong, would have it go to 0 or to infinity."""
    logits, targets = 5 * torch.eye(N_CLASSES), torch.arange(N_CLASSES)
    assert calibration.fit_temperature(logits, targets) == calibration.TEMPERATURE_RANGE[0]
    assert calibration.fit_temperature(logits, (targets + 1) % N_CLASSES) == calibration.TEMPERATURE_RANGE[1]
    huge = 1e4 * torch.randn(100, N_CLASSES, generator=torch.Generator().manual_seed(0))
    assert calibration.fit_temperature(huge, huge.argmin(1)) == calibration.TEMPERATURE_RANGE[1]


def test_shift_of_all_logits_changes_no_temperature():
    logits, targets = sampled(2.0, clips=500)
    assert calibration.fit_temperature(logits + 300, targets) == pytest.approx(
        calibration.fit_temperature(logits, targets), abs=1e-3
    )


def test_probabilities_take_the_temperature_unless_raw():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    info = {"temperature": 2.0}
    torch.testing.assert_close(calibration.probabilities(logits, info), (logits / 2).softmax(dim=1))
    for without in (calibration.probabilities(logits, info, raw=True), calibration.probabilities(logits, {})):
        torch.testing.assert_close(without, logits.softmax(dim=1))


def test_score_is_the_energy():
    logits = torch.tensor([[1.0, 2.0, 3.0], [500.0, 0.0, 0.0]])
    expected = [math.log(math.e + math.e**2 + math.e**3), 500]
    assert calibration.unknown_score(logits).tolist() == pytest.approx(expected)


def test_one_clip_in_twenty_lies_below_the_threshold():
    logits, _ = sampled(1.0, clips=1000)
    threshold = calibration.fit_unknown_threshold(logits)
    assert (calibration.unknown_score(logits) < threshold).float().mean().item() == pytest.approx(0.05, abs=0.002)


def test_nothing_is_fitted_without_validation_clips():
    assert calibration.fit(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == {}
    assert set(calibration.fit(*sampled(1.0, clips=20))) == {"temperature", "unknown_threshold"}


def test_warning_is_what_most_models_say():
    info = {"class_names": ["a", "b"], "unknown_threshold": 5.0}
    without = {"class_names": ["a", "b"]}

    def warning(scores, infos):
        return calibration.unknown_warning(torch.tensor(scores), infos)

    assert warning([9.0], [info]) is None
    assert "none of the 2 classes" in warning([3.0], [info]) and len(warning([3.0], [info]).splitlines()) == 1
    assert warning([3.0], [without]) is None
    assert warning([3.0, 9.0], [info, info]) is None
    assert warning([3.0, 3.0, 9.0], [info, info, info])
    assert warning([3.0, 3.0, 9.0], [info, without, without])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1, 0, 0.01, 21, 10**400, "1", None, True, [1.0]], ids=lambda value: str(value)[:8]
)
def test_a_temperature_that_can_not_be_is_named(value):
    assert "temperature is" in calibration.fault({"temperature": value})


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e7, 10**400, "low", None, False], ids=lambda v: str(v)[:8])
def test_a_threshold_that_can_not_be_is_named(value):
    assert "unknown_threshold is" in calibration.fault({"unknown_threshold": value})


@pytest.mark.parametrize("info", [{}, {"temperature": 1, "unknown_threshold": -3.5}, {"temperature": 20.0}])
def test_sound_metadata_have_no_fault(info):
    assert calibration.fault(info) is None


def test_what_is_fitted_has_no_fault():
    assert calibration.fault(calibration.fit(*sampled(1.0, clips=30))) is None
    assert calibration.fault(calibration.fit(5 * torch.eye(N_CLASSES), torch.arange(N_CLASSES))) is None
