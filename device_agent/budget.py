"""What may be spent in a day: a token bucket as a value, pure; the clock is passed in.

The bucket holds a day's worth of tokens, and all of them may be spent at once. A token comes back a day after it was
spent, at the end of that quarter of an hour. So in no 24 hours, wherever they begin, more is spent than ``per_day``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

DAY_S = 86_400.0
GRAIN_S = 900.0  # spendings of one quarter of an hour come back together, so a budget has at most 97 of them
_ROUNDING = 1e-9  # of a day's worth: what adding up fractions may lose


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that are gone until ``back_at``."""

    back_at: float
    amount: float


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """``spendings`` are in the order in which they come back. Every method returns a new budget."""

    per_day: float
    spendings: tuple[Spending, ...] = ()

    def left(self, now: float) -> float:
        """Tokens in the bucket."""
        return max(self.per_day - sum(gone.amount for gone in self.spendings if gone.back_at > now), 0.0)

    def affords(self, amount: float, now: float) -> bool:
        """Whether that much may be spent now."""
        return amount <= self.left(now) + self.per_day * _ROUNDING

    def wait_s(self, amount: float, now: float) -> float:
        """How long until that much may be spent; 0 when it may, infinite when it never will."""
        if self.affords(amount, now):
            return 0.0
        rounding = self.per_day * _ROUNDING
        missing = amount - self.per_day + sum(gone.amount for gone in self.spendings if gone.back_at > now)
        for gone in self.spendings:
            if gone.back_at > now:
                missing -= gone.amount
                if missing <= rounding:
                    return gone.back_at - now
        return math.inf

    def spend(self, amount: float, now: float) -> Budget:
        """Tokens leave the bucket. Who asks :meth:`affords` first never spends more than a day's worth in a day."""
        return self._with((*self.spendings, Spending(back_at=_back_at(now), amount=amount)), now)

    def give_back(self, amount: float, spent_at: float, now: float) -> Budget:
        """Tokens that were taken out at ``spent_at`` and not used after all."""
        if _back_at(spent_at) <= now:
            return self  # they are back already
        return self._with((*self.spendings, Spending(back_at=_back_at(spent_at), amount=-amount)), now)

    def _with(self, spendings: Iterable[Spending], now: float) -> Budget:
        sums: dict[float, float] = {}
        for gone in spendings:
            if gone.back_at > now:
                sums[gone.back_at] = sums.get(gone.back_at, 0.0) + gone.amount
        merged = tuple(Spending(back_at=at, amount=sums[at]) for at in sorted(sums) if sums[at] > 0)
        return Budget(per_day=self.per_day, spendings=merged)


def _back_at(spent_at: float) -> float:
    return (math.floor(spent_at / GRAIN_S) + 1) * GRAIN_S + DAY_S
