"""How fast a tenant may ask, as a value: pure, the clock is passed in.

A rate is a token bucket: at most ``burst + rate * T`` requests in any ``T`` seconds. A day's bytes are a
:class:`device_agent.budget.Budget`.
"""

from __future__ import annotations

import msgspec

_ROUNDING = 1e-6  # of a token: what floating point may lose on the way


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, refilled evenly up to ``burst``; a request takes one. Every method returns a new bucket."""

    rate_per_s: float
    burst: float
    level: float
    at: float  # when ``level`` was true, in seconds of a monotonic clock

    @staticmethod
    def full(rate_per_s: float, burst: float, now: float) -> Bucket:
        """As it is at the start."""
        return Bucket(rate_per_s=rate_per_s, burst=burst, level=burst, at=now)

    def wait_s(self, now: float) -> float:
        """How long until a token is there; 0 when one is."""
        missing = 1.0 - self._level(now)
        return missing / self.rate_per_s if missing > _ROUNDING else 0.0

    def taken(self, now: float) -> Bucket:
        """One token less; only when :meth:`wait_s` is 0."""
        return msgspec.structs.replace(self, level=self._level(now) - 1.0, at=max(now, self.at))

    def _level(self, now: float) -> float:
        return min(self.burst, self.level + max(now - self.at, 0.0) * self.rate_per_s)
