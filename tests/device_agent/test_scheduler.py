"""Batches and their order."""

from __future__ import annotations

from functools import partial

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from device_agent.restart import RestartPlan
from device_agent.scheduler import Pending, forecast, insert, next_batch
from device_agent.service_time import CUT_SPREADS, ServiceTime

MODEL = ServiceTime.prior(0.01, 32)  # 10 ms for 32 tokens, 160 bytes


def pending(
    number: int, priority: int = 0, deadline_at: float | None = None, cost: int = 160, alone: bool = False
) -> Pending:
    return Pending(request_id=number, priority=priority, deadline_at=deadline_at, cost_bytes=cost, alone=alone)


def queue_of(*items: Pending) -> list[Pending]:
    queue: list[Pending] = []
    for item in items:
        insert(queue, item)
    return queue


def test_priority_one_first_the_default_last_and_arrival_within() -> None:
    queue = queue_of(pending(1), pending(2, 2), pending(3, 1), pending(4, 1), pending(5))
    assert [item.request_id for item in queue] == [3, 4, 2, 1, 5]


def test_the_earliest_deadline_goes_first_and_who_has_none_last() -> None:
    queue = queue_of(pending(1), pending(2, deadline_at=9.0), pending(3, deadline_at=2.0), pending(4, 1))
    assert [item.request_id for item in queue] == [4, 3, 2, 1]


def delays(queue: list[Pending], newcomer: Pending, limit: int = 4) -> bool:
    whole = queue_of(*queue, newcomer)
    seen = forecast(whole, newcomer.request_id, now=0.0, free_at=0.0, model=MODEL, max_batch_size=limit, newcomer=True)
    return seen.delays


def test_a_newcomer_is_told_that_it_takes_somebodys_place() -> None:
    full = [pending(number, deadline_at=0.1) for number in range(8)]  # 10 ms each, in batches of four
    at = forecast(full, 7, now=0.0, free_at=0.0, model=MODEL, max_batch_size=4)
    edge = [msgspec.structs.replace(item, deadline_at=at.safe_at) for item in full]
    assert delays(edge, pending(9, deadline_at=0.99 * at.safe_at)), "it overtakes, and the last ones become late"
    assert not delays(edge, pending(9, deadline_at=1.0)), "it comes after them"
    assert not delays(edge[:4], pending(9, deadline_at=0.99 * at.safe_at)), "there is room"
    assert not delays(edge, pending(9, priority=1, deadline_at=0.05)), "the higher priority overtakes"
    assert not delays([msgspec.structs.replace(item, deadline_at=None) for item in edge], pending(9, deadline_at=0.05))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.none() | st.floats(0.0, 0.3), st.integers(0, 900)), max_size=20),
    st.tuples(st.integers(0, 2), st.floats(0.0, 0.3), st.integers(0, 900)),
    st.integers(1, 6),
)
def test_who_is_let_in_leaves_everybody_of_its_rank_as_safe_as_before(
    items: list[tuple[int, float | None, int]], one: tuple[int, float, int], limit: int
) -> None:
    before = queue_of(*(pending(n, p, d, c) for n, (p, d, c) in enumerate(items)))
    newcomer = pending(99, *one)
    after = queue_of(*before, newcomer)
    ask = partial(forecast, now=0.0, free_at=0.0, model=MODEL, max_batch_size=limit)
    seen = ask(after, 99, newcomer=True)
    if seen.delays or seen.safe_at > one[1]:
        return
    for item in before:
        if item.deadline_at is not None and item.rank <= newcomer.rank:
            was, now = ask(before, item.request_id), ask(after, item.request_id)
            assert now.safe_at <= item.deadline_at or now.expected_at <= was.expected_at + 1e-9


def test_a_batch_is_what_waited_up_to_the_limit() -> None:
    queue = queue_of(*(pending(number) for number in range(10)))
    assert next_batch(queue, 0.0, MODEL, 4) == 4
    assert next_batch(queue[:3], 0.0, MODEL, 4) == 3
    assert next_batch([], 0.0, MODEL, 4) == 0


def test_a_batch_never_grows_past_a_members_deadline() -> None:
    queue = queue_of(*(pending(number, deadline_at=0.03) for number in range(8)))
    size = next_batch(queue, 0.0, MODEL, 8)
    assert 1 <= size < 8
    busy = MODEL.busy_s(MODEL.batch_units([160] * size))
    assert busy + MODEL.margin_s(busy, CUT_SPREADS) <= 0.03 or size == 1


def test_a_retried_request_runs_alone() -> None:
    queue = queue_of(pending(1, alone=True), pending(2), pending(3, alone=True), pending(4))
    assert next_batch(queue, 0.0, MODEL, 8) == 1
    assert next_batch(queue[1:], 0.0, MODEL, 8) == 1
    assert next_batch(queue[2:], 0.0, MODEL, 8) == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.none() | st.floats(0, 1), st.integers(0, 2000), st.booleans()),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 16),
)
def test_every_request_gets_its_turn_and_forecasts_agree_with_the_batches(
    items: list[tuple[int, float | None, int, bool]], limit: int
) -> None:
    queue = queue_of(*(pending(n, p, d, c, a) for n, (p, d, c, a) in enumerate(items)))
    assert [item.order for item in queue] == sorted(item.order for item in queue)
    at, rest, end = 1.0, list(queue), {}
    while rest:
        size = next_batch(rest, at, MODEL, limit)
        assert 1 <= size <= limit
        assert size == 1 or not any(item.alone for item in rest[:size])
        at += MODEL.busy_s(MODEL.batch_units([item.cost_bytes for item in rest[:size]]))
        end.update((item.request_id, at) for item in rest[:size])
        rest = rest[size:]
    for number in end:
        seen = forecast(queue, number, now=0.0, free_at=1.0, model=MODEL, max_batch_size=limit)
        assert abs(seen.expected_at - end[number]) < 1e-9
        assert seen.safe_at > seen.expected_at


def test_restarts_are_at_once_twice_then_pause_longer_and_longer() -> None:
    plan, pauses = RestartPlan(), []
    for _ in range(12):
        plan = plan.crashed()
        pauses.append(plan.pause_s)
    assert pauses[:5] == [0.0, 0.0, 0.5, 1.0, 2.0]
    assert pauses[-1] == 30.0
    assert plan.served().crashes == 0
