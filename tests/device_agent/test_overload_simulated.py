"""Overload under a virtual clock: who is let in is in time, and no more is refused than must be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from overload_simulated import run
from simulated_device import Worker

SECONDS = 20.0


@pytest.mark.parametrize("factor", [2.0, 3.0, 10.0])
def test_who_is_admitted_is_in_time_and_the_capacity_is_used(factor: float) -> None:
    row, _, batches = run(Worker(), factor, SECONDS, seed=1)
    assert row.kept >= 0.995, "first come, first served with a try for everybody kept 98 to 96 %"
    assert row.excess <= 0.005, "what is shed is what is more than 95 % of the capacity"
    assert row.capacity_share >= 0.96
    assert sum(batches) / len(batches) > 3.0, "deadlines cut hardly any batch"


def test_at_the_capacity_itself_hardly_more_is_refused_than_by_an_ideal_queue() -> None:
    row, unbeatable, _ = run(Worker(), 1.0, SECONDS, seed=1)
    assert row.kept >= 0.995
    assert row.excess_to_ideal <= 0.04
    assert unbeatable.excess > 0.0, "nobody keeps the bound here: who is to be answered at once comes in clusters"


@pytest.mark.parametrize("factor", [1.0, 3.0, 10.0])
def test_bursts(factor: float) -> None:
    row, unbeatable, _ = run(Worker(), factor, SECONDS, bursts=True, seed=1)
    assert row.kept >= 0.995
    assert row.excess_to_ideal <= 0.04
    assert row.capacity_share >= 0.88 * unbeatable.capacity_share


@pytest.mark.parametrize("worker", [Worker(spread=0.15), Worker(stall_chance=0.05), Worker(max_batch_size=1)])
def test_a_worker_whose_times_vary_costs_admissions_and_no_promises(worker: Worker) -> None:
    for factor in (1.0, 5.0):
        row, _, _ = run(worker, factor, SECONDS, seed=1)
        assert row.kept >= 0.99
        if factor > 1:
            assert row.excess <= 0.01, "a stall never begins a chain of late ones that doesn't end"


@pytest.mark.parametrize("bursts", [False, True])
def test_promises_that_stalls_of_the_supervisor_break_make_it_cautious(bursts: bool) -> None:
    row, _, _ = run(Worker(gap_chance=0.1), 10.0, 2 * SECONDS, bursts=bursts, seed=1)
    assert row.kept >= 0.985, "without caution 95 %; it begins with none"
    assert row.excess <= 0.09


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(Worker(), 3.0, 3.0, seed=5) == run(Worker(), 3.0, 3.0, seed=5)
