"""The queue of one model, which batch runs next, and when a request would be answered: pure.

Natural batching: a batch is what waited while the worker was busy, at most ``max_batch_size``, and never so much that
a member would miss its deadline because of the others (everyone in a batch is answered when all of it is done).

Order: priority, then arrival. Priority 1 is the highest; 0 is Triton's "default priority", which here is the lowest,
so that a client which names a priority goes before those that don't. A request of higher priority may overtake one
that was promised to be in time; the overtaken is judged again before execution and goes to the cloud while that can
still make it.

A model that runs one request at a time is given several in a row, as long as that takes a few milliseconds: what a
quick one takes is no more than the way to the worker and back, and nobody is kept waiting where it is slow.

Length bucketing: every row of a batch is padded to the longest, so a short request beside a long one costs as much as
a long one. Who stands first always runs; of those behind, in order, joins whom it is cheaper to take along than to run
alone, by what was learnt. Whoever is passed over stands nearer to the front afterwards, so nobody is for ever, and is
passed over by nobody of a lower priority, nor by anybody who could make it late.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import msgspec

from device_agent.service_time import ServiceTime

_DEFAULT_RANK = 1 << 32
LOOKAHEAD = 2  # batches: so far behind the first those are looked for who fit it
TOLERANCE = 0.05  # so much more than alone a joiner may cost: lengths are estimates, and a batch more has a price too
AHEAD_S = 0.005  # batches up to this length: the way to the worker and back takes up to half a millisecond
QUICK_S = 0.003  # no request waits longer than that for one that it only travels with


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling needs to know of a waiting request. ``alone``: it already died with a worker once."""

    request_id: int
    priority: int
    deadline_at: float | None
    cost_bytes: int
    alone: bool = False

    @property
    def rank(self) -> int:
        """Lower goes first."""
        return self.priority if self.priority > 0 else _DEFAULT_RANK

    @property
    def order(self) -> tuple[int, int]:
        """The queue's sort key: request ids rise with arrival."""
        return self.rank, self.request_id


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When a request would be answered: the expected moment, and one that is safe to promise."""

    expected_at: float
    safe_at: float
    idle: bool  # the worker is free and nobody waits


def insert(queue: list[Pending], item: Pending) -> None:
    """Put a request at its place."""
    bisect.insort(queue, item, key=lambda pending: pending.order)


def next_batch(
    queue: Sequence[Pending], start_at: float, model: ServiceTime, max_batch_size: int, *, length_bucketing: bool = True
) -> list[int]:
    """Who of the queue run together from ``start_at``: their places, rising, the first always among them; empty only
    for an empty queue. Without ``length_bucketing`` those who stand first, whatever their lengths."""
    if not queue:
        return []
    chosen = [0]
    first = queue[0]
    if first.alone:
        return chosen
    if model.one_by_one:
        return _in_a_row(queue, start_at, model)
    base_s, unit_s, unit_bytes = model.base_s, model.per_unit_s, model.bytes_per_unit  # asked for each who waits
    longest = model.units(first.cost_bytes)
    busy = model.busy_s(longest)
    room_s = math.inf  # no longer may the batch take
    if first.deadline_at is not None:
        room_s = model.room_s(first.deadline_at - start_at)
    passed: Pending | None = None  # one who was passed over
    passed_s = 0.0  # what all of those take at most
    for place in range(1, min(len(queue), LOOKAHEAD * max_batch_size if length_bucketing else max_batch_size)):
        item = queue[place]
        if len(chosen) == max_batch_size or busy > room_s:
            break
        if item.alone or (passed is not None and item.priority != passed.priority and item.rank != passed.rank):
            break
        units = max(item.cost_bytes / unit_bytes, 1.0)
        padded = max(longest, units)
        together = base_s + unit_s * (len(chosen) + 1) * padded
        alone = (base_s + unit_s * units) * (1.0 + TOLERANCE)
        left_s = math.inf if item.deadline_at is None else model.room_s(item.deadline_at - start_at)
        in_time = together <= room_s and together <= left_s
        if in_time and (together <= busy + alone or not length_bucketing):
            chosen.append(place)
            longest, busy, room_s = padded, together, min(room_s, left_s)
        elif length_bucketing:
            passed = item
            passed_s += alone
            room_s = min(room_s, left_s - passed_s)
        else:
            # If the shorter batch would break the promise as well, staying short helps no one in it, but those behind
            # still win time.
            break
    return chosen


def _in_a_row(queue: Sequence[Pending], start_at: float, model: ServiceTime) -> list[int]:
    """How many, in order, go to the worker together though it runs one after the other."""
    room_s = math.inf
    busy = 0.0
    for place, item in enumerate(queue):
        if item.alone:
            return list(range(place))
        busy += model.busy_s(model.units(item.cost_bytes))
        if item.deadline_at is not None:
            room_s = min(room_s, model.room_s(item.deadline_at - start_at))
        if place and busy > min(room_s, QUICK_S):
            return list(range(place))
    return list(range(len(queue)))


def goes_ahead(busy_s: float, running_s: float) -> bool:
    """Whether the worker is given its next batch, of ``busy_s``, while it still has one of ``running_s``.

    The gap between two short batches is worth avoiding; whoever comes during a long one should still be able to join
    or overtake, and a batch much smaller than the one that runs gains more by growing.
    """
    return running_s <= AHEAD_S and 2.0 * busy_s >= running_s


def forecast(
    queue: Sequence[Pending],
    request_id: int,
    *,
    now: float,
    free_at: float,
    model: ServiceTime,
    max_batch_size: int,
    length_bucketing: bool = True,
) -> Forecast:
    """When the request of that id, which is in ``queue``, would be answered if nothing else came.

    ``free_at`` is when the worker is expected to take the next batch: the end of the running one, or the end of a
    restart. A running batch that overran its prediction is expected to end now.
    """
    at = max(now, free_at)
    busy_total = at - now
    waiting = list(queue)
    while waiting:
        places = next_batch(waiting, at, model, max_batch_size, length_bucketing=length_bucketing)
        batch = [waiting[place] for place in places]
        busy = model.batch_s([item.cost_bytes for item in batch])
        at += busy
        busy_total += busy
        if any(item.request_id == request_id for item in batch):
            break
        for place in reversed(places):
            del waiting[place]
    return Forecast(expected_at=at, safe_at=at + model.margin_s(busy_total), idle=free_at <= now and len(queue) == 1)
