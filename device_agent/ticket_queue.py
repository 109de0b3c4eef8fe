"""The requests that wait for one model: in the order in which they run, each with its ticket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from device_agent import scheduler
from device_agent.fairness import Turns
from device_agent.scheduler import Pending
from device_agent.ticket import Ticket


class TicketQueue:
    """Tickets that wait. A ticket's ``pending`` may change only while it isn't in here.

    ``weights`` are the tenants', 1 of one that isn't named; ``cost_s`` tells how long a request would take alone.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, cost_s: Callable[[Pending], float] = lambda pending: 1.0
    ) -> None:
        self._sorted: list[Pending] = []
        self._order: Sequence[Pending] | None = None  # as a mixed queue runs; None: to be made
        self._tickets: dict[int, Ticket] = {}
        self._turns = Turns()
        self._hurried = 0  # with a deadline, taken since one without
        self._weights = weights or {}
        self._cost_s = cost_s
        self.patient = 0  # how many have no deadline
        self.held: Counter[str] = Counter()  # how many, by tenant
        self.held_patiently: Counter[str] = Counter()  # of these, without a deadline

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket.pending.request_id in self._tickets

    @property
    def order(self) -> Sequence[Pending]:
        """What the scheduler sees: who runs first stands first."""
        if self.patient in (0, len(self._sorted)):
            return self._sorted
        if self._order is None:
            self._order = scheduler.interleaved(self._sorted, self._hurried)
        return self._order

    def with_one_more(self, pending: Pending) -> Sequence[Pending]:
        """The order as it would be if that one waited too."""
        order = list(self._sorted)
        scheduler.insert(order, self._placed(pending)[1])
        return scheduler.interleaved(order, self._hurried)

    def ticket(self, pending: Pending) -> Ticket:
        """The ticket of one that waits."""
        return self._tickets[pending.request_id]

    def tickets(self) -> list[Ticket]:
        """All of them, as they came."""
        return list(self._tickets.values())

    def put(self, ticket: Ticket) -> None:
        """Let it wait at its place."""
        self._turns, pending = self._placed(ticket.pending)
        ticket.pending = pending
        scheduler.insert(self._sorted, pending)
        self._tickets[pending.request_id] = ticket
        self._count(pending, 1)

    def drop(self, ticket: Ticket) -> None:
        """It waits no longer; nothing happens when it didn't."""
        pending = ticket.pending
        if self._tickets.pop(pending.request_id, None) is not None:
            self._sorted.remove(pending)
            self._count(pending, -1)
            if not self._sorted and self._weights:
                self._turns = Turns()

    def take(self, ticket: Ticket) -> None:
        """It leaves for the worker."""
        if ticket.pending.deadline_at is None:
            self._hurried = 0
            if ticket.pending.turn is not None:
                self._turns = self._turns.served(ticket.pending.turn)
        else:
            self._hurried += 1
        self.drop(ticket)

    def clear(self) -> None:
        """Nobody waits."""
        for ticket in self.tickets():
            self.drop(ticket)

    def _placed(self, pending: Pending) -> tuple[Turns, Pending]:
        """Its turn; one that waits again keeps the one it had, or is next if it never waited. Without tenants nobody
        has any."""
        if pending.deadline_at is not None or pending.turn is not None or not self._weights:
            return self._turns, pending
        if pending.alone:
            return self._turns, msgspec.structs.replace(pending, turn=self._turns.now)
        cost = self._cost_s(pending) / self._weights.get(pending.tenant, 1.0)
        turns, turn = self._turns.join(pending.tenant, cost)
        return turns, msgspec.structs.replace(pending, turn=turn)

    def _count(self, pending: Pending, change: int) -> None:
        self._order = None
        patient = pending.deadline_at is None
        self.patient += change if patient else 0
        if self._weights:
            self.held[pending.tenant] += change
            self.held_patiently[pending.tenant] += change if patient else 0
