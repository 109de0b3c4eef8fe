"""What one endpoint's requests cost: counted since start, and taken from its budgets.

Bytes are those of bodies, requests as they are sent and answers as they come. Nobody knows an answer's length before
it is there, so a quarter more than the longest so far took is paid for it, and up to an eighth of what is left is set
aside (half for the first). It is read no further than that, and what it didn't need goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from aios_edge.telemetry import BudgetFigures, CloudSpending
from device_agent.budget_book import BudgetBook, Limit
from device_agent.cloud_health import Emit
from device_agent.cloud_settings import CloudEndpoint
from device_agent.http1 import MAX_RESPONSE_BYTES, AnswerSize

REQUESTS, BYTES, COST = "requests", "bytes", "cost"
ANSWER_SHARE = 8
FIRST_SHARE = 2
LEAST_ANSWER_BYTES = 256


@dataclass
class Posting:
    """One request that was paid for, with ``paid_bytes`` of an answer and ``aside_bytes`` more set aside. ``answer`` is
    what may be read, and what was."""

    spent_at: float
    paid_bytes: int = 0
    aside_bytes: int = 0
    answer: AnswerSize = field(default_factory=AnswerSize)


def limits_of(settings: CloudEndpoint) -> dict[str, Limit]:
    """The budgets an endpoint has, by name; those without a limit are missing."""
    limits = {
        REQUESTS: (settings.requests_per_day, 1.0),
        BYTES: (settings.bytes_per_day, 1.0),
        COST: (settings.cost_per_day, settings.cost_per_request),
    }
    return {name: Limit(per_day=per_day, unit=unit) for name, (per_day, unit) in limits.items() if per_day is not None}


class CloudAccount:
    """Asked before a request is sent, and told what came of it."""

    def __init__(self, settings: CloudEndpoint, book: BudgetBook, emit: Emit, clock: Callable[[], float]) -> None:
        self._name = settings.name
        self._cost = settings.cost_per_request
        self._book = book
        self._emit = emit
        self._clock = clock
        self._answer_room = LEAST_ANSWER_BYTES  # what the longest so far took, and a quarter more
        self._last_request = 0
        self._set_aside = 0  # for answers that are on their way
        self._told: set[str] = set()  # budgets whose end was told
        self._requests = self._sent_bytes = self._received_bytes = 0

    def affords(self, request_bytes: int) -> bool:
        """Whether a request of that size may be sent now."""
        return self._book.affords(self._name, self._price(request_bytes))

    async def pay(self, request_bytes: int) -> Posting | None:
        """Take it from the budgets; None when one of them is spent."""
        posting = Posting(spent_at=self._clock(), paid_bytes=self._answer_room)
        left = self._book.left(self._name, BYTES)
        if left is not None:
            parts = ANSWER_SHARE if self._received_bytes else FIRST_SHARE
            share = min(int(left - request_bytes) // parts, MAX_RESPONSE_BYTES)
            posting.aside_bytes = max(share - posting.paid_bytes, 0)
            posting.answer.limit_bytes = posting.paid_bytes + posting.aside_bytes
        self._book.set_aside(self._name, BYTES, posting.aside_bytes)
        paid = False
        try:
            paid = await self._book.spend(self._name, self._price(request_bytes))
        finally:
            if not paid:
                self._book.set_aside(self._name, BYTES, -posting.aside_bytes)
        if not paid:
            return None
        self._last_request = request_bytes
        self._set_aside += posting.answer.limit_bytes
        self._requests += 1
        self._sent_bytes += request_bytes
        return posting

    def settle(self, posting: Posting) -> None:
        """The answer is there, or there will be none."""
        answer = posting.answer
        self._set_aside -= answer.limit_bytes
        # One that was cut off is longer than what was read of it.
        room = answer.read_bytes * 2 if answer.cut_off else answer.read_bytes * 5 // 4
        self._answer_room = max(self._answer_room, room)
        self._received_bytes += answer.read_bytes
        self._book.set_aside(self._name, BYTES, -posting.aside_bytes)
        self._book.give_back(self._name, BYTES, posting.paid_bytes - answer.read_bytes, posting.spent_at)
        self._tell()

    def spent(self) -> CloudSpending:
        """Since start."""
        return CloudSpending(
            requests=self._requests,
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            cost=self._requests * self._cost,
        )

    def budgets(self) -> dict[str, BudgetFigures]:
        """Those that have a limit, now."""
        return self._book.status(self._name)

    def _price(self, request_bytes: int) -> dict[str, float]:
        return {REQUESTS: 1.0, BYTES: float(request_bytes + self._answer_room), COST: self._cost}

    def _tell(self) -> None:
        """Say once that a budget is spent, which is when a request like the last one can't be paid for."""
        for name, amount in self._price(self._last_request).items():
            still = amount - self._set_aside if name == BYTES else amount  # most of that comes back
            if self._book.affords(self._name, {name: still}):
                self._told.discard(name)
            elif name not in self._told:
                self._told.add(name)
                self._emit("budget_exhausted", endpoint=self._name, budget=name)
