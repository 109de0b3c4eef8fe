"""The requests that wait for one model: in the scheduler's order, each with its ticket."""

from __future__ import annotations

from collections.abc import Sequence

from device_agent import scheduler
from device_agent.scheduler import Pending
from device_agent.ticket import Ticket


class TicketQueue:
    """Tickets that wait. A ticket's ``pending`` may change only while it isn't in here."""

    def __init__(self) -> None:
        self._order: list[Pending] = []
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket.pending.request_id in self._tickets

    @property
    def order(self) -> Sequence[Pending]:
        """What the scheduler sees: who runs first stands first."""
        return self._order

    def with_one_more(self, pending: Pending) -> Sequence[Pending]:
        """The order as it would be if that one waited too."""
        order = list(self._order)
        scheduler.insert(order, pending)
        return order

    def ticket(self, pending: Pending) -> Ticket:
        """The ticket of one that waits."""
        return self._tickets[pending.request_id]

    def tickets(self) -> list[Ticket]:
        """All of them, as they came."""
        return list(self._tickets.values())

    def put(self, ticket: Ticket) -> None:
        """Let it wait at its place."""
        scheduler.insert(self._order, ticket.pending)
        self._tickets[ticket.pending.request_id] = ticket

    def drop(self, ticket: Ticket) -> None:
        """It waits no longer; nothing happens when it didn't."""
        if self._tickets.pop(ticket.pending.request_id, None) is not None:
            self._order.remove(ticket.pending)

    def clear(self) -> None:
        """Nobody waits."""
        self._order.clear()
        self._tickets.clear()
