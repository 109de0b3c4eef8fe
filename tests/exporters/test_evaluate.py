"""Figures made of answers: against scikit-free definitions, with holes and permutations found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.golden import MIN_SAMPLES
from exporters.data import Labelled
from exporters.evaluate import metrics, paired_drop, quality
from exporters.golden_samples import pick
from exporters.measure import useful_batch_size


def one_hot(answers: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def test_metrics_by_hand() -> None:
    found = metrics(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]), ("n", "p"))
    assert found.accuracy == pytest.approx(0.6)
    negative, positive = found.per_class
    assert (negative.precision, negative.recall, negative.support) == (0.5, 0.5, 2)
    assert (positive.precision, positive.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.f1 == pytest.approx((0.5 + 2 / 3) / 2)


def test_drop_is_paired_and_repeatable() -> None:
    before = np.array([True] * 90 + [False] * 10)
    after = np.array([True] * 85 + [False] * 15)
    drop = paired_drop(before, after)
    assert drop.value == pytest.approx(0.05)
    assert drop.low < drop.value < drop.high
    assert drop == paired_drop(before, after)
    same = paired_drop(before, before)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_outputs_that_are_not_finite_have_no_figures() -> None:
    logits = one_hot([0, 1, 0])
    broken = logits.copy()
    broken[1, 0] = np.nan
    found = quality("validation", broken, logits, (0, 1, 0), ("n", "p"))
    assert found.metrics is None and found.drop is None and found.agreement is None
    assert found.reason == "the outputs are not finite"
    assert quality("validation", logits[:, :1], logits, (0, 1, 0), ("n", "p")).metrics is None


def test_permuted_labels_show_in_agreement() -> None:
    logits = one_hot([0, 1, 0, 1, 1])
    found = quality("validation", logits[:, ::-1], logits, (0, 1, 0, 1, 1), ("n", "p"))
    assert found.agreement == 0
    assert found.drop is not None and found.drop.value == 1


@pytest.mark.parametrize(
    ("per_item", "best"),
    [
        ({1: 1.0, 2: 0.9, 4: 0.8, 8: 0.79}, 4),
        ({1: 1.0, 2: 0.97, 4: 0.1, 8: 0.1}, 1),
        ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.1}, 8),
    ],
)
def test_a_batch_grows_while_each_item_gets_cheaper(per_item: dict[int, float], best: int) -> None:
    assert useful_batch_size(per_item) == best


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(3, 60), st.floats(0, 9)), min_size=1, max_size=300))
def test_golden_samples_cover_classes_and_small_margins(rows: list[tuple[int, int, float]]) -> None:
    labels, lengths, margins = zip(*rows, strict=True)
    texts = tuple(f"text {row}" for row in range(len(rows)))
    chosen = pick(Labelled(texts=texts, labels=labels), lengths, np.array(margins))
    assert len(chosen) == len(set(chosen)) == min(MIN_SAMPLES, len(rows))
    assert {labels[row] for row in chosen} == set(labels)
    assert min(margins) in [margins[row] for row in chosen]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=300))
def test_no_text_is_a_golden_sample_twice(numbers: list[int]) -> None:
    texts = tuple(f"text {number}" for number in numbers)
    held_out = Labelled(texts=texts, labels=tuple(number % 2 for number in numbers))
    chosen = pick(held_out, numbers, np.array(numbers, dtype=np.float64))
    assert len({texts[row] for row in chosen}) == len(chosen) == min(MIN_SAMPLES, len(set(texts)))
