"""Confidence that means something: a temperature for the logits, and a warning for what may be none of the classes.

train.py fits both on a fold's validation clips, never on its test clips, and stores them in the model file's metadata
as `temperature` and `unknown_threshold`. A model without clean validation clips (VALIDATION "none" or "test_fold") has
neither: its probabilities stay as the network gives them, and nothing is said of the unknown. The warning is weak:
it misses most unknown sounds, and steady noise and speech can look surer than any known clip. measure_unknown.py
measures by how much.
"""

import math

import torch
from torch.nn.functional import cross_entropy

TEMPERATURE_RANGE = 0.05, 20.0  # 1 changes nothing, above 1 makes less sure, below 1 surer
LARGEST_SCORE = 1e6  # of a threshold; no network of this project gives logits beyond
WARNED_SHARE = 0.05  # of the validation clips lie below the threshold, by construction
SEARCH_STEPS = 50  # of the golden section: log T to about 1e-10
GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(logits, targets):
    """Return the temperature T that gives the least mean negative log-likelihood of softmax(logits / T).

    logits: (clips, classes); targets: (clips,) places of the true classes. Guo et al. 2017 (arXiv:1706.04599). The
    loss is convex in 1 / T, so that a golden-section search over log T finds its one minimum, or the end of
    TEMPERATURE_RANGE where it lies beyond: T -> 0 if every clip is classified right.
    """
    logits, targets = logits.detach().cpu().double(), targets.cpu()

    def loss(log_temperature):
        return cross_entropy(logits / math.exp(log_temperature), targets).item()

    low, high = map(math.log, TEMPERATURE_RANGE)
    for _ in range(SEARCH_STEPS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return round(math.exp((low + high) / 2), 4)


def probabilities(logits, info, raw=False):
    """Return the distribution over the classes, (B, classes), of logits (B, classes).

    info: metadata of the model file; raw: leave its temperature out.
    """
    return (logits / (1 if raw else info.get("temperature", 1))).softmax(dim=1)


def unknown_score(logits):
    """Return how much each clip looks like one of the classes, (B,), of logits (B, classes): higher is more known.

    The energy score of Liu et al. 2020 (arXiv:2010.03759), log(sum(exp(logits))).
    """
    return logits.logsumexp(dim=1)


def fit_unknown_threshold(validation_logits):
    """Return the score that WARNED_SHARE of the validation clips, all of known classes, lie below."""
    scores = unknown_score(validation_logits.detach().cpu().double())
    return round(torch.quantile(scores, WARNED_SHARE).item(), 4)


def fit(validation_logits, targets):
    """Return the metadata of a model file that come from its fold's validation clips; {} if there are none.

    validation_logits: (clips, classes); targets: (clips,) places of the true classes.
    """
    if not len(targets):
        return {}
    return {
        "temperature": fit_temperature(validation_logits, targets),
        "unknown_threshold": fit_unknown_threshold(validation_logits),
    }


def fault(info):
    """Return what can't be right in the metadata of a model file, which may be a stranger's; None if nothing."""
    limits = {"temperature": TEMPERATURE_RANGE, "unknown_threshold": (-LARGEST_SCORE, LARGEST_SCORE)}
    for key, (least, most) in limits.items():
        value = info.get(key, least)  # both may be absent
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            return f"{key} is {str(value)[:80]!r}: it must be a number from {least:g} to {most:g}"
    return None


def unknown_warning(scores, infos):
    """Return a line that warns if a recording may be none of the models' classes, else None.

    scores: (models,), each model's mean score over the recording's windows; infos: metadata of the models. The warning
    comes where most of the models that have a threshold say so.
    """
    votes = [
        score < info["unknown_threshold"]
        for score, info in zip(scores.tolist(), infos, strict=True)
        if info.get("unknown_threshold") is not None
    ]
    if 2 * sum(votes) <= len(votes):
        return None
    return (
        f"this may be none of the {len(infos[0]['class_names'])} classes: it scores lower than "
        f"{1 - WARNED_SHARE:.0%} of known clips (a weak sign, and most unknown sounds give none)"
    )
