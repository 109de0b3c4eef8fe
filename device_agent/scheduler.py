"""The queue of one model, which batch runs next, and when a request would be answered: pure.

Natural batching: a batch is what waited while the worker was busy, at most ``max_batch_size``, and never so much that
a member would miss its deadline because of the others (everyone in a batch is answered when all of it is done).

Order: priority, then deadline, the earliest first. Who has none comes after those that have one, by turns of the
tenants, but while both kinds wait every fourth is one without, so that neither kind can shut out the other. Priority 1
is the highest; 0 is Triton's "default priority", which here is the lowest, so that a client which names a priority goes
before those that don't. Nobody is let in who would make one late that waits already, but for one of higher priority: it
may overtake one that was promised to be in time, and the overtaken is judged again before execution and goes to the
cloud while that can still make it.

A model that runs one request at a time is given several in a row, as long as that takes a few milliseconds: what a
quick one takes is no more than the way to the worker and back, and nobody is kept waiting where it is slow.

Length bucketing: every row of a batch is padded to the longest, so a short request beside a long one costs as much as
a long one. Who stands first always runs; of those behind, in order, joins whom it is cheaper to take along than to run
alone, by what was learnt. Whoever is passed over stands nearer to the front afterwards, so nobody is for ever, and is
passed over by nobody of a lower priority, nor by anybody who could make it late.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import msgspec

from device_agent.fairness import NO_RESERVE, Reserve
from device_agent.service_time import CUT_SPREADS, ServiceTime

PATIENT_EVERY = 4  # of a mixed queue, one in so many has no deadline
_DEFAULT_RANK = 1 << 32
LOOKAHEAD = 2  # batches: so far behind the first those are looked for who fit it
TOLERANCE = 0.05  # so much more than alone a joiner may cost: lengths are estimates, and a batch more has a price too
AHEAD_S = 0.005  # batches up to this length: the way to the worker and back takes up to half a millisecond
AHEAD_GAPS = 3.0  # and up to so many such ways as learnt here: on a busy machine they take longer
QUICK_S = 0.003  # no request waits longer than that, or than one way, for one that it only travels with


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling needs to know of a waiting request. ``priority`` is never negative. ``alone``: it already died
    with a worker once."""

    request_id: int
    priority: int
    deadline_at: float | None
    cost_bytes: int
    alone: bool = False
    tenant: str = ""
    turn: float | None = None  # among those without a deadline, see fairness.Turns; kept by one that waits again

    @property
    def rank(self) -> int:
        """Who has a lower one goes first."""
        return self.priority or _DEFAULT_RANK

    @property
    def order(self) -> tuple[int, float, float, int]:
        """The queue's sort key: request ids rise with arrival."""
        return (
            self.priority or _DEFAULT_RANK,
            math.inf if self.deadline_at is None else self.deadline_at,
            self.turn or 0.0,
            self.request_id,
        )


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When a request would be answered: the expected moment, and one that is safe to promise."""

    expected_at: float
    safe_at: float
    idle: bool  # the worker is free and nobody waits
    delays: bool = False  # one that waits already would no longer be safe because of it


def insert(queue: list[Pending], item: Pending) -> None:
    """Put a request at its place; mostly that is the end."""
    if not queue or queue[-1].order <= item.order:
        queue.append(item)
        return
    bisect.insort(queue, item, key=lambda pending: pending.order)


def interleaved(queue: Sequence[Pending], hurried: int) -> Sequence[Pending]:
    """The order in which a sorted queue runs. ``hurried``: how many with a deadline ran since one without."""
    if len({item.deadline_at is None for item in queue}) < 2:
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
        room_s = model.room_s(first.deadline_at - start_at, CUT_SPREADS)
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
        left_s = math.inf if item.deadline_at is None else model.room_s(item.deadline_at - start_at, CUT_SPREADS)
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
            room_s = min(room_s, model.room_s(item.deadline_at - start_at, CUT_SPREADS))
        if place and busy > min(room_s, max(QUICK_S, model.overhead_s)):
            return list(range(place))
    return list(range(len(queue)))


def goes_ahead(busy_s: float, running_s: float, overhead_s: float, *, grows: bool = True) -> bool:
    """Whether the worker is given its next batch, of ``busy_s``, while it still has one of ``running_s``, where the way
    to the worker and back takes ``overhead_s``.

    The gap between two short batches is worth avoiding; whoever comes during a long one should still be able to join
    or overtake. Where a batch ``grows`` cheaply, one much smaller than that which runs gains more by that; where
    requests run one by one, it gains nothing.
    """
    short = running_s <= max(AHEAD_S, AHEAD_GAPS * overhead_s)
    return short and (not grows or 2.0 * busy_s >= running_s)


def forecast(
    queue: Sequence[Pending],
    request_id: int,
    *,
    now: float,
    free_at: float,
    model: ServiceTime,
    max_batch_size: int,
    others_free_at: Sequence[float] = (),
    newcomer: bool = False,
    reserve: Reserve = NO_RESERVE,
    length_bucketing: bool = True,
) -> Forecast:
    """When the request of that id, which is in ``queue``, would be answered if nothing else came.

    ``free_at`` is when the worker is expected to take the next batch: the end of the running one, or the end of a
    restart; ``others_free_at`` is that of the model's other workers: whoever is free first takes it. A running batch
    that overran its prediction is expected to end now. Only of a ``newcomer`` that would be in time itself it is told
    whether it ``delays`` another. ``reserve`` is what it must leave, on top of the margin, for those that come after
    it.
    """
    start_at, others_at = max(now, free_at), []
    if others_free_at:
        start_at, *others_at = sorted([start_at, *[max(now, at) for at in others_free_at]])
    expected_at = safe_at = start_at
    own: Pending | None = None
    caution = model.caution_at(now)
    unsafe: list[tuple[Pending, float]] = []
    batches = partial(
        _batches,
        start_at=start_at,
        others_at=others_at,
        model=model,
        max_batch_size=max_batch_size,
        length_bucketing=length_bucketing,
    )
    for end_at, batch in batches(queue):
        margin_s = caution * model.margin_s(end_at - now) + reserve.of(end_at - now)
        if own is None:
            own = next((member for member in batch if member.request_id == request_id), None)
            if own is None:
                continue
            expected_at, safe_at = end_at, end_at + margin_s
            if not newcomer or own.deadline_at is None or safe_at > own.deadline_at:
                break
        unsafe += [(member, end_at) for member in batch if _too_late(member, own, end_at + margin_s)]
    delays = False
    if unsafe:
        others = [item for item in queue if item.request_id != request_id]
        delays = _ended_sooner(unsafe, batches(others))
    idle = start_at <= now and len(queue) == 1
    return Forecast(expected_at=expected_at, safe_at=safe_at, idle=idle, delays=delays)


def _batches(
    queue: Sequence[Pending],
    *,
    start_at: float,
    others_at: Sequence[float],
    model: ServiceTime,
    max_batch_size: int,
    length_bucketing: bool,
) -> Iterator[tuple[float, Sequence[Pending]]]:
    """The batches of a queue that nobody else joins, as they begin, each with its end. ``start_at``: when a worker is
    free for the first; ``others_at``: when each other one is, none before, the earliest first."""
    at, waiting, others = start_at, list(queue), list(others_at)
    while waiting:
        places = next_batch(waiting, at, model, max_batch_size, length_bucketing=length_bucketing)
        batch = [waiting[place] for place in places]
        end_at = at + model.batch_s([item.cost_bytes for item in batch])
        yield end_at, batch
        at = heapq.heappushpop(others, end_at) if others else end_at
        for place in reversed(places):
            del waiting[place]


def _too_late(member: Pending, newcomer: Pending, safe_at: float) -> bool:
    """Whether one that the newcomer must not delay isn't safe: all but those that it may overtake."""
    overtaken = member is newcomer or member.rank > newcomer.rank
    return not overtaken and member.deadline_at is not None and safe_at > member.deadline_at


def _ended_sooner(unsafe: Sequence[tuple[Pending, float]], without: Iterable[tuple[float, Sequence[Pending]]]) -> bool:
    """Whether any of these would end sooner ``without`` the newcomer. One that is late anyway counts as well: whoever
    overtakes those that a stall has made late makes the next ones late too, and nobody ever catches up."""
    before = {member.request_id: end_at for end_at, batch in without for member in batch}
    return any(end_at > before[member.request_id] + 1e-9 for member, end_at in unsafe)
