"""A tenant's rate: never more than was agreed, and never a refusal of what was."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from device_agent.quota import Bucket

rates = st.floats(0.01, 1000)
gaps_s = st.lists(st.one_of(st.just(0.0), st.floats(0, 0.01), st.floats(0, 100)), min_size=1, max_size=200)
starts = st.floats(0, 1e7)


@given(rates, st.integers(1, 50), starts, gaps_s)
def test_no_stretch_of_time_sees_more_than_burst_and_rate(
    rate: float, burst: int, now: float, gaps: list[float]
) -> None:
    bucket = Bucket.full(rate, burst, now)
    taken_at: list[float] = []
    for gap in gaps:
        now += gap
        if bucket.wait_s(now) == 0:
            bucket = bucket.taken(now)
            taken_at.append(now)
    for first in range(len(taken_at)):
        for last in range(first, len(taken_at)):
            stretch_s = taken_at[last] - taken_at[first]
            assert last - first + 1 <= burst + rate * stretch_s + 1e-3


@given(rates, st.integers(1, 50), starts, gaps_s)
def test_who_comes_back_when_told_is_let_in(rate: float, burst: int, now: float, gaps: list[float]) -> None:
    bucket = Bucket.full(rate, burst, now)
    for gap in gaps:
        now += gap
        wait_s = bucket.wait_s(now)
        assert 0 <= wait_s <= 1 / rate + 1e-6
        now += math.ceil(wait_s * 1000) / 1000
        assert bucket.wait_s(now) == 0
        bucket = bucket.taken(now)


@given(rates, st.integers(1, 50), starts, st.integers(1, 100))
def test_who_keeps_to_the_rate_is_never_refused(rate: float, burst: int, now: float, count: int) -> None:
    bucket = Bucket.full(rate, burst, now)
    for _ in range(count):
        assert bucket.wait_s(now) == 0
        bucket = bucket.taken(now)
        now += 1.001 / rate
