"""Temperature scaling: how sure a model says it is, made to fit how often it is right.

Fine-tuned encoders are surer than they are right, and a threshold on the score then means little. One number divides
the logits (Guo et al., "On Calibration of Modern Neural Networks", 2017); the answers stay the same. It is fitted on
validation, travels in the bundle's manifest, and is judged on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.tasks.text_classification import softmax
from exporters.evaluate import Logits

BINS = 15
#: A model that makes no mistake on validation would be given a temperature of 0.
LEAST, MOST = 0.25, 20.0
_STEPS = 60  # of a golden section: the interval shrinks by 0.618 each time
_SECTION = (5**0.5 - 1) / 2


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Expected calibration error (0 … 1) on the test split at temperature 1 and at the one fitted on validation."""

    temperature: float
    error_before: float
    error_after: float
    split: str = "test"


def fit_temperature(logits: Logits, labels: Sequence[int]) -> float:
    """The temperature with the least cross-entropy of [N, C] logits, in :data:`LEAST` … :data:`MOST`. Pure.

    Cross-entropy is convex in the inverse of the temperature, so a golden section finds the only minimum.
    """
    low, high = 1 / MOST, 1 / LEAST
    for _ in range(_STEPS):
        inner = high - _SECTION * (high - low), low + _SECTION * (high - low)
        if _cross_entropy(logits, labels, 1 / inner[0]) <= _cross_entropy(logits, labels, 1 / inner[1]):
            high = inner[1]
        else:
            low = inner[0]
    return round(2 / (low + high), 4)


def calibration_error(logits: Logits, labels: Sequence[int], temperature: float) -> float:
    """Expected calibration error: the gap between score and accuracy in :data:`BINS` equal bins of the score, each
    weighed by its rows. Pure."""
    table = softmax(logits, temperature)
    score, right = table.max(axis=1), table.argmax(axis=1) == np.asarray(labels)
    bins: NDArray[np.intp] = np.minimum((score * BINS).astype(np.intp), BINS - 1)
    gaps = np.bincount(bins, weights=score - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(score))


def calibrate(validation: Logits, truth: Sequence[int], test: Logits, test_truth: Sequence[int]) -> Calibration:
    """Fit on validation, judge on test."""
    temperature = fit_temperature(validation, truth)
    return Calibration(
        temperature=temperature,
        error_before=calibration_error(test, test_truth, 1.0),
        error_after=calibration_error(test, test_truth, temperature),
    )


def _cross_entropy(logits: Logits, labels: Sequence[int], temperature: float) -> float:
    scaled = logits.astype(np.float64) / temperature
    largest = scaled.max(axis=1)
    total = largest + np.log(np.exp(scaled - largest[:, None]).sum(axis=1))
    return float(np.mean(total - scaled[np.arange(len(scaled)), np.asarray(labels)]))
