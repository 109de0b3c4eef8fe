"""How many may wait without a deadline: the limit follows what they wait."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.queue_limit import QueueLimit
from device_agent.settings import Policy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated_device import Arrival, Device, Worker


@given(
    st.floats(0.01, 100.0),
    st.floats(0.001, 1e5),
    st.integers(1, 64),
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0.0, 1e4), st.integers(1, 2000), st.floats(0.0, 10.0)), max_size=80),
)
def test_it_stays_in_its_bounds_and_moves_the_right_way(
    target_s: float, rate: float, batch: int, most: int, taken: list[tuple[float, int, float]]
) -> None:
    limit = QueueLimit.begin(target_s=target_s, rate_per_s=rate, max_batch_size=batch, most=most)
    now = 0.0
    for waited_s, waiting, later_s in taken:
        now += later_s
        before, limit = limit, limit.taken(waited_s, min(waiting, batch), waiting, now)
        assert 1 <= limit.least <= limit.limit <= limit.most <= most
        assert limit.limit <= before.limit if waited_s > target_s else limit.limit >= before.limit


def test_one_long_wait_is_answered_once() -> None:
    limit = QueueLimit(target_s=1.0, least=1, most=100, limit=50.0)
    once = limit.taken(2.0, 4, 50, 10.0)
    assert once.places == 45 and once.taken(2.0, 4, 50, 11.9) == once, "these came under the old limit"
    assert once.taken(1.9, 4, 45, 12.1).places == 40


def flood(worker: Worker, policy: Policy, factor: float, seconds: float) -> tuple[list[float], Device, float]:
    """Waits of those without a deadline, after a while, and the part of the capacity that was used."""
    chance, at, arrivals = random.Random(1), 0.0, []
    while (at := at + chance.expovariate(factor * worker.capacity_per_s())) < seconds:
        arrivals.append(Arrival(at_s=at))
    device = Device(worker, 1, None, policy)
    outcomes = device.run(arrivals)
    waits = sorted(each.done_s - each.at_s for each in outcomes if each.status == 200 and each.at_s > seconds / 4)
    used = sum(each.status == 200 and each.done_s < seconds for each in outcomes)
    return waits, device, used / seconds / worker.capacity_per_s()


WORKERS = [Worker(base_s=0.2, row_s=0.1), Worker(base_s=0.02, row_s=0.1, spread=0.2)]


@pytest.mark.parametrize("worker", WORKERS)
def test_in_a_flood_nobody_waits_much_longer_than_the_target(worker: Worker) -> None:
    waits, _, used = flood(worker, Policy(queue_delay_s=2.0), 3.0, 60.0)
    assert waits[len(waits) * 95 // 100] <= 2.0 * 1.5 and used >= 0.95


@pytest.mark.long  # a queue of hundreds is looked at for each who comes
@pytest.mark.parametrize("worker", WORKERS)
def test_without_a_target_they_wait_and_wait(worker: Worker) -> None:
    unlimited, device, _ = flood(worker, Policy(queue_delay_s=0.0), 3.0, 60.0)
    assert unlimited[len(unlimited) // 2] > 10.0 and device.room.limit is None


def test_without_a_flood_it_is_in_nobodys_way() -> None:
    worker = Worker(base_s=0.2, row_s=0.1)
    limited, _, _ = flood(worker, Policy(queue_delay_s=5.0), 0.6, 120.0)
    free, _, _ = flood(worker, Policy(queue_delay_s=0.0), 0.6, 120.0)
    assert limited == free
