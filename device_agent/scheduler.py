"""The queue of one model, which batch runs next, and when a request would be answered: pure.

Natural batching: a batch is what waited while the worker was busy, at most ``max_batch_size``, and never so much that
a member would miss its deadline because of the others (everyone in a batch is answered when all of it is done).

Order: priority, then arrival. Priority 1 is the highest; 0 is Triton's "default priority", which here is the lowest,
so that a client which names a priority goes before those that don't. A request of higher priority may overtake one
that was promised to be in time; the overtaken is judged again before execution and goes to the cloud while that can
still make it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import msgspec

from device_agent.service_time import ServiceTime

_DEFAULT_RANK = 1 << 32


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling needs to know of a waiting request. ``alone``: it already died with a worker once."""

    request_id: int
    priority: int
    deadline_at: float | None
    cost_bytes: int
    alone: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """The queue's sort key: request ids rise with arrival."""
        return (self.priority if self.priority > 0 else _DEFAULT_RANK, self.request_id)


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When a request would be answered: the expected moment, and one that is safe to promise."""

    expected_at: float
    safe_at: float
    idle: bool  # the worker is free and nobody waits


def insert(queue: list[Pending], item: Pending) -> None:
    """Put a request at its place."""
    bisect.insort(queue, item, key=lambda pending: pending.order)


def next_batch(queue: Sequence[Pending], start_at: float, model: ServiceTime, max_batch_size: int) -> int:
    """How many from the head of the queue run together from ``start_at``; 0 only for an empty queue."""
    if not queue:
        return 0
    if queue[0].alone:
        return 1
    longest = 0.0
    earliest: float | None = None
    for count, item in enumerate(queue[:max_batch_size], start=1):
        if item.alone:
            return count - 1
        longest = max(longest, model.units(item.cost_bytes))
        busy = model.busy_s(count * longest)
        deadlines = [at for at in (earliest, item.deadline_at) if at is not None]
        tightest = min(deadlines, default=None)
        if count > 1 and tightest is not None and start_at + busy + model.margin_s(busy) > tightest:
            # The longer batch breaks a promise. If the shorter one would break it as well, staying short helps
            # no one in it, but those behind still win time.
            return count - 1
        earliest = tightest
    return min(len(queue), max_batch_size)


def forecast(
    queue: Sequence[Pending],
    request_id: int,
    *,
    now: float,
    free_at: float,
    model: ServiceTime,
    max_batch_size: int,
) -> Forecast:
    """When the request of that id, which is in ``queue``, would be answered if nothing else came.

    ``free_at`` is when the worker is expected to take the next batch: the end of the running one, or the end of a
    restart. A running batch that overran its prediction is expected to end now.
    """
    at = max(now, free_at)
    waiting_s = at - now
    busy_total = waiting_s
    head = 0
    while head < len(queue):
        size = next_batch(queue[head : head + max_batch_size], at, model, max_batch_size)
        batch = queue[head : head + size]
        busy = model.busy_s(model.batch_units([item.cost_bytes for item in batch]))
        at += busy
        busy_total += busy
        if any(item.request_id == request_id for item in batch):
            break
        head += size
    return Forecast(expected_at=at, safe_at=at + model.margin_s(busy_total), idle=free_at <= now and len(queue) == 1)
