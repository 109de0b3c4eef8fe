"""How long a cloud endpoint takes to answer: pure. Exponentially weighted mean and deviation, as TCP's retransmission
timer keeps them (Jacobson 1988), with one addition: knowledge ages.

An estimate that rose because the endpoint was slow for a while would keep every request away and never be corrected.
So it decays towards what the last background check measured, and the endpoint gets its chance again.
"""

from __future__ import annotations

import msgspec

GAIN = 0.125
DEVIATION_GAIN = 0.25
MARGIN_DEVIATIONS = 3.0
HALF_LIFE_S = 5.0
RECENT = 64  # answers of which the 95th percentile is told
RECENT_LEAST = 20  # fewer tell nothing of one in twenty


class RoundTrip(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. ``floor_s``: the last metadata request, the least an inference can take; a guess before the first."""

    floor_s: float = 0.005
    measured: bool = False  # whether anything was ever answered
    mean_s: float | None = None
    deviation_s: float = 0.0
    seen_at: float = 0.0
    recent: tuple[float, ...] = ()  # the last answers' times, the oldest first

    def pinged(self, took_s: float, now: float) -> RoundTrip:
        """A background check was answered."""
        return msgspec.structs.replace(
            self, floor_s=took_s, measured=True, seen_at=self.seen_at if self.mean_s else now
        )

    def observed(self, took_s: float, now: float) -> RoundTrip:
        """An inference was answered."""
        recent = (*self.recent[1 - RECENT :], took_s)
        if self.mean_s is None:
            return msgspec.structs.replace(
                self, mean_s=took_s, deviation_s=took_s / 4, measured=True, seen_at=now, recent=recent
            )
        error = took_s - self.mean_s
        return msgspec.structs.replace(
            self,
            mean_s=self.mean_s + GAIN * error,
            deviation_s=self.deviation_s + DEVIATION_GAIN * (abs(error) - self.deviation_s),
            seen_at=now,
            recent=recent,
        )

    def p95_s(self) -> float | None:
        """What nineteen of the last twenty answers took at most; None while too few were seen."""
        if len(self.recent) < RECENT_LEAST:
            return None
        return sorted(self.recent)[len(self.recent) * 19 // 20]

    def predict(self, now: float) -> tuple[float, float]:
        """Expected, and safe with margin."""
        if self.mean_s is None:
            return self.floor_s, 2 * self.floor_s
        keep = 0.5 ** (max(now - self.seen_at, 0.0) / HALF_LIFE_S)
        floor = min(self.floor_s, self.mean_s)
        expected = floor + (self.mean_s - floor) * keep
        return expected, expected + MARGIN_DEVIATIONS * self.deviation_s * keep + 0.001
