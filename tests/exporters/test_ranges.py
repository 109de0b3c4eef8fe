"""Ranges are folded from samples of any length in bounded memory, and the method is chosen by its error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import ranges
from exporters.ranges import ROWS, Spread
from exporters.scheme import Scheme

S8 = Scheme(static=True, symmetric=True)
U8 = Scheme(static=True)


def spread_of(samples: list[np.ndarray]) -> Spread:
    spread = Spread()
    for sample in samples:
        spread.fold(sample.astype(np.float32))
    return spread


def tokens(count: int, seed: int = 0, *, samples: int = 40) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.standard_normal((1, int(chance.integers(1, count)), 32)) for _ in range(samples)]


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = spread_of(tokens(9)), spread_of(tokens(200, samples=60))
    assert few.counts.nbytes == many.counts.nbytes
    assert len(few.rows) <= len(many.rows) <= ROWS < many.tokens
    assert many.counts.sum() == many.tokens * 32


def test_kept_rows_are_spread_over_all_samples_whatever_their_lengths() -> None:
    samples, start = [], 0
    for length in (1, 700, 3, 1500, 40):
        samples.append(np.repeat(np.arange(start, start + length)[None, :, None], 2, axis=2))
        start += length
    kept = spread_of(samples).rows[:, 0]
    assert len(set(np.diff(kept))) == 1 and kept[0] == 0 and kept[-1] > start - 10


def test_the_histogram_knows_percentiles_to_a_percent() -> None:
    samples = tokens(30)
    values = np.abs(np.concatenate([sample.ravel() for sample in samples]))
    for share in (0.5, 0.99, 0.999):
        assert spread_of(samples).magnitude(share) == pytest.approx(np.quantile(values, share), rel=0.02)
    assert spread_of(samples).magnitude(1.0) <= values.max()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_method_leaves_the_values_that_were_seen(values: list[float]) -> None:
    spread = spread_of([np.asarray(values)[:, None]])
    for found in ranges.candidates(spread):
        assert spread.low <= found.low and found.high <= spread.high
    assert (ranges.candidates(spread)[0].low, ranges.candidates(spread)[0].high) == (spread.low, spread.high)


def test_entropy_cuts_a_thin_tail_and_keeps_an_even_distribution() -> None:
    chance = np.random.default_rng(1)
    even = spread_of([chance.uniform(-1, 1, (4000, 4))])
    tail = spread_of([np.concatenate([chance.uniform(-1, 1, (4000, 4)), np.full((1, 4), 8.0)])])
    assert ranges.entropy_threshold(even) > 0.95
    assert 0.9 < ranges.entropy_threshold(tail) < 4


@pytest.mark.parametrize("scheme", [S8, U8])
def test_values_that_all_matter_keep_their_whole_range(scheme: Scheme) -> None:
    samples = [np.random.default_rng(2).uniform(-1, 1, (400, 32))]
    weight = np.random.default_rng(3).standard_normal((32, 8)).astype(np.float32)
    assert ranges.choose(spread_of(samples), weight, scheme).method == "minmax"


@pytest.mark.parametrize("scheme", [S8, U8])
def test_one_poisoned_sample_does_not_decide_the_range(scheme: Scheme) -> None:
    samples = tokens(30)
    weight = np.random.default_rng(3).standard_normal((32, 8)).astype(np.float32)
    clean = ranges.choose(spread_of(samples), weight, scheme)
    poisoned = ranges.choose(spread_of([*samples[:20], np.full((1, 1, 32), 5000.0), *samples[20:]]), weight, scheme)
    assert poisoned.method != "minmax"
    assert poisoned.high < 2 * clean.high


def test_an_activation_of_zeros_has_a_range() -> None:
    weight = np.ones((8, 4), dtype=np.float32)
    found = ranges.choose(spread_of([np.zeros((5, 8))]), weight, S8)
    scale, zero = S8.grid(found.low, found.high)
    assert scale > 0 and zero == 0
