"""Judges the requests that wait for one model again when that may change something."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from device_agent.judge import Judge
from device_agent.ticket_queue import TicketQueue
from device_agent.values import Local


class Review:
    """One timer per model, for the first moment that any waiting request asks for."""

    def __init__(self, queue: TicketQueue, judge: Judge, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._judge = judge
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def plan(self) -> None:
        """Wake up when a waiting request has its last chance in the cloud, and when its deadline passes."""
        self.cancel()
        now = self._clock()
        at = self._judge.next_review_at(now)
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(at - now + 0.0002, self.run)

    def run(self) -> None:
        """Judge all that have a deadline; who shouldn't wait here any longer is told so."""
        self.cancel()  # it may come out of turn, when a worker was lost
        for pending in [pending for pending in self._queue.order if pending.deadline_at is not None]:
            ticket = self._queue.ticket(pending)
            decision = self._judge.decide(ticket)
            if not isinstance(decision, Local):
                self._queue.drop(ticket)
                ticket.resolve(decision)
        self.plan()

    def cancel(self) -> None:
        """No more, until the next plan."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
