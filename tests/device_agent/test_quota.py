"""A tenant's rate and its bytes of a day: never more than was agreed, and never a refusal of what was."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from device_agent.quota import DAY_S, SLOT_S, Bucket, DayBytes

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


sizes = st.lists(st.tuples(st.integers(0, 600), st.floats(0, DAY_S / 3)), min_size=1, max_size=60)


@given(st.integers(1, 1000), starts, sizes)
def test_no_24_hours_see_more_than_a_day(limit: int, now: float, steps: list[tuple[int, float]]) -> None:
    day = DayBytes(limit_bytes=limit)
    spent: list[tuple[float, int]] = []
    for size, gap in steps:
        now += gap
        if day.wait_s(size, now) == 0:
            day = day.spent(size, now)
            spent.append((now, size))
        assert 0 <= day.left(now) <= limit and len(day.slots) <= DAY_S // SLOT_S + 1
    for index, (end, _) in enumerate(spent):
        assert sum(size for at, size in spent[: index + 1] if at > end - DAY_S) <= limit


@given(st.integers(1, 1000), starts, sizes)
def test_bytes_come_back_when_it_was_said_and_within_a_day_and_a_quarter(
    limit: int, now: float, steps: list[tuple[int, float]]
) -> None:
    day = DayBytes(limit_bytes=limit)
    for size, gap in steps:
        now += gap
        wait_s = day.wait_s(size, now)
        if size > limit:
            assert wait_s == math.inf
            continue
        assert wait_s <= DAY_S + SLOT_S
        if wait_s > 1:
            assert day.wait_s(size, now + wait_s - 1) > 0, "not sooner than said"
        now += wait_s + 1e-3
        assert day.wait_s(size, now) == 0
        day = day.spent(size, now)
