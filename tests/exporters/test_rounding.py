"""Rounding that compensates loses less on what was seen, and stays on the grid that quantizes it afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.rounding import compensated
from exporters.scheme import rounded_weight, weight_scale


def correlated(seed: int, channels: int, count: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((6, channels)) + 0.1 * chance.standard_normal((6, channels))
    noise = 0.1 * chance.standard_normal((count, channels))
    return (chance.standard_normal((count, 6)) @ mixing + noise).astype(np.float32)


@pytest.mark.parametrize("levels", [64, 127])
@pytest.mark.parametrize("channels", [40, 300])  # within one block, and over several
def test_products_of_other_rows_of_the_kind_lose_less(levels: int, channels: int) -> None:
    rows = correlated(1, channels, 1200)
    weight = np.random.default_rng(2).standard_normal((channels, 24)).astype(np.float32)
    seen, unseen = rows[:800], rows[800:]
    wanted = unseen @ weight

    def error(left: np.ndarray) -> float:
        return float(np.mean((unseen @ left - wanted) ** 2))

    assert error(compensated(weight, seen.T @ seen, levels)) < 0.5 * error(rounded_weight(weight, levels))


@given(st.integers(0, 10_000), st.sampled_from([64, 127]), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_quantizing_it_again_finds_the_same_integers(seed: int, levels: int, tokens: int) -> None:
    chance = np.random.default_rng(seed)
    weight = (chance.standard_normal((16, 5)) ** 3).astype(np.float32)
    rows = chance.standard_normal((tokens, 16)).astype(np.float32)  # fewer than channels, too
    found = compensated(weight, rows.T @ rows, levels)
    assert np.allclose(weight_scale(found, levels), weight_scale(weight, levels), rtol=1e-5)
    assert np.allclose(rounded_weight(found, levels), found, rtol=1e-5, atol=1e-6)


def test_what_was_never_active_is_rounded_to_the_nearest() -> None:
    weight = np.random.default_rng(4).standard_normal((12, 6)).astype(np.float32)
    found = compensated(weight, np.zeros((12, 12), dtype=np.float32), 127)
    assert np.array_equal(found, rounded_weight(weight, 127))
