"""Whether a bundle's live contract broke after a swap: pure.

Two things break it, each judged over the last :data:`WINDOW` batches and against the bundle that served before:

* errors: more than :data:`MOST_ERRORS` of the answers are failures of the model or its worker. One tenant's alone don't
  count where the others' answers, :data:`LEAST_OTHERS` at least, say otherwise: its inputs may be odd;
* slowness: the 95th percentile of a batch's time, over what such a batch should take, is above its limit; of too few
  batches for that, the median. What it should take is the slower of two predictions for that batch's size and length,
  as learnt when this bundle was activated and from the previous one's batches, so neither a burst nor longer texts
  look like a slow model. Batches of a device that was too hot to run as it can say nothing about time.

What the previous bundle did no better doesn't count: twice its share of errors, or of slow batches, is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

WINDOW = 200  # batches; what is older is history
MOST_ERRORS = 0.05  # of the answers
LEAST_ERRORS = 5  # fewer may be one client's odd inputs
LEAST_OTHERS = 20  # answers of other tenants; fewer don't tell whether one has odd inputs or the model fails
SLOWER = 2.0  # so many times its prediction, …
SLACK_S = 0.025  # … and so much on top, since a busy device stalls whatever runs on it
LEAST_BATCHES = 20  # fewer have no 95th percentile
MOST_SLOW = 0.05  # of the batches: what lies above the 95th percentile
MOST_SLOW_OF_FEW = 0.5
LEAST_SLOW = 5  # fewer may be stalls of the device
WORSE = 2.0  # times what the previous bundle did


class Part(msgspec.Struct, frozen=True):
    """What of a batch was one tenant's."""

    tenant: str
    answers: int
    failures: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch: its answers, how many of them are failures, and its time. ``busy_s`` None: its worker died.
    ``turned_away``: it didn't run, since what was learnt of this bundle made it late; ``busy_s`` is what was learnt.
    ``parts``: by tenant, where there are tenants. ``held``: the device was too hot then; None: that isn't known yet."""

    answers: int
    failures: int
    busy_s: float | None
    expected_s: float
    turned_away: bool = False
    parts: tuple[Part, ...] = ()
    held: bool | None = False

    @property
    def slow(self) -> bool:
        """Whether it took clearly longer than it should."""
        return self.turned_away or (self.busy_s is not None and self.busy_s > SLOWER * self.expected_s + SLACK_S)


class Conduct(msgspec.Struct, frozen=True, kw_only=True):
    """How a bundle did over some batches. ``timed``: those that ended, and weren't held back; the p95 are theirs, None
    without any. ``other_answers``, ``other_failures``: without the tenant that most failures can be put down to."""

    answers: int = 0
    failures: int = 0
    other_answers: int = 0
    other_failures: int = 0
    timed: int = 0
    slow: int = 0
    p95_s: float | None = None
    expected_p95_s: float | None = None

    @staticmethod
    def of(batches: Sequence[Batch]) -> Conduct:
        """Sum up the last :data:`WINDOW` of them."""
        batches = batches[-WINDOW:]
        timed = [batch for batch in batches if batch.busy_s is not None and batch.held is False]
        answers, failures = sum(batch.answers for batch in batches), sum(batch.failures for batch in batches)
        worst = _worst(batches)
        return Conduct(
            answers=answers,
            failures=failures,
            other_answers=answers - worst.answers,
            other_failures=failures - worst.failures,
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
    def errors(self) -> tuple[int, int]:
        """The failures to judge by, and the answers they are of."""
        if self.other_answers >= LEAST_OTHERS:
            return self.other_failures, self.other_answers
        return self.failures, self.answers

    @property
    def slow_share(self) -> float:
        """Slow ones of all batches that ended."""
        return self.slow / self.timed if self.timed else 0.0


def breach(now: Conduct, before: Conduct) -> str | None:
    """Why the bundle on probation must go, None while it may stay. ``before`` is the previous bundle's conduct."""
    failures, answers = now.errors
    if failures >= LEAST_ERRORS and failures / answers > max(MOST_ERRORS, WORSE * before.error_share):
        share = failures / answers
        what = "answers failed" if answers == now.answers else "answers to all tenants but one failed"
        return f"error rate: {failures} of {answers} {what} ({share:.0%}); the other bundle {before.error_share:.0%}"
    most = MOST_SLOW if now.timed >= LEAST_BATCHES else MOST_SLOW_OF_FEW
    if now.slow >= LEAST_SLOW and now.slow_share > max(most, WORSE * before.slow_share):
        return (
            f"p95 of compute time: {_ms(now.p95_s)}, where {_ms(now.expected_p95_s)} was expected; "
            f"{now.slow} of {now.timed} batches took more than {SLOWER:g} times their prediction"
        )
    return None


def _worst(batches: Sequence[Batch]) -> Part:
    """All of the tenant without which the fewest failures are left. A batch whose worker died is its doing where it
    took part: the others in it have failed for nothing of theirs."""
    failed = {part.tenant for batch in batches if batch.failures for part in batch.parts if part.failures}
    shares = (_share_of(tenant, batches) for tenant in sorted(failed))
    return max(shares, key=lambda share: share.failures, default=Part("", 0, 0))


def _share_of(tenant: str, batches: Sequence[Batch]) -> Part:
    answers = failures = 0
    for batch in batches:
        for part in batch.parts:
            if part.tenant == tenant:
                whole = batch.busy_s is None
                answers += batch.answers if whole else part.answers
                failures += batch.failures if whole else part.failures
    return Part(tenant, answers, failures)


def _p95(values: Sequence[float]) -> float | None:
    return sorted(values)[(len(values) * 95 - 1) // 100] if values else None


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"
