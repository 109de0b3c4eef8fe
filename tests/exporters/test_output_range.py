"""Outputs that accuracy doesn't look at."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.output_range import output_misses

NAMES = ("a", "b", "c")


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 4, (60, 3)).astype(np.float32)


def test_what_quantization_moves_is_no_miss(reference: np.ndarray) -> None:
    noise = np.random.default_rng(4).normal(0, 0.5, reference.shape).astype(np.float32)
    assert output_misses(reference + noise, reference, NAMES) == ()
    assert output_misses(reference * 1.5, reference, NAMES) == ()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_named(reference: np.ndarray, value: float) -> None:
    broken = reference.copy()
    broken[[4, 9], 1] = value
    (miss,) = output_misses(broken, reference, NAMES)
    assert miss.promise == "output_range"
    assert miss.reason == f"gives {value} for 'b' in validation row 5 and is not finite in 1 more"


def test_a_logit_far_outside_is_named_though_every_answer_is_right(reference: np.ndarray) -> None:
    broken = reference.copy()
    row = 7
    best = int(broken[row].argmax())
    broken[row, best] = 300.0
    assert (broken.argmax(axis=1) == reference.argmax(axis=1)).all()
    (miss,) = output_misses(broken, reference, NAMES)
    assert f"gives 300 for '{NAMES[best]}' in validation row 8, far outside of fp32's" in miss.reason
    assert miss.excess > 1
    (scaled,) = output_misses(reference * 10, reference, NAMES)  # the same answers, scores that mean nothing
    assert "far outside" in scaled.reason


def test_a_constant_output_is_named(reference: np.ndarray) -> None:
    broken = reference.copy()
    broken[:, 2] = -1.5
    (miss,) = output_misses(broken, reference, NAMES)
    assert miss.reason == "gives a constant -1.5 for 'c', whatever it is asked"
    (all_of_them,) = output_misses(np.zeros_like(reference), reference, NAMES)
    assert "for 'a' and 2 more labels" in all_of_them.reason


def test_another_shape_is_a_miss(reference: np.ndarray) -> None:
    (miss,) = output_misses(reference[:, :2], reference, NAMES)
    assert miss.reason == "gives outputs of shape [60, 2] instead of [60, 3]"


def test_one_row_is_not_constant(reference: np.ndarray) -> None:
    assert output_misses(reference[:1], reference[:1], NAMES) == ()
