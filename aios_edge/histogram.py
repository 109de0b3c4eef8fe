"""A latency histogram that devices can send and a fleet can add up.

The buckets are fixed, so two histograms of any two devices and windows merge exactly: 20 per decade from 10 µs to
1000 s, one below and one above. A quantile is the geometric middle of its bucket (nearest-rank definition), which
is off by at most ``RELATIVE_ERROR`` inside that range, by 10 µs below it, and is the largest value seen above it.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable
from functools import partial

import msgspec

LOWEST_S = 1e-5
BUCKETS_PER_DECADE = 20
BUCKETS = 8 * BUCKETS_PER_DECADE
_BELOW_1_S = 5 * BUCKETS_PER_DECADE  # counted from 1 s, the bounds of whole decades are exact
#: sqrt of the ratio between a bucket's bounds, minus one.
RELATIVE_ERROR = 10 ** (0.5 / BUCKETS_PER_DECADE) - 1


def bucket_of(value_s: float) -> int:
    """The index of the bucket that holds a duration: 0 below ``LOWEST_S``, ``BUCKETS + 1`` from 1000 s on."""
    return _bucket_of(value_s)


def upper_bound_s(index: int) -> float:
    """The bound that bucket ``index`` ends before; infinite for the last."""
    return math.inf if index > BUCKETS else 10.0 ** ((index - _BELOW_1_S) / BUCKETS_PER_DECADE)


_BOUNDS_S = tuple(map(upper_bound_s, range(BUCKETS + 1)))
_bucket_of = partial(bisect.bisect_right, _BOUNDS_S)


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of durations in seconds. ``counts`` is sparse: pairs of bucket index and count, by rising index.

    ``lowest_s`` and ``buckets_per_decade`` travel along so that a reader needs no other document: bucket ``i``
    (from 1) spans ``lowest_s * 10 ** ((i - 1) / buckets_per_decade)`` to the same with ``i``.
    """

    counts: tuple[tuple[int, int], ...] = ()
    count: int = 0
    sum_s: float = 0.0
    min_s: float | None = None
    max_s: float | None = None
    range_reason: str | None = "nothing was counted"  # why there is no least and no largest
    lowest_s: float = LOWEST_S
    buckets_per_decade: int = BUCKETS_PER_DECADE
    relative_error: float = round(RELATIVE_ERROR, 4)

    @staticmethod
    def of(values_s: Iterable[float]) -> Histogram:
        """The histogram of these durations. ValueError for a negative or non-finite one: it is nobody's latency."""
        values = tuple(values_s)
        if not values:
            return Histogram()
        for value in values:
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{value} is not a duration in seconds")
        counts = Counter(map(_bucket_of, values))
        return Histogram(
            counts=tuple(sorted(counts.items())),
            count=len(values),
            sum_s=math.fsum(values),
            min_s=min(values),
            max_s=max(values),
            range_reason=None,
        )

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of durations. ValueError when the buckets differ."""
        if (self.lowest_s, self.buckets_per_decade) != (other.lowest_s, other.buckets_per_decade):
            raise ValueError("histograms with different buckets can't be merged")
        counts = dict(self.counts)
        for index, count in other.counts:
            counts[index] = counts.get(index, 0) + count
        lows = [low for low in (self.min_s, other.min_s) if low is not None]
        highs = [high for high in (self.max_s, other.max_s) if high is not None]
        return msgspec.structs.replace(
            self,
            counts=tuple(sorted(counts.items())),
            count=self.count + other.count,
            sum_s=self.sum_s + other.sum_s,
            min_s=min(lows, default=None),
            max_s=max(highs, default=None),
            range_reason=self.range_reason if other.count == 0 else other.range_reason,
        )

    def quantile(self, q: float) -> float | None:
        """The duration that a share ``q`` of all stays within (nearest rank); None when empty."""
        if self.min_s is None or self.max_s is None:
            return None
        rank, seen, index = max(1, math.ceil(q * self.count)), 0, 0
        for index, count in self.counts:  # noqa: B007  the bucket where it stops is the answer
            seen += count
            if seen >= rank:
                break
        if index == 0:
            middle = self.min_s
        elif index > BUCKETS:
            middle = self.max_s
        else:
            middle = self.lowest_s * 10 ** ((index - 0.5) / self.buckets_per_decade)
        return min(max(middle, self.min_s), self.max_s)
