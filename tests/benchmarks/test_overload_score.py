"""The overload benchmark's arithmetic, on runs whose figures are known."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import open_loop
from open_loop import Outcome
from overload_score import Capacity, cloud_misses, ideal_sheds, score

from device_agent.trace import Began, Decided, Traced

STEADY = Capacity(before=100.0, after=100.0)
P95_S = 0.01


def outcome(at_s: float, took_s: float, status: int = 200, deadline_s: float = 0.1, **told: str) -> Outcome:
    return Outcome(at_s, deadline_s, at_s, at_s + took_s, status, told.get("route"), told.get("reason"))


def test_twice_the_capacity_of_which_every_second_is_refused_at_once() -> None:
    outcomes = [outcome(n / 200, 0.001, 503) if n % 2 else outcome(n / 200, 0.02) for n in range(4000)]
    row = score(outcomes, STEADY, P95_S, 20.0)
    assert (row.offered, row.admitted, row.in_time, row.shed, row.kept) == (4000, 2000, 2000, 2000, 1.0)
    assert row.capacity_share == pytest.approx(1.0)
    assert row.excess == pytest.approx(-50 / 2000), "five in a hundred of the capacity may be shed on top"


def test_the_worst_window_is_found_where_the_mean_hides_it() -> None:
    shed_late = [outcome(n / 100, 0.001, 503) if n >= 1500 else outcome(n / 100, 0.02) for n in range(2000)]
    row = score(shed_late, STEADY, P95_S, 20.0)
    assert row.excess == pytest.approx((500 - 50) / 1000)
    assert row.excess_to_ideal == pytest.approx(0.45, abs=0.01)


def test_who_is_refused_after_waiting_was_admitted() -> None:
    row = score([outcome(0.0, 0.02), outcome(0.1, 0.06, 503), outcome(0.2, 0.001, 503)], STEADY, P95_S, 1.0)
    assert (row.admitted, row.in_time, row.late) == (2, 1, 0)


def test_promises_are_told_from_hopes() -> None:
    outcomes = [
        outcome(0.0, 0.02, reason="idle"),
        outcome(0.1, 0.12, reason="in_time"),
        outcome(0.2, 0.12, reason="cloud_unavailable"),
    ]
    row = score(outcomes, STEADY, P95_S, 1.0)
    assert (row.promised, row.promised_late, row.late) == (2, 1, 2)


def test_late_by_more_than_the_grace_counts_whatever_the_answer() -> None:
    row = score([outcome(0.0, 0.14), outcome(0.1, 0.16), outcome(0.2, 0.16, 504)], STEADY, P95_S, 1.0)
    assert (row.overdue, row.late, row.in_time) == (2, 2, 0)
    assert row.worst_overdue_s == pytest.approx(0.06)


def test_an_ideal_queue_serves_its_rate_and_refuses_the_rest() -> None:
    at_twice = [outcome(n / 200, 0.0) for n in range(2000)]
    assert sum(ideal_sheds(at_twice, 100.0)) == pytest.approx(1000, abs=10)
    assert not any(ideal_sheds(at_twice, 201.0))


def traced(
    at: float, latency_s: float, route: str = "cloud", status: int = 200, reason: str = "predicted_late"
) -> Traced:
    return Traced(
        model="m",
        at=at,
        deadline_at=at + 0.1,
        decided=Decided(route=route, reason="predicted_late"),
        outcome=Decided(route=route, reason=reason),
        status=status,
        latency_s=latency_s,
    )


def test_what_a_lost_cloud_cost() -> None:
    lines = [
        Began(ts="", agent_version=""),
        traced(0.95, 0.2),  # was under way, and late
        traced(1.1, 0.1, status=504),
        traced(1.2, 0.09),  # the device still had time
        traced(1.3, 0.001, "shed", 503),
        traced(1.3, 0.001, status=503, reason="cloud_unavailable"),  # never sent
        traced(1.4, 0.1, "local", 504),  # its own
        traced(0.8, 0.2),  # before it was lost
        traced(2.1, 0.1, status=503),  # it is back
    ]
    assert cloud_misses(lines, 1.1, 2.0) == 2


def test_schedules_keep_their_rate_and_bursts_their_pauses() -> None:
    steady = open_loop.schedule(100.0, 100.0, (0.02, 0.2))
    assert len(steady) == pytest.approx(10_000, rel=0.05)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(steady))
    assert all(0.02 <= each.deadline_s <= 0.2 for each in steady)
    bursts = open_loop.schedule(100.0, 100.0, (0.02, 0.2), bursts=True, private_share=0.25)
    assert len(bursts) == pytest.approx(5_000, rel=0.05)
    assert all(each.at_s % 2 < 1 for each in bursts)
    assert sum(each.private for each in bursts) == pytest.approx(len(bursts) / 4, rel=0.1)
