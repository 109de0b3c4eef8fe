"""What the estimator learns, and what scheduler and router make of it: overload under virtual time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.router import Here, There, route
from device_agent.scheduler import Forecast, Pending, forecast, insert, next_batch
from device_agent.service_time import (
    CAUTION_HALF_LIFE_S,
    CAUTION_STEP,
    MISSED_SHARE,
    MOST_CAUTION,
    MOST_RAISES,
    RAISES_S,
    ServiceTime,
)
from device_agent.values import Cloud, Local


def taught(base: float, per_unit: float, noise: float, count: int = 300, seed: int = 1) -> ServiceTime:
    rng = random.Random(seed)
    model = ServiceTime.prior(0.5)  # far off
    for _ in range(count):
        lengths = [rng.randint(4, 60) for _ in range(rng.randint(1, 8))]
        busy = (base + per_unit * len(lengths) * max(lengths)) * rng.uniform(1 - noise, 1 + noise)
        model = model.observed([6 * length for length in lengths], lengths, busy)
    return model


def test_learns_base_slope_and_bytes_per_unit() -> None:
    model = taught(0.004, 0.0002, 0.05)
    assert model.bytes_per_unit == pytest.approx(6, rel=0.05)
    assert model.busy_s(32) == pytest.approx(0.004 + 32 * 0.0002, rel=0.15)
    assert model.busy_s(400) == pytest.approx(0.004 + 400 * 0.0002, rel=0.15)
    assert 0.02 < model.spread < 0.3


def test_learns_what_each_takes_where_several_run_one_after_the_other() -> None:
    rng, model = random.Random(2), ServiceTime.prior(0.5, one_by_one=True)
    for _ in range(300):
        lengths = [rng.randint(4, 60) for _ in range(rng.randint(1, 8))]
        busy = sum(0.001 + 0.0002 * length for length in lengths)
        model = model.observed([6 * length for length in lengths], lengths, busy)
    assert model.busy_s(32) == pytest.approx(0.001 + 32 * 0.0002, rel=0.1)
    assert model.batch_s([60, 300]) == pytest.approx(0.002 + 60 * 0.0002, rel=0.15)
    assert model.spread < 0.15


def test_the_prior_predicts_the_request_it_was_measured_with() -> None:
    model = ServiceTime.prior(0.03, 32)
    assert model.busy_s(32) == pytest.approx(0.03)
    assert ServiceTime.prior(None).busy_s(32) > 0


def test_identical_batches_leave_the_fit_determined() -> None:
    model = ServiceTime.prior(0.01)
    for _ in range(500):
        model = model.observed([100], [20], 0.02)
    assert model.busy_s(20) == pytest.approx(0.02, rel=0.1)
    assert 0.02 < model.busy_s(160) <= 8 * 0.02 * 1.05


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 10**6), st.integers(0, 512), st.floats(1e-6, 100.0)), max_size=60
    )
)
@settings(max_examples=60)
def test_whatever_is_observed_predictions_stay_finite_and_rise_with_work(
    batches: list[tuple[int, int, int, float]],
) -> None:
    model = ServiceTime.prior(0.01)
    for count, cost, length, busy in batches:
        model = model.observed([cost] * count, [length] * count, busy).overhead(busy / 10)
        assert model.base_s >= 0 and model.per_unit_s >= 0
        assert 0 <= model.busy_s(10) <= model.busy_s(1000) < math.inf
        assert 0 < model.margin_s(0.1) < math.inf


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 2.0)), max_size=300))
def test_caution_is_bounded_rises_little_in_a_second_and_is_forgotten(happened: list[tuple[bool, float]]) -> None:
    model, now = ServiceTime.prior(0.01), 0.0
    broken: list[float] = []
    for kept, pause_s in happened:
        now += pause_s
        before, model = model.caution_at(now), model.promised(kept, now)
        assert 1.0 <= model.caution_at(now) <= MOST_CAUTION
        assert model.caution_at(now) <= before if kept else model.caution_at(now) >= before
        if model.caution_at(now) > before:
            broken.append(now)
            assert sum(at > now - RAISES_S for at in broken) <= 2 * MOST_RAISES
    assert model.caution_at(now + 30 * CAUTION_HALF_LIFE_S) == pytest.approx(1.0)


def test_one_stall_however_many_it_makes_late_is_one_stall() -> None:
    model = ServiceTime.prior(0.01)
    for _ in range(100):
        model = model.promised(False, 5.0)
    assert model.caution == pytest.approx(CAUTION_STEP**MOST_RAISES)


def test_a_cautious_forecast_is_as_early_and_later_safe() -> None:
    model, pending = ServiceTime.prior(0.01), Pending(request_id=1, priority=0, deadline_at=9.0, cost_bytes=100)
    seen = [
        forecast([pending], 1, now=1.0, free_at=1.0, model=each, max_batch_size=4)
        for each in (model, model.promised(False, 1.0))
    ]
    plain, cautious = (each.safe_at - each.expected_at for each in seen)
    assert seen[0].expected_at == seen[1].expected_at and cautious == pytest.approx(CAUTION_STEP * plain)


@pytest.mark.parametrize(("share", "rises"), [(MISSED_SHARE / 3, False), (MISSED_SHARE * 3, True)])
def test_caution_rises_while_more_promises_are_broken_than_may_be(share: float, rises: bool) -> None:
    rng, model = random.Random(1), ServiceTime.prior(0.01)
    seen = []
    for number in range(20_000):
        model = model.promised(rng.random() >= share, number / 100)
        seen.append(model.caution)
    typical = sorted(seen)[len(seen) // 2]
    assert typical > 2.0 if rises else typical < 1.1


def arrivals(rate: float, length_s: float, rng: random.Random) -> Iterator[float]:
    at = 0.0
    while (at := at + rng.expovariate(rate)) < length_s:
        yield at


def simulate(
    overload: float,
    deadline_factor: float,
    cloud: There | None,
    seed: int,
    *,
    bucketing: bool = True,
    spread: float = 10,
) -> dict[str, int]:
    """Poisson arrivals at ``overload`` x capacity on one noisy worker, decided by the real code, virtual time."""
    rng = random.Random(seed)
    base, per_unit = 0.002, 0.0006
    lengths = lambda: max(4, int(rng.gauss(26, spread)))  # noqa: E731
    single = base + per_unit * 26
    capacity = 1 / single
    deadline = deadline_factor * (base + per_unit * 44)
    model = ServiceTime.prior(single)
    counts = dict.fromkeys(("offered", "local", "local_in_time", "cloud", "shed"), 0)
    events: list[tuple[float, int, str, object]] = []
    for number, at in enumerate(arrivals(overload * capacity, 60.0, rng)):
        heapq.heappush(events, (at, number, "arrive", lengths()))
    queue: list[Pending] = []
    true_length: dict[int, int] = {}
    running: tuple[float, float] | None = None

    def judge(now: float, pending: Pending, at: Forecast) -> str:
        here = Here(forecast=at, worker_ready=True)
        decision = route(now=now, deadline_at=pending.deadline_at, local_only=False, here=here, there=cloud)
        return "local" if isinstance(decision, Local) else "cloud" if isinstance(decision, Cloud) else "shed"

    def start(now: float) -> None:
        nonlocal running
        while queue:
            head = [queue[place] for place in next_batch(queue, now, model, 8, length_bucketing=bucketing)]
            size = len(head)
            busy = model.batch_s([pending.cost_bytes for pending in head])
            again = Forecast(expected_at=now + busy, safe_at=now + busy + model.margin_s(busy), idle=False)
            away = [(pending, where) for pending in head if (where := judge(now, pending, again)) != "local"]
            for pending, where in away:
                queue.remove(pending)
                counts[where] += 1
            if away:
                continue
            for pending in head:
                queue.remove(pending)
            longest = max(true_length[pending.request_id] for pending in head)
            took = (base + per_unit * size * longest) * rng.lognormvariate(0, 0.1)
            running = (now, busy)
            heapq.heappush(events, (now + took, size, "done", (head, took)))
            return

    while events:
        now, number, kind, what = heapq.heappop(events)
        if kind == "arrive":
            counts["offered"] += 1
            assert isinstance(what, int)
            true_length[number] = what
            pending = Pending(
                request_id=number, priority=0, deadline_at=now + deadline, cost_bytes=int(what * rng.uniform(4, 6))
            )
            trial = list(queue)
            insert(trial, pending)
            free_at = now if running is None else max(running[0] + running[1], now + 0.1 * (now - running[0]))
            expected = forecast(
                trial,
                number,
                now=now,
                free_at=free_at,
                model=model,
                max_batch_size=8,
                length_bucketing=bucketing,
            )
            where = judge(now, pending, expected)
            if where == "local":
                insert(queue, pending)
            else:
                counts[where] += 1
        else:
            head, took = what  # type: ignore[misc]
            running = None
            for pending in head:
                counts["local"] += 1
                counts["local_in_time"] += now <= pending.deadline_at
            model = model.observed(
                [pending.cost_bytes for pending in head], [true_length[pending.request_id] for pending in head], took
            )
        if running is None:
            start(now)
    return counts


@pytest.mark.parametrize("overload", [0.7, 3.0, 8.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_local_answers_meet_their_deadlines_under_overload_with_a_cloud(overload: float, seed: int) -> None:
    counts = simulate(overload, 3.0, There(endpoint="c", expected_s=0.006, safe_s=0.01), seed)
    assert counts["offered"] == counts["local"] + counts["cloud"] + counts["shed"]
    assert counts["local_in_time"] / counts["local"] >= 0.985, counts
    assert counts["shed"] / counts["offered"] <= 0.01, counts
    if overload >= 3:
        assert counts["local"] / 60 >= 0.7 / (0.002 + 0.0006 * 26), "the device stays busy"


def test_without_a_cloud_goodput_does_not_collapse() -> None:
    counts = simulate(3.0, 3.0, None, 3)
    assert counts["cloud"] == 0
    assert counts["local_in_time"] / 60 >= 0.8 / (0.002 + 0.0006 * 26), counts


def test_with_mixed_lengths_bucketing_answers_more_in_time() -> None:
    there = There(endpoint="c", expected_s=0.006, safe_s=0.01)
    with_it, without = (simulate(3.0, 8.0, there, 4, bucketing=on, spread=30) for on in (True, False))
    assert with_it["local_in_time"] / with_it["local"] >= 0.985, with_it
    assert with_it["local_in_time"] > 1.1 * without["local_in_time"], (with_it, without)
