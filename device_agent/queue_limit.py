"""How many requests without a deadline may wait for a model, so that none waits much longer than it should: pure.

Nothing limits them by time as a deadline does, so their number is limited, and the number follows from what they are
seen to wait: additive increase, multiplicative decrease, as in congestion control. Whoever is taken tells how long it
waited. Longer than ``target_s``: the limit falls by a tenth, at most once in the time that those who were let in under
the old one need to leave. Sooner, while the limit kept others out: it rises, by about one each time that it is gone
through once. It begins where the learnt service time says that the target is met.
"""

from __future__ import annotations

import msgspec

DECREASE = 0.9
INCREASE = 1.0  # each time that as many were taken as may wait


class QueueLimit(msgspec.Struct, frozen=True, kw_only=True):
    """``limit`` stays within ``least`` (enough for the next batch, whatever it takes) and ``most``."""

    target_s: float
    least: int
    most: int
    limit: float
    steady_at: float = 0.0  # until then those leave who came under a higher limit

    @staticmethod
    def begin(*, target_s: float, rate_per_s: float, max_batch_size: int, most: int) -> QueueLimit:
        """Before anything was seen; ``rate_per_s`` is what the service time promises of full batches."""
        least = min(max_batch_size, most)
        limit = min(max(target_s * rate_per_s, least), most)
        return QueueLimit(target_s=target_s, least=least, most=most, limit=limit)

    @property
    def places(self) -> int:
        """How many may wait."""
        return int(self.limit)

    def taken(self, waited_s: float, count: int, waiting: int, now: float) -> QueueLimit:
        """So many without a deadline leave for the worker, the first of them after ``waited_s``; ``waiting`` such had
        been there with them."""
        if waited_s > self.target_s:
            if now < self.steady_at:
                return self
            limit = max(min(self.limit, waiting) * DECREASE, self.least)
            return msgspec.structs.replace(self, limit=limit, steady_at=now + waited_s)
        if waiting < self.places or self.limit == self.most:  # it kept nobody out, and says nothing
            return self
        return msgspec.structs.replace(self, limit=min(self.limit + INCREASE * count / self.limit, self.most))
