"""Requests that a worker has and doesn't answer in time: the cloud has them while it can, and nobody waits for ever.

A batch can't be taken back from a worker, and one that hangs is ended only when its watchdog says so. Its clients
needn't wait for that: whoever has a deadline hears a little after it at the latest, whatever the worker does.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence

from device_agent.judge import Judge
from device_agent.place import Place
from device_agent.router import There
from device_agent.ticket import Ticket
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


def look_at(now: float, deadline_at: float, there: There | None) -> float:
    """When :func:`overrun` says something else at the earliest."""
    chance_at = deadline_at + GRACE_S if there is None else deadline_at - there.safe_s
    return chance_at if chance_at > now else deadline_at + GRACE_S


class Overrun:
    """One timer for all that the workers of a model have. Told of each batch that begins."""

    def __init__(self, places: Sequence[Place], judge: Judge, clock: Callable[[], float]) -> None:
        self._places = places
        self._judge = judge
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, batch: Iterable[Ticket], now: float) -> None:
        """Look when the first of them may be late."""
        deadlines = [ticket.request.deadline_at for ticket in batch if ticket.request.deadline_at is not None]
        if deadlines:
            self._at(look_at(now, min(deadlines), self._judge.soonest(now)), now)

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
            running_until = place.running.since + place.running.expected_s
            # Of one that should have ended nobody knows when it will.
            end_at = running_until + place.ahead.expected_s if now <= running_until else math.inf
            for ticket in (*place.running.tickets, *place.ahead.tickets):
                deadline_at = ticket.request.deadline_at
                if deadline_at is None or not ticket.waits:
                    continue
                there = self._judge.there(ticket, now)
                decision = overrun(now, deadline_at, end_at, there)
                if decision is None:
                    self._at(look_at(now, deadline_at, there), now)
                else:
                    ticket.resolve(decision)
