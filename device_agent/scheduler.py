"""The queue of one model, which batch runs next, and when a request would be answered: pure.

Natural batching: a batch is what waited while the worker was busy, at most ``max_batch_size``, and never so much that
a member would miss its deadline because of the others (everyone in a batch is answered when all of it is done).

Order: priority, then deadline, the earliest first. Who has none comes after those that have one, by turns of the
tenants, but while both kinds wait every fourth is one without, so that neither kind can shut out the other. Priority 1
is the highest; 0 is Triton's "default priority", which here is the lowest, so that a client which names a priority goes
before those that don't. Nobody is let in who would make one late that waits already, but for one of higher priority: it
may overtake one that was promised to be in time, and the overtaken is judged again before execution and goes to the
cloud while that can still make it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec

from device_agent.fairness import NO_RESERVE, Reserve
from device_agent.service_time import CUT_SPREADS, ServiceTime

PATIENT_EVERY = 4  # of a mixed queue, one in so many has no deadline
_DEFAULT_RANK = 1 << 32


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling needs to know of a waiting request. ``alone``: it already died with a worker once."""

    request_id: int
    priority: int
    deadline_at: float | None
    cost_bytes: int
    alone: bool = False
    tenant: str = ""
    turn: float = 0.0  # among those without a deadline, see fairness.Turns

    @property
    def rank(self) -> int:
        """Who has a lower one goes first."""
        return self.priority if self.priority > 0 else _DEFAULT_RANK

    @property
    def order(self) -> tuple[int, float, float, int]:
        """The queue's sort key: request ids rise with arrival."""
        return (self.rank, math.inf if self.deadline_at is None else self.deadline_at, self.turn, self.request_id)


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When a request would be answered: the expected moment, and one that is safe to promise."""

    expected_at: float
    safe_at: float
    idle: bool  # the worker is free and nobody waits
    delays: bool = False  # one that waits already would no longer be safe because of it


def insert(queue: list[Pending], item: Pending) -> None:
    """Put a request at its place."""
    bisect.insort(queue, item, key=lambda pending: pending.order)


def interleaved(queue: Sequence[Pending], hurried: int) -> Sequence[Pending]:
    """The order in which a sorted queue runs. ``hurried``: how many with a deadline ran since one without."""
    patient = sum(item.deadline_at is None for item in queue)
    if patient in (0, len(queue)):
        return queue
    order: list[Pending] = []
    for _, group in itertools.groupby(queue, key=lambda item: item.rank):
        ranked = list(group)
        dated = [item for item in ranked if item.deadline_at is not None]
        others = ranked[len(dated) :]  # they are behind
        at = 0
        for item in others:
            before = max(PATIENT_EVERY - 1 - hurried, 0)
            order += [*dated[at : at + before], item]
            at, hurried = at + before, 0
        order += dated[at:]
        hurried += max(len(dated) - at, 0)
    return order


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
        if count > 1 and tightest is not None and start_at + busy + model.margin_s(busy, CUT_SPREADS) > tightest:
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
    newcomer: bool = False,
    reserve: Reserve = NO_RESERVE,
) -> Forecast:
    """When the request of that id, which is in ``queue``, would be answered if nothing else came.

    ``free_at`` is when the worker is expected to take the next batch: the end of the running one, or the end of a
    restart. A running batch that overran its prediction is expected to end now. Only of a ``newcomer`` that would be
    in time itself it is told whether it ``delays`` another. ``reserve`` is what it must leave, on top of the margin,
    for those that come after it.
    """
    start_at = max(now, free_at)
    expected_at = safe_at = start_at
    own: Pending | None = None
    unsafe: list[tuple[Pending, float]] = []
    for end_at, batch in _batches(queue, start_at, model, max_batch_size):
        margin_s = model.margin_s(end_at - now) + reserve.of(end_at - now)
        if own is None:
            own = next((member for member in batch if member.request_id == request_id), None)
            if own is None:
                continue
            expected_at, safe_at = end_at, end_at + margin_s
            if not newcomer or own.deadline_at is None or safe_at > own.deadline_at:
                break
        unsafe += [(member, end_at) for member in batch if _too_late(member, own, end_at + margin_s)]
    return Forecast(
        expected_at=expected_at,
        safe_at=safe_at,
        idle=free_at <= now and len(queue) == 1,
        delays=bool(unsafe) and _ended_sooner(unsafe, queue, request_id, start_at, model, max_batch_size),
    )


def _batches(
    queue: Sequence[Pending], start_at: float, model: ServiceTime, max_batch_size: int
) -> Iterator[tuple[float, Sequence[Pending]]]:
    """The batches of a queue that nobody else joins, each with its end."""
    at, head = start_at, 0
    while head < len(queue):
        size = next_batch(queue[head : head + max_batch_size], at, model, max_batch_size)
        batch = queue[head : head + size]
        at += model.busy_s(model.batch_units([item.cost_bytes for item in batch]))
        yield at, batch
        head += size


def _too_late(member: Pending, newcomer: Pending, safe_at: float) -> bool:
    """Whether one that the newcomer must not delay isn't safe: all but those that it may overtake."""
    overtaken = member is newcomer or member.rank > newcomer.rank
    return not overtaken and member.deadline_at is not None and safe_at > member.deadline_at


def _ended_sooner(
    unsafe: Sequence[tuple[Pending, float]],
    queue: Sequence[Pending],
    newcomer_id: int,
    start_at: float,
    model: ServiceTime,
    max_batch_size: int,
) -> bool:
    """Whether any of these would end sooner without the newcomer. One that is late anyway counts as well: whoever
    overtakes those that a stall has made late makes the next ones late too, and nobody ever catches up."""
    others = [item for item in queue if item.request_id != newcomer_id]
    before = {
        member.request_id: end_at
        for end_at, batch in _batches(others, start_at, model, max_batch_size)
        for member in batch
    }
    return any(end_at > before[member.request_id] + 1e-9 for member, end_at in unsafe)
