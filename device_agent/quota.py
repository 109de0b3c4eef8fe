"""How much a tenant may ask for, as values: pure, the clock is passed in.

A rate is a token bucket: at most ``burst + rate * T`` requests in any ``T`` seconds. A day's bytes are counted over the
last 24 hours instead, because a bucket that holds a day and refills over a day lets twice as much through in its first.
"""

from __future__ import annotations

import math

import msgspec

DAY_S = 86_400
SLOT_S = 900  # what was spent comes back a quarter of an hour at a time
_SLOTS = DAY_S // SLOT_S
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


class DayBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the last 24 hours, never more than ``limit_bytes`` in any of them. Every method returns a new value."""

    limit_bytes: int
    slots: tuple[tuple[int, int], ...] = ()  # number of the quarter hour, bytes in it; oldest first

    def left(self, now: float) -> int:
        """How many bytes may still come."""
        return self.limit_bytes - sum(size for _, size in self._kept(now))

    def wait_s(self, size_bytes: int, now: float) -> float:
        """How long until that many fit; 0 when they do, infinite when they never will."""
        if size_bytes > self.limit_bytes:
            return math.inf
        missing = size_bytes - self.left(now)
        if missing <= 0:
            return 0.0
        for slot, size in self._kept(now):
            missing -= size
            if missing <= 0:
                return (slot + 1 + _SLOTS) * SLOT_S - now
        raise AssertionError("what is missing was spent in one of the slots")

    def spent(self, size_bytes: int, now: float) -> DayBytes:
        """That many more; only when :meth:`wait_s` is 0."""
        kept, here = self._kept(now), int(now // SLOT_S)
        if kept and kept[-1][0] == here:
            kept, size_bytes = kept[:-1], size_bytes + kept[-1][1]
        return msgspec.structs.replace(self, slots=(*kept, (here, size_bytes)))

    def _kept(self, now: float) -> tuple[tuple[int, int], ...]:
        """A slot goes when the last moment of it is 24 hours ago."""
        oldest = int(now // SLOT_S) - _SLOTS
        if not self.slots or self.slots[0][0] >= oldest:
            return self.slots
        return tuple(slot for slot in self.slots if slot[0] >= oldest)
