"""Requests that a worker has and doesn't answer in time: the cloud is asked as well while it can make it, and nobody
waits for ever.

A batch can't be taken back from a worker, and one that hangs is ended only when its watchdog says so. Its clients
needn't wait for that: whoever has a deadline hears a little after it at the latest, whatever the worker does.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from device_agent.judge import Judge
from device_agent.place import Place
from device_agent.router import There
from device_agent.ticket import Running, Ticket
from device_agent.values import Cloud, Reason, Shed

GRACE_S = 0.04  # behind a deadline: an answer that is nearly in time is still of use
_RETRY_S = 0.05


def overrun(now: float, deadline_at: float, end_at: float, there: There | None) -> Cloud | Shed | None:
    """What becomes of one whose batch is expected to end at ``end_at``: None while it is worth waiting for."""
    if now >= deadline_at + GRACE_S:
        return Shed(Reason.DEADLINE_PASSED, _RETRY_S)
    if there is None or end_at <= deadline_at or now + there.expected_s > deadline_at:
        return None
    return Cloud(Reason.PREDICTED_LATE, there.endpoint) if now + there.safe_s >= deadline_at else None


def look_at(now: float, deadline_at: float, until: float, there: There | None) -> float:
    """When :func:`overrun` says something else at the earliest: at the last moment that the cloud is safe, or when the
    batch should have ended, ``until``, if that is later; at last behind the deadline."""
    chances = () if there is None else (deadline_at - there.safe_s, until)
    return min((at for at in chances if now <= at < deadline_at), default=deadline_at + GRACE_S)


class Overrun:
    """One timer for all that the workers of a model have. Told of each batch that begins."""

    def __init__(
        self,
        places: Sequence[Place],
        judge: Judge,
        clock: Callable[[], float],
        ask_beside: Callable[[Ticket, Cloud], None],
    ) -> None:
        self._ask_beside = ask_beside
        self._places = places
        self._judge = judge
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, place: Place, batch: Running, now: float) -> None:
        """Look when the first of them may be late."""
        deadlines = [ticket.request.deadline_at for ticket in batch.tickets if ticket.request.deadline_at is not None]
        if deadlines:
            self._at(look_at(now, min(deadlines), _until(place, batch), self._judge.soonest(now)), now)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _at(self, at: float, now: float) -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + at - now + 0.0002
        if self._timer is None or self._timer.when() > when:
            self.close()
            self._timer = loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer, now = None, self._clock()
        for place in self._places:
            running_until = _until(place, place.running)
            for batch in (place.running, place.ahead):
                # Of one that should have ended nobody knows when it will.
                end_at = _until(place, batch) if now <= running_until else math.inf
                for ticket in tuple(batch.tickets):
                    self._decide(ticket, batch, end_at, now)

    def _decide(self, ticket: Ticket, batch: Running, end_at: float, now: float) -> None:
        deadline_at = ticket.request.deadline_at
        if deadline_at is None or ticket.held_by is not batch or not ticket.waits:
            return
        there = None if ticket.asking else self._judge.there(ticket, now)
        decision = overrun(now, deadline_at, end_at, there)
        if isinstance(decision, Shed):
            ticket.resolve(decision)
            return
        if decision is not None:
            self._ask_beside(ticket, decision)
            there = None
        self._at(look_at(now, deadline_at, end_at, there), now)


def _until(place: Place, batch: Running) -> float:
    """When it is expected to have run."""
    running = place.running
    return running.since + running.expected_s + (0.0 if batch is running else batch.expected_s)
