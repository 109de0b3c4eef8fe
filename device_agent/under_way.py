"""The requests that one endpoint hasn't answered yet, and what they tell of it: pure.

A breaker counts failures, and the first failure of an endpoint that falls silent is known when the first deadline has
passed. Whoever is sent there until then is lost as well. So while one is overdue, and nothing that was sent after it
has an answer, no more are under way there than the breaker forgives.
"""

from __future__ import annotations

import itertools

OVERDUE = 2.0  # times the time that answers are safe to take
OVERDUE_LEAST_S = 0.01  # a busy device may be that late with reading an answer


class UnderWay:
    """Told of each request when it is sent and when it has ended. Times in seconds, by whatever clock."""

    def __init__(self) -> None:
        self._overdue_at: dict[int, float] = {}
        self._numbers = itertools.count()
        self._answered = -1  # the latest one that was

    def __len__(self) -> int:
        return len(self._overdue_at)

    def sent(self, now: float, safe_s: float) -> int:
        """One more, whose answer should be there within ``safe_s``; returns its number."""
        number = next(self._numbers)
        self._overdue_at[number] = now + max(OVERDUE * safe_s, OVERDUE_LEAST_S)
        return number

    def ended(self, number: int, *, answered: bool) -> None:
        """It has its answer, or will have none."""
        del self._overdue_at[number]
        if answered:
            self._answered = max(self._answered, number)

    def silent(self, now: float) -> bool:
        """Whether the endpoint seems to have stopped answering."""
        return any(now > at and number > self._answered for number, at in self._overdue_at.items())
