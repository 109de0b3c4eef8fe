"""The forecast for several workers: as it was for one, and never later for more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from device_agent.scheduler import Pending, forecast, insert, next_batch
from device_agent.service_time import ServiceTime

MODEL = ServiceTime.prior(0.01, 32)  # 10 ms for 32 tokens, 160 bytes
ITEMS = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.floats(0, 0.4), st.integers(0, 2000), st.booleans()),
    min_size=1,
    max_size=25,
)
FREE = st.lists(st.floats(0, 0.2), min_size=1, max_size=5)


def queue_of(items: Sequence[tuple[int, float | None, int, bool]]) -> list[Pending]:
    queue: list[Pending] = []
    for number, (priority, deadline_at, cost, alone) in enumerate(items):
        one = Pending(request_id=number, priority=priority, deadline_at=deadline_at, cost_bytes=cost, alone=alone)
        insert(queue, one)
    return queue


def as_they_run(queue: Sequence[Pending], free: Sequence[float], limit: int) -> Iterator[tuple[float, list[Pending]]]:
    """The batches of workers that are free at these times: each is taken by whoever is free first."""
    waiting, free_at = list(queue), list(free)
    while waiting:
        first = free_at.index(min(free_at))
        places = next_batch(waiting, free_at[first], MODEL, limit)
        batch = [waiting[place] for place in places]
        free_at[first] += MODEL.batch_s([item.cost_bytes for item in batch])
        yield free_at[first], batch
        waiting = [item for place, item in enumerate(waiting) if place not in places]


@given(ITEMS, FREE.map(lambda free: free[:1]) | FREE, st.integers(1, 8))
def test_whoever_is_free_first_takes_the_next_batch(
    items: list[tuple[int, float | None, int, bool]], free: list[float], limit: int
) -> None:
    """With one worker: each batch begins when the one before it ends."""
    queue, (first, *others) = queue_of(items), free
    for end_at, batch in as_they_run(queue, free, limit):
        for item in batch:
            seen = forecast(
                queue, item.request_id, now=0.0, free_at=first, others_free_at=others, model=MODEL, max_batch_size=limit
            )
            assert (seen.expected_at, seen.safe_at) == (end_at, end_at + MODEL.margin_s(end_at))


@given(ITEMS, FREE, st.integers(1, 8))
def test_more_workers_never_answer_later(
    items: list[tuple[int, float | None, int, bool]], free: list[float], limit: int
) -> None:
    """Of requests that come together; who has a deadline takes others along only as far as it is in time anyway."""
    queue = queue_of([(priority, None, cost, alone) for priority, _, cost, alone in items])
    for item in queue:
        ends = [at(queue, item, free[:count], limit) for count in range(1, len(free) + 1)]
        assert all(more <= fewer + 1e-12 for fewer, more in pairwise(ends))


def at(queue: Sequence[Pending], item: Pending, free: Sequence[float], limit: int) -> float:
    first, *others = free
    seen = forecast(
        queue, item.request_id, now=0.0, free_at=first, others_free_at=others, model=MODEL, max_batch_size=limit
    )
    return seen.expected_at


@given(ITEMS, FREE)
def test_nor_do_requests_with_deadlines_that_run_one_by_one(
    items: list[tuple[int, float | None, int, bool]], free: list[float]
) -> None:
    queue = queue_of(items)
    for item in queue:
        ends = [at(queue, item, free[:count], 1) for count in range(1, len(free) + 1)]
        assert all(more <= fewer + 1e-12 for fewer, more in pairwise(ends))


@given(ITEMS, FREE, st.integers(1, 8))
def test_whoever_is_in_time_with_fewer_workers_is_with_more(
    items: list[tuple[int, float | None, int, bool]], free: list[float], limit: int
) -> None:
    queue = queue_of(items)
    assume(any(item.deadline_at is not None for item in queue))
    for item in queue:
        if item.deadline_at is None:
            continue
        ends = [at(queue, item, free[:count], limit) for count in range(1, len(free) + 1)]
        for fewer, more in pairwise(ends):
            assert more <= max(fewer, item.deadline_at) + 1e-12
