"""Shares of a model by weight: room, turns and time; and what a flood at one tenant is to another, simulated."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.fairness import PATIENT, PATIENT_SHARE, Demand, Turns, has_room, reserve, shares
from device_agent.scheduler import PATIENT_EVERY, Pending, insert, interleaved
from device_agent.ticket import Ticket
from device_agent.ticket_queue import TicketQueue

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from open_loop import schedule
from simulated_device import Arrival, Device, Worker

WORKER = Worker()
CAPACITY = WORKER.capacity_per_s()
P95_S = WORKER.unloaded_p95_s()
EQUAL = {"flood": 1.0, "quiet": 1.0}
NAMES = st.sampled_from("abc")


@given(
    st.dictionaries(NAMES, st.floats(0.1, 10.0), min_size=2),
    st.lists(st.tuples(NAMES, st.integers(-4, 4)), max_size=200),
    st.integers(1, 40),
)
def test_room_is_never_overbooked_and_half_of_a_share_is_always_there(
    weights: dict[str, float], steps: list[tuple[str, int]], places: int
) -> None:
    parts, held = shares(weights), Counter[str]()
    for name, wanted in steps:
        if name not in weights:
            continue
        if wanted <= 0:
            held[name] = max(held[name] + wanted, 0)
        elif has_room(name, held, parts, places, wanted):
            held[name] += wanted
        else:
            assert held[name] + wanted > int(parts[name] * places / 2)
        assert held.total() <= places


def test_without_tenants_all_places_are_anybodys() -> None:
    assert has_room("", {"": 3}, {}, 4) and not has_room("", {"": 4}, {}, 4)


@given(st.lists(st.tuples(NAMES, st.floats(0.1, 3.0)), min_size=1, max_size=60))
def test_turns_within_a_tenant_are_in_the_order_of_arrival(joins: list[tuple[str, float]]) -> None:
    turns, last = Turns(), dict.fromkeys("abc", -1.0)
    for name, cost in joins:
        turns, turn = turns.join(name, cost)
        assert turn > last[name]
        last[name] = turn


@given(st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_two_that_both_wait_are_served_as_their_weights_are(one: float, other: float) -> None:
    turns, waiting = Turns(), []
    for name, weight in (("a", one), ("b", other)):
        for number in range(200):
            turns, turn = turns.join(name, 1.0 / weight)
            waiting.append((turn, number, name))
    served = Counter(name for _, _, name in sorted(waiting)[:100])
    assert abs(served["a"] - 100 * one / (one + other)) <= 1.5


def test_who_comes_back_goes_before_what_another_piled_up_and_cannot_save_turns() -> None:
    turns = Turns()
    for _ in range(100):
        turns, last = turns.join("flood", 1.0)
    turns, first = turns.served(50.0).join("quiet", 1.0)
    assert first == 50.0 < last


@given(st.lists(st.tuples(st.integers(0, 1), st.none() | st.floats(0, 9), st.floats(0, 9)), max_size=40))
def test_of_both_kinds_neither_waits_for_ever(items: list[tuple[int, float | None, float]]) -> None:
    queue: list[Pending] = []
    for number, (priority, deadline_at, turn) in enumerate(items):
        place = 0.0 if deadline_at is not None else turn
        insert(queue, Pending(request_id=number, priority=priority, deadline_at=deadline_at, cost_bytes=1, turn=place))
    order = interleaved(queue, 0)
    for hurried in (True, False):  # each kind keeps its order
        kind = [each for each in queue if (each.deadline_at is not None) is hurried]
        assert [each for each in order if (each.deadline_at is not None) is hurried] == kind
    assert [each.rank for each in order] == [each.rank for each in queue]
    for rank in {each.rank for each in queue}:
        mine = [each for each in order if each.rank == rank]
        since = 0
        for at, each in enumerate(mine):
            since = 0 if each.deadline_at is None else since + 1
            if any(later.deadline_at is None for later in mine[at + 1 :]):
                assert since < PATIENT_EVERY


def test_what_was_asked_for_fades_and_over_ones_share_room_is_left() -> None:
    flood, quiet = Demand(), Demand()
    for step in range(1000):
        flood, quiet = flood.asks(0.02, step * 0.01), quiet.asks(0.001, step * 0.01)
    assert flood.now(10.0) == pytest.approx(2.0, rel=0.2)
    assert quiet.now(10.0) == pytest.approx(0.1, rel=0.2)
    assert flood.now(60.0) < 1e-3
    demands = {"flood": flood, "quiet": quiet}

    def left_by(tenant: str, **waiting_s: float) -> float:
        return reserve(tenant, demands, shares(EQUAL), waiting_s, cost_s=0.01, now=10.0).of(1.0)

    assert 0.1 < left_by("flood") <= 0.5, "what the other asks for, and some chance; its share at most"
    assert left_by("flood", quiet=9.0) == 0.0, "it waits already"
    assert left_by("quiet") == 0.0, "it is within its share"
    demands[PATIENT] = Demand(part=50.0, at=10.0)
    assert left_by("quiet") == PATIENT_SHARE


def flow(tenant: str, factor: float, *, hurried: bool, seed: int, tightest: float = 6.0) -> list[Arrival]:
    plan = schedule(factor * CAPACITY, 20.0, (tightest * P95_S, 20 * P95_S), seed=seed)
    return [Arrival(at_s=each.at_s, deadline_s=each.deadline_s if hurried else None, tenant=tenant) for each in plan]


def simulate(*flows: list[Arrival], weights: dict[str, float] = EQUAL) -> dict[str, tuple[float, float, float]]:
    """By tenant: answered in time of the offered, its p95 latency, and what it got of the capacity."""
    arrivals = sorted(chain.from_iterable(flows), key=lambda arrival: arrival.at_s)
    outcomes = Device(WORKER, 1, weights).run(arrivals)
    found = {}
    for tenant in {arrival.tenant for arrival in arrivals}:
        own = [outcome for arrival, outcome in zip(arrivals, outcomes, strict=True) if arrival.tenant == tenant]
        took = sorted(outcome.done_s - outcome.at_s for outcome in own if outcome.status == 200)
        got = sum(outcome.in_time and outcome.done_s < 20.0 for outcome in own) / CAPACITY / 20.0
        hit_rate = sum(outcome.in_time for outcome in own) / len(own)
        found[tenant] = (hit_rate, took[len(took) * 95 // 100], got)
    return found


@pytest.mark.parametrize("flood_hurried", [True, False])
def test_a_flood_at_one_tenant_is_not_felt_by_another_with_deadlines(flood_hurried: bool) -> None:
    quiet = flow("quiet", 0.15, hurried=True, seed=1)
    alone = simulate(quiet)["quiet"]
    beside = simulate(quiet, flow("flood", 5.0, hurried=flood_hurried, seed=2))
    assert alone[0] == 1.0
    assert beside["quiet"][0] >= alone[0] - 0.05, "of deadlines that a full batch in front of them leaves room for"
    assert beside["flood"][2] >= 0.75, "the device still works"


@pytest.mark.parametrize("flood_hurried", [True, False])
def test_a_flood_at_one_tenant_is_not_felt_by_another_without_deadlines(flood_hurried: bool) -> None:
    quiet = flow("quiet", 0.15, hurried=False, seed=1)
    beside = simulate(quiet, flow("flood", 5.0, hurried=flood_hurried, seed=2))
    assert beside["quiet"][0] == 1.0
    full_batch_s = WORKER.max_batch_size / CAPACITY
    assert beside["quiet"][1] <= simulate(quiet)["quiet"][1] + PATIENT_EVERY * full_batch_s


@pytest.mark.parametrize(("hurried", "least", "most"), [(True, 1.8, 3.5), (False, 2.5, 3.5)])
def test_two_floods_get_what_their_weights_say(hurried: bool, least: float, most: float) -> None:
    weights = {"much": 3.0, "little": 1.0}
    flows = [flow(name, 4.0, hurried=hurried, seed=seed, tightest=2.0) for seed, name in enumerate(weights)]
    got = simulate(*flows, weights=weights)
    assert least <= got["much"][2] / got["little"][2] <= most
    assert got["much"][2] + got["little"][2] >= 0.9


def test_promises_hold_while_others_come_without_deadlines() -> None:
    flows = flow("quiet", 0.2, hurried=False, seed=1), flow("flood", 3.0, hurried=True, seed=2, tightest=2.0)
    arrivals = sorted(chain.from_iterable(flows), key=lambda arrival: arrival.at_s)
    outcomes = Device(WORKER, 1, EQUAL).run(arrivals)
    waited = [each for each in outcomes if each.deadline_s < 1e9 and (each.status == 200 or each.done_s > each.at_s)]
    assert sum(each.in_time for each in waited) / len(waited) >= 0.99


def test_who_waits_again_keeps_its_turn() -> None:
    """As those of a batch that a dead worker never came to."""

    def ticket(number: int) -> Ticket:
        pending = Pending(request_id=number, priority=0, deadline_at=None, cost_bytes=1, tenant="a")
        return Ticket(request=None, pending=pending, on_verdict=None, on_answer=None)  # type: ignore[arg-type]

    queue = TicketQueue({"a": 1.0, "b": 1.0})
    tickets = [ticket(number) for number in range(1, 7)]
    for each in tickets:
        queue.put(each)
    for each in tickets[:2]:
        queue.take(each)
    for each in tickets[:2]:
        queue.put(each)
    assert [pending.request_id for pending in queue.order] == [1, 2, 3, 4, 5, 6]
