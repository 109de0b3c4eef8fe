"""Exchanged labels: found whatever the order, refused where it is no luck, and never taken for confusion."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.label_order import LUCK, broken_order, exchanges

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def pair(one: int, other: int, *, right: tuple[int, int] = (0, 0)) -> tuple[list[int], list[int]]:
    """Answers and truth: so often a for b, b for a, and so often each of them for itself."""
    answer = [0] * (one + right[0]) + [1] * (other + right[1])
    return answer, [1] * one + [0] * right[0] + [0] * other + [1] * right[1]


@given(st.permutations(range(6)), st.integers(6, 30))
def test_any_exchange_is_found_and_only_that(order: list[int], rows: int) -> None:
    truth = np.repeat(np.arange(6), rows)
    found = exchanges(np.array(order)[truth], truth, 6)
    means = {answer: label for label, answer in enumerate(order) if answer != label}
    assert {a: b for exchange in found for a, b in exchange.means.items()} == means
    for exchange in found:
        assert set(exchange.means) == set(exchange.means.values())
        assert exchange.other == exchange.rows == rows * len(exchange.means)
        assert exchange.luck == pytest.approx(0.5**exchange.rows)


@given(st.integers(0, 2**32), st.integers(2, 8))
def test_confusion_is_no_exchange(seed: int, classes: int) -> None:
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, classes, 400)
    wrong = chance.random(400) < 0.45
    answer = np.where(wrong, (truth + 1) % classes, truth)
    assert exchanges(answer, truth, classes) == ()
    assert exchanges(np.zeros_like(truth), truth, classes) == ()


def test_an_exchange_is_refused_where_it_is_no_luck() -> None:
    assert broken_order(*pair(6, 7), NAMES, where="test rows") is None
    problem = broken_order(*pair(6, 8), NAMES, where="test rows")
    assert problem is not None
    assert (problem.promise, problem.exit_code) == ("labels", 3)
    assert str(problem).startswith(
        "[labels] test rows: labels are exchanged: the model answers 'a' for 'b', 'b' for 'a', "
        "on 14 of 14 rows with these answers. Nothing was shipped. Check the order of the labels"
    )


def test_each_cycle_is_judged_alone() -> None:
    (a, b), (c, d) = pair(9, 9), pair(5, 5)
    ring = [4, 5, 6] * 20
    answer, truth = [*a, *np.add(c, 2), *ring], [*b, *np.add(d, 2), *np.roll(ring, 1)]
    assert [(set(e.means), e.luck <= LUCK) for e in exchanges(answer, truth, 7)] == [
        ({0, 1}, True), ({2, 3}, False), ({4, 5, 6}, True)
    ]  # fmt: skip
    told = str(broken_order(answer, truth, NAMES, where="test rows"))
    assert "'a' for 'b', 'b' for 'a', on 18 of 18" in told and "; 'e' for 'g', 'f' for 'e', 'g' for 'f', on 60" in told
    assert "'c'" not in told


def test_classes_that_cannot_be_told_apart_are_hardly_ever_refused() -> None:
    """The numbers of each class's rows for which it is most probable, where a coin is tossed for each answer."""
    refused = 0.0
    for one in range(19):
        for other in range(10):
            if broken_order(*pair(one, other, right=(9 - other, 18 - one)), NAMES, where=""):
                refused += math.comb(18, one) * math.comb(9, other) / 2**27
    assert 1 / 2800 < refused < 1 / 2700


def test_many_rows_are_no_burden() -> None:
    assert exchanges(*pair(80_000, 90_000, right=(9_000, 8_000)), 2)[0].luck == 0.0
