"""How long a batch will keep the worker busy: pure, learnt from what the worker reports.

Model: ``busy_s = base_s + per_unit_s * units``, where units are the batch's padded tokens (number of requests x the
longest of them), estimated from bytes until the worker has counted them. Of a model that runs one request at a time
(``one_by_one``) several may travel together; nothing is padded then, and each costs what it would alone. The two
coefficients are a least-squares fit with exponential forgetting, held up by a prior from the activation's own latency
measurement, so that the very first request is predicted too. ``spread`` is the exponentially weighted root mean square
of the relative error; a prediction is called safe with ``MARGIN_SPREADS`` of them on top, plus a fixed overhead for
everything around the worker (HTTP, event loop, socketpair), which is learnt as well.

What none of that sees, such as a device that is busy with refusing, is seen by promises that weren't kept. ``caution``
multiplies the margin of the next ones: each broken promise raises it by a tenth, each kept one lowers it by so little
that it stands still where four of a thousand are broken (a stochastic approximation of that quantile, Robbins and Monro
1951). One stall breaks many at once, so no more than three count in a second. And since a margin that is too wide
leaves no promise to learn from, half of it is forgotten in a minute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

MEMORY = 0.97  # weight of the past per batch: about the last 30 batches count
PRIOR_WEIGHT = 2.0
BASE_SHARE = 0.2  # of the prior latency: what a batch costs before its first token
MARGIN_SPREADS = 2.5  # of a promise
CUT_SPREADS = 2.0  # of a batch's end: a batch that is cut costs everybody behind it
LEAST_SPREAD = 0.05
FIRST_SPREAD = 0.25
FIRST_OVERHEAD_S = 0.002
FIRST_BYTES_PER_UNIT = 5.0  # English text: about five bytes a token
MISSED_SHARE = 0.004  # of promises
CAUTION_STEP = 1.1
MOST_CAUTION = 4.0
CAUTION_HALF_LIFE_S = 60.0
MOST_RAISES, RAISES_S = 3, 1.0  # so many in so long
_NO_CAUTION = 1.001  # less is none
_CAUTION_LOWERS = CAUTION_STEP ** (-MISSED_SHARE / (1.0 - MISSED_SHARE))
DEFAULT_BUSY_S = 0.02
DEFAULT_UNITS = 32.0


class ServiceTime(msgspec.Struct, frozen=True, kw_only=True):
    """The estimator's state; every observation returns a new one. Weighted sums of the regression, then spreads."""

    w: float
    x: float
    y: float
    xx: float
    xy: float
    spread: float = FIRST_SPREAD
    overhead_s: float = FIRST_OVERHEAD_S
    bytes_per_unit: float = FIRST_BYTES_PER_UNIT
    base_s: float
    per_unit_s: float
    one_by_one: bool = False
    caution: float = 1.0
    cautious_at: float = 0.0  # when that was so
    raising_since: float = -math.inf
    raises: int = 0  # since then

    @staticmethod
    def prior(busy_s: float | None, units: float = DEFAULT_UNITS, *, one_by_one: bool = False) -> ServiceTime:
        """Start from the time one request of ``units`` tokens took at activation (None: a guess, soon corrected)."""
        busy = busy_s if busy_s else DEFAULT_BUSY_S
        base = BASE_SHARE * busy
        w = PRIOR_WEIGHT
        return ServiceTime(  # two pseudo-observations: (0, base) and (units, busy)
            w=2 * w,
            x=w * units,
            y=w * (base + busy),
            xx=w * units * units,
            xy=w * units * busy,
            base_s=base,
            per_unit_s=(busy - base) / units,
            one_by_one=one_by_one,
        )

    def units(self, cost_bytes: float) -> float:
        """Estimated tokens of a request from the size of its input data."""
        return max(cost_bytes / self.bytes_per_unit, 1.0)

    def busy_s(self, units: float) -> float:
        """Expected time the worker is occupied with a batch of that many padded tokens."""
        return self.base_s + self.per_unit_s * units

    def batch_s(self, costs_bytes: Sequence[float]) -> float:
        """Expected time the worker is occupied with these requests together."""
        if self.one_by_one:
            return sum(self.busy_s(self.units(cost)) for cost in costs_bytes)
        return self.busy_s(len(costs_bytes) * self.units(max(costs_bytes, default=0.0)))

    def margin_s(self, expected_s: float, spreads: float = MARGIN_SPREADS) -> float:
        """What to add to an expected completion before calling it safe."""
        return spreads * self.spread * expected_s + self.overhead_s

    def caution_at(self, now: float) -> float:
        """By how much the margin of a promise is to be wider."""
        if self.caution == 1.0:
            return 1.0
        return 1.0 + (self.caution - 1.0) * math.pow(0.5, max(now - self.cautious_at, 0.0) / CAUTION_HALF_LIFE_S)

    def promised(self, kept: bool, now: float) -> ServiceTime:
        """A request that was said to be safe was in time, or it wasn't."""
        if kept:
            if self.caution == 1.0:
                return self
            caution = self.caution_at(now) * _CAUTION_LOWERS
            return msgspec.structs.replace(self, caution=caution if caution > _NO_CAUTION else 1.0, cautious_at=now)
        since, raises = self.raising_since, self.raises
        if now - since >= RAISES_S:
            since, raises = now, 0
        if raises == MOST_RAISES:
            return self
        caution = min(self.caution_at(now) * CAUTION_STEP, MOST_CAUTION)
        return msgspec.structs.replace(self, caution=caution, cautious_at=now, raising_since=since, raises=raises + 1)

    def room_s(self, left_s: float, spreads: float = MARGIN_SPREADS) -> float:
        """How long something may be expected to take whose end is to be safe within ``left_s``; the inverse of adding
        :meth:`margin_s`. No caution is in it: batches that are cut for it would make the next ones late."""
        return (left_s - self.overhead_s) / (1.0 + spreads * self.spread)

    def observed(self, costs_bytes: Sequence[int], lengths: Sequence[int], busy_s: float) -> ServiceTime:
        """A batch was done: its requests' input sizes, their true lengths (0: unknown), and the time it took."""
        if not costs_bytes or busy_s <= 0:
            return self
        bytes_per_unit = self.bytes_per_unit
        counted = [(cost, length) for cost, length in zip(costs_bytes, lengths, strict=True) if length > 0]
        if counted:
            ratio = max(sum([cost for cost, _ in counted]) / sum([length for _, length in counted]), 0.1)
            bytes_per_unit += 0.1 * (ratio - bytes_per_unit)
        # Predictions are made from bytes, so the error is judged against the estimate, not against the truth.
        predicted = self.batch_s(costs_bytes)
        error = min(abs(busy_s - predicted) / max(predicted, 1e-9), 2.0)  # one stall must not blind us for minutes
        spread = math.sqrt(MEMORY * self.spread**2 + (1 - MEMORY) * error**2)
        if self.one_by_one:  # seen as one of the mean length: a fit of what each takes
            known = [length or self.units(cost) for cost, length in zip(costs_bytes, lengths, strict=True)]
            units, busy_s = sum(known) / len(known), busy_s / len(known)
        else:
            longest = max([length for _, length in counted], default=0) or self.units(max(costs_bytes))
            units = len(costs_bytes) * float(longest)
        w, x, y = MEMORY * self.w + 1, MEMORY * self.x + units, MEMORY * self.y + busy_s
        xx, xy = MEMORY * self.xx + units * units, MEMORY * self.xy + units * busy_s
        base, slope = _fit(w, x, y, xx, xy)
        return msgspec.structs.replace(
            self,
            w=w,
            x=x,
            y=y,
            xx=xx,
            xy=xy,
            spread=max(spread, LEAST_SPREAD),
            bytes_per_unit=bytes_per_unit,
            base_s=base,
            per_unit_s=slope,
        )

    def overhead(self, seconds: float) -> ServiceTime:
        """Time between the worker's own busy time and what the supervisor saw of one batch, send to answer."""
        seconds = min(max(seconds, 0.0), 0.05)
        # Rises at once and falls slowly: the margin should cover the bad moments, not the average.
        gain = 0.3 if seconds > self.overhead_s else 0.02
        return msgspec.structs.replace(self, overhead_s=self.overhead_s + gain * (seconds - self.overhead_s))


def _fit(w: float, x: float, y: float, xx: float, xy: float) -> tuple[float, float]:
    """Intercept and slope, both >= 0. A standing pseudo-observation at (0, share of the mean) keeps the fit
    determined while every batch looks the same."""
    ridge = 0.5
    y0 = BASE_SHARE * y / w
    w, y = w + ridge, y + ridge * y0
    determinant = w * xx - x * x
    slope = (w * xy - x * y) / determinant if determinant > 1e-12 else 0.0
    base = (y - slope * x) / w
    if slope < 0:
        return y / w, 0.0
    if base < 0:
        return 0.0, xy / xx
    return base, slope
