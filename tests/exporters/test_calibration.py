"""A score is made to say how often the model is right; what it answers stays the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.calibration import LEAST, calibrate, calibration_error, fit_temperature


def drawn(rows: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Logits of three classes and labels drawn with exactly the probabilities that they state."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 1.5, (rows, 3)).astype(np.float32)
    powers = np.exp(logits)
    edges = (powers / powers.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return logits, (chance.random((rows, 1)) > edges).sum(axis=1).tolist()


@given(st.floats(0.5, 8), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_factor_by_which_logits_are_too_large_is_found(factor: float, seed: int) -> None:
    logits, labels = drawn(4000, seed)
    assert fit_temperature(logits * np.float32(factor), labels) == pytest.approx(factor, rel=0.12)


def test_an_overconfident_model_gains_and_an_honest_one_hardly_moves() -> None:
    (logits, labels), (test, truth) = drawn(4000, 1), drawn(4000, 2)
    overconfident = calibrate(logits * 4, labels, test * 4, truth)
    assert overconfident.error_before > 0.15 and overconfident.error_after < 0.03
    honest = calibrate(logits, labels, test, truth)
    assert honest.error_before < 0.03 and honest.temperature == pytest.approx(1, abs=0.1)


def test_calibration_error_by_hand() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]], dtype=np.float32))
    # two rows at 0.9, one of them right; one at 0.7, right
    assert calibration_error(logits, [0, 1, 1], 1.0) == pytest.approx((2 * 0.4 + 0.3) / 3, abs=1e-6)


def test_a_model_without_a_mistake_and_huge_logits_stay_within_bounds() -> None:
    perfect = np.array([[1.0, -1.0], [-1.0, 1.0]], dtype=np.float32)
    assert fit_temperature(perfect, [0, 1]) == pytest.approx(LEAST, rel=1e-3)
    assert np.isfinite(fit_temperature(perfect * np.float32(1e6), [0, 0]))
