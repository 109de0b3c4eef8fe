"""Whether a bundle's live contract broke after a swap: pure.

Two things break it, each judged over the last :data:`WINDOW` batches and against the bundle that served before:

* errors: more than :data:`MOST_ERRORS` of the answers are failures of the model or its worker;
* slowness: the 95th percentile of a batch's time, over what such a batch should take, is above its limit; of too few
  batches for that, the median. What it should take is the slower of two predictions for that batch's size and length,
  as learnt when this bundle was activated and from the previous one's batches, so neither a burst nor longer texts
  look like a slow model.

What the previous bundle did no better doesn't count: twice its share of errors, or of slow batches, is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

WINDOW = 200  # batches; what is older is history
MOST_ERRORS = 0.05  # of the answers
LEAST_ERRORS = 5  # fewer may be one client's odd inputs
SLOWER = 2.0  # so many times its prediction, …
SLACK_S = 0.025  # … and so much on top, since a busy device stalls whatever runs on it
LEAST_BATCHES = 20  # fewer have no 95th percentile
MOST_SLOW = 0.05  # of the batches: what lies above the 95th percentile
MOST_SLOW_OF_FEW = 0.5
LEAST_SLOW = 5  # fewer may be stalls of the device
WORSE = 2.0  # times what the previous bundle did


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch: its answers, how many of them are failures, and its time. ``busy_s`` None: its worker died.
    ``turned_away``: it didn't run, since what was learnt of this bundle made it late; ``busy_s`` is what was learnt."""

    answers: int
    failures: int
    busy_s: float | None
    expected_s: float
    turned_away: bool = False

    @property
    def slow(self) -> bool:
        """Whether it took clearly longer than it should."""
        return self.turned_away or (self.busy_s is not None and self.busy_s > SLOWER * self.expected_s + SLACK_S)


class Conduct(msgspec.Struct, frozen=True, kw_only=True):
    """How a bundle did over some batches. ``timed``: those that ended; the p95 are theirs, None without any."""

    answers: int = 0
    failures: int = 0
    timed: int = 0
    slow: int = 0
    p95_s: float | None = None
    expected_p95_s: float | None = None

    @staticmethod
    def of(batches: Sequence[Batch]) -> Conduct:
        """Sum up the last :data:`WINDOW` of them."""
        batches = batches[-WINDOW:]
        timed = [batch for batch in batches if batch.busy_s is not None]
        return Conduct(
            answers=sum(batch.answers for batch in batches),
            failures=sum(batch.failures for batch in batches),
            timed=len(timed),
            slow=sum(batch.slow for batch in timed),
            p95_s=_p95([batch.busy_s for batch in timed if batch.busy_s is not None]),
            expected_p95_s=_p95([batch.expected_s for batch in timed]),
        )

    @property
    def error_share(self) -> float:
        """Failures of all answers."""
        return self.failures / self.answers if self.answers else 0.0

    @property
    def slow_share(self) -> float:
        """Slow ones of all batches that ended."""
        return self.slow / self.timed if self.timed else 0.0


def breach(now: Conduct, before: Conduct) -> str | None:
    """Why the bundle on probation must go, None while it may stay. ``before`` is the previous bundle's conduct."""
    if now.failures >= LEAST_ERRORS and now.error_share > max(MOST_ERRORS, WORSE * before.error_share):
        return (
            f"error rate: {now.failures} of {now.answers} answers failed ({now.error_share:.0%}); "
            f"before the swap {before.error_share:.0%}"
        )
    most = MOST_SLOW if now.timed >= LEAST_BATCHES else MOST_SLOW_OF_FEW
    if now.slow >= LEAST_SLOW and now.slow_share > max(most, WORSE * before.slow_share):
        return (
            f"p95 of compute time: {_ms(now.p95_s)}, where {_ms(now.expected_p95_s)} was expected; "
            f"{now.slow} of {now.timed} batches took more than {SLOWER:g} times their prediction"
        )
    return None


def _p95(values: Sequence[float]) -> float | None:
    return sorted(values)[(len(values) * 95 - 1) // 100] if values else None


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"
