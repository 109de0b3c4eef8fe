"""Batches and their order."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.restart import RestartPlan
from device_agent.scheduler import TOLERANCE, Pending, forecast, goes_ahead, insert, next_batch
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
    assert next_batch(queue, 0.0, MODEL, 4) == [0, 1, 2, 3]
    assert next_batch(queue[:3], 0.0, MODEL, 4) == [0, 1, 2]
    assert next_batch([], 0.0, MODEL, 4) == []


def test_a_batch_never_grows_past_a_members_deadline() -> None:
    queue = queue_of(*(pending(number, deadline_at=0.03) for number in range(8)))
    size = len(next_batch(queue, 0.0, MODEL, 8))
    assert 1 <= size < 8
    busy = MODEL.batch_s([160] * size)
    assert busy + MODEL.margin_s(busy, CUT_SPREADS) <= 0.03 or size == 1


def test_a_retried_request_runs_alone() -> None:
    queue = queue_of(pending(1, alone=True), pending(2), pending(3, alone=True), pending(4))
    assert next_batch(queue, 0.0, MODEL, 8) == [0]
    assert next_batch(queue[1:], 0.0, MODEL, 8) == [0]
    assert next_batch(queue[2:], 0.0, MODEL, 8) == [0]


def test_who_is_of_the_firsts_length_joins_it_and_the_others_come_next() -> None:
    queue = queue_of(*(pending(number, cost=40 if number % 2 else 800) for number in range(8)))
    assert next_batch(queue, 0.0, MODEL, 4) == [0, 2, 4, 6]
    assert next_batch(queue[1:], 0.0, MODEL, 4) == [0, 2, 4, 6]
    assert next_batch(queue, 0.0, MODEL, 4, length_bucketing=False) == [0, 1, 2, 3]


def test_padding_that_costs_less_than_a_batch_of_ones_own_is_paid() -> None:
    # A batch costs 2 ms before its first token, a token 0.25 ms: 8 tokens of padding are as dear as a batch.
    assert next_batch(queue_of(pending(1, cost=160), pending(2, cost=130)), 0.0, MODEL, 4) == [0, 1]
    assert next_batch(queue_of(pending(1, cost=160), pending(2, cost=110)), 0.0, MODEL, 4) == [0]


def test_a_lower_priority_joins_only_when_nobody_of_a_higher_one_is_left_out() -> None:
    behind = pending(3, priority=2)
    assert next_batch(queue_of(pending(1, priority=1), pending(2, priority=1), behind), 0.0, MODEL, 4) == [0, 1, 2]
    left_out = pending(2, priority=1, cost=1600)
    assert next_batch(queue_of(pending(1, priority=1), left_out, behind), 0.0, MODEL, 4) == [0]


def test_nobody_is_passed_over_who_would_be_late_then() -> None:
    # One alone takes 10 ms and three together 26; the long one, alone afterwards, 102: with margins some 200 ms.
    short = [pending(1, deadline_at=0.09), pending(3), pending(4)]
    for deadline_at, places in ((0.3, [0, 2, 3]), (0.18, [0])):
        queue = queue_of(*short, pending(2, deadline_at=deadline_at, cost=2000))
        assert next_batch(queue, 0.0, MODEL, 4) == places


def test_a_quick_model_that_runs_one_at_a_time_gets_several_in_a_row() -> None:
    quick = ServiceTime.prior(0.001, 32, one_by_one=True)  # 1 ms for 32 tokens, 160 bytes
    queue = queue_of(*(pending(number) for number in range(8)))
    assert next_batch(queue, 0.0, quick, 1) == [0, 1, 2]
    assert quick.batch_s([160, 160, 20]) == pytest.approx(2 * quick.busy_s(32) + quick.busy_s(4))
    assert next_batch(queue, 0.0, ServiceTime.prior(0.01, 32, one_by_one=True), 1) == [0]
    assert next_batch(queue_of(pending(1, cost=1600), *queue[1:]), 0.0, quick, 1) == [0]  # it alone takes longer
    # With margins three are safe after some 7 ms and two after 5.5.
    assert next_batch(queue_of(pending(1, deadline_at=0.006), *queue[1:]), 0.0, quick, 1) == [0, 1]
    assert next_batch(queue_of(pending(1), pending(2, alone=True), pending(3)), 0.0, quick, 1) == [0]


ITEMS = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.floats(0, 4), st.integers(0, 2000), st.booleans()),
    min_size=1,
    max_size=40,
)


@given(ITEMS, st.integers(1, 16), st.booleans(), st.booleans())
def test_every_request_gets_its_turn_and_forecasts_agree_with_the_batches(
    items: list[tuple[int, float | None, int, bool]], limit: int, bucketing: bool, one_by_one: bool
) -> None:
    model = ServiceTime.prior(0.0005, 32, one_by_one=True) if one_by_one else MODEL
    queue = queue_of(*(pending(n, p, d, c, a) for n, (p, d, c, a) in enumerate(items)))
    assert [item.order for item in queue] == sorted(item.order for item in queue)
    at, rest, end, batches = 1.0, list(queue), {}, 0
    while rest:
        places = next_batch(rest, at, model, limit, length_bucketing=bucketing)
        batch = [rest[place] for place in places]
        assert places[0] == 0 and places == sorted(set(places))
        assert 1 <= len(batch) <= (limit if not one_by_one else len(queue))
        assert len(batch) == 1 or not any(item.alone for item in batch)
        assert (bucketing and not one_by_one) or places == list(range(len(places)))
        at += model.batch_s([item.cost_bytes for item in batch])
        batches += 1
        end.update((item.request_id, at) for item in batch)
        # Whoever stood at the place of that number has had its turn.
        assert all(item.request_id in end for item in queue[:batches])
        rest = [item for place, item in enumerate(rest) if place not in places]
    for number in end:
        seen = forecast(
            queue, number, now=0.0, free_at=1.0, model=model, max_batch_size=limit, length_bucketing=bucketing
        )
        assert abs(seen.expected_at - end[number]) < 1e-9
        assert seen.safe_at > seen.expected_at


def _took(batch: list[Pending]) -> float:
    return MODEL.batch_s([item.cost_bytes for item in batch])


@given(ITEMS, st.integers(1, 16))
def test_nobody_is_late_because_of_one_who_joined(items: list[tuple[int, float | None, int, bool]], limit: int) -> None:
    rest, at, promised, end = queue_of(*(pending(n, p, d, c) for n, (p, d, c, _) in enumerate(items))), 0.0, set(), {}
    while rest:
        places = next_batch(rest, at, MODEL, limit)
        batch = [rest[place] for place in places]
        if len(batch) > 1:
            busy = _took(batch)
            safe_at = at + busy + MODEL.margin_s(busy)
            assert all(item.deadline_at is None or safe_at <= item.deadline_at + 1e-9 for item in batch)
            promised |= {rest[place].request_id for place in range(places[-1]) if place not in places}
        at += _took(batch)
        end.update((item.request_id, at) for item in batch)
        rest = [item for place, item in enumerate(rest) if place not in places]
    for number in promised:  # passed over: somebody from behind ran before them
        deadline_at = items[number][1]
        assert deadline_at is None or end[number] <= deadline_at + 1e-9


@given(ITEMS, st.integers(1, 16))
def test_a_joiner_costs_hardly_more_than_it_would_alone(
    items: list[tuple[int, float | None, int, bool]], limit: int
) -> None:
    queue = queue_of(*(pending(n, p, d, c) for n, (p, d, c, _) in enumerate(items)))
    batch = [queue[place] for place in next_batch(queue, 0.0, MODEL, limit)]
    assert _took(batch) <= sum(_took([item]) for item in batch) * (1.0 + TOLERANCE) + 1e-9
    assert batch == [queue[place] for place in next_batch(list(queue), 0.0, MODEL, limit)]


def test_the_next_batch_goes_ahead_where_both_are_short_and_it_is_no_remainder() -> None:
    assert goes_ahead(0.002, 0.003, 0.0003) and goes_ahead(0.02, 0.003, 0.0003)
    assert not goes_ahead(0.001, 0.003, 0.0003)
    assert goes_ahead(0.001, 0.003, 0.0003, grows=False)  # one by one, waiting for company is waiting for nothing
    assert not goes_ahead(0.02, 0.02, 0.0003)
    assert goes_ahead(0.02, 0.02, 0.01)  # on this machine it would stand still half as long again


def test_restarts_are_at_once_twice_then_pause_longer_and_longer() -> None:
    plan, pauses = RestartPlan(), []
    for _ in range(12):
        plan = plan.crashed()
        pauses.append(plan.pause_s)
    assert pauses[:5] == [0.0, 0.0, 0.5, 1.0, 2.0]
    assert pauses[-1] == 30.0
    assert plan.served().crashes == 0
