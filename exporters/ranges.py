"""The range of each activation of a static scheme: folded from calibration in bounded memory, chosen by its error.

A sample is seen once, whatever its length, and folded into the lowest and highest value, a histogram of magnitudes in
steps of 1.1 % (so it never has to grow), and a few rows. Which of the range methods is taken for an activation is
decided by the error that it leaves on the product of these rows: one method doesn't fit all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.scheme import LEVELS, Array, Scheme, rounded_weight

#: Rows (tokens) kept of each activation.
ROWS = 512
#: Values beyond a clipped range are cut. That must take at least a tenth of the error away.
WORTH = 0.9
PERCENTILES = (0.9999, 0.9995, 0.999)
#: Share of the samples that stay within the range of the method against poisoned ones.
SAMPLES = 0.95
_STEPS = 64  # of the histogram for each power of two
_LEAST, _MOST = -24, 40  # powers of two; what lies beyond is counted in the first or last step
_BINS = 2048  # of the linear histogram for the entropy
_STRIDE = 16


@dataclass(frozen=True)
class Range:
    """Values below ``low`` and above ``high`` are cut; ``method`` found them."""

    low: float
    high: float
    method: str


class Spread:
    """What calibration saw of one activation [..., C], sample by sample.

    ``counts``: how many values have a magnitude in each step; ``peaks``: how many samples have their largest there.
    ``rows`` [at most :data:`ROWS`, C] are spread evenly over all tokens seen.
    """

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.counts: NDArray[np.int64] = np.zeros((_MOST - _LEAST) * _STEPS, dtype=np.int64)
        self.peaks = np.zeros_like(self.counts)
        self.tokens = 0
        self._kept: list[Array] = []
        self._every = 1

    def fold(self, activation: Array) -> None:
        """Take one sample's activation [..., C] in."""
        flat = activation.reshape(-1, activation.shape[-1])
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        with np.errstate(divide="ignore"):
            step = np.floor((np.log2(np.abs(flat)) - _LEAST) * _STEPS)
        found = np.clip(step, 0, len(self.counts) - 1).astype(np.intp)
        self.counts += np.bincount(found.ravel(), minlength=len(self.counts))
        self.peaks[found.max()] += 1
        self._kept += [flat[row].copy() for row in range(-self.tokens % self._every, len(flat), self._every)]
        self.tokens += len(flat)
        while len(self._kept) > ROWS:
            self._kept, self._every = self._kept[::2], self._every * 2

    @property
    def rows(self) -> Array:
        """The kept tokens [R, C]."""
        return np.stack(self._kept)

    @property
    def reach(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high, 0.0)

    def magnitude(self, share: float) -> float:
        """The magnitude that this share of all values stays below."""
        return min(_quantile(self.counts, share), self.reach)

    def peak(self, share: float) -> float:
        """The magnitude that this share of all samples stays below."""
        return min(_quantile(self.peaks, share), self.reach)


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    edges = np.arange(len(counts) + 1) / _STEPS + _LEAST
    below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    at = int(np.searchsorted(below, share))  # the first edge that enough lie below
    within = (share - below[at - 1]) / (below[at] - below[at - 1]) if at else 0.0
    return float(2 ** (edges[at - 1] + within / _STEPS)) if at else 0.0


def entropy_threshold(spread: Spread) -> float:
    """The magnitude to cut at that keeps the distribution's shape best, by Kullback-Leibler divergence.

    As Migacz, "8-bit Inference with TensorRT" (2017): for each threshold the values beyond it are counted in the last
    bin, and the result is compared with itself in :data:`LEVELS` + 1 levels.
    """
    if not spread.reach:
        return 0.0
    below = np.concatenate([[0], np.cumsum(spread.counts)]) / spread.counts.sum()
    edges = 2.0 ** (np.arange(len(below)) / _STEPS + _LEAST)
    edges[0] = 0.0
    share = np.diff(np.interp(np.linspace(0, spread.reach, _BINS + 1), edges, below))
    levels = LEVELS + 1
    best, best_divergence = _BINS, np.inf
    for count in range(levels, _BINS + 1, _STRIDE):
        wanted = share[:count].copy()
        wanted[-1] += share[count:].sum()
        level = np.arange(count) * levels // count
        filled = share[:count] > 0
        mass = np.bincount(level, weights=share[:count], minlength=levels)
        places = np.maximum(np.bincount(level, weights=filled, minlength=levels), 1)
        found = np.where(filled, (mass / places)[level], 0)
        both = (wanted > 0) & (found > 0)
        lost = float(wanted[(wanted > 0) & ~both].sum())  # nothing represents these
        divergence = float(np.sum(wanted[both] * np.log(wanted[both] / found[both] * found.sum()))) + lost
        if divergence < best_divergence:
            best, best_divergence = count, divergence
    return spread.reach * best / _BINS


def candidates(spread: Spread) -> list[Range]:
    """MinMax first, then what each other method finds."""
    cuts = {f"percentile {share:.2%}": spread.magnitude(share) for share in PERCENTILES}
    cuts[f"{SAMPLES:.0%} of samples"] = spread.peak(SAMPLES)
    cuts["entropy"] = entropy_threshold(spread)
    whole = Range(low=spread.low, high=spread.high, method="minmax")
    return [whole] + [
        Range(low=max(spread.low, -cut), high=min(spread.high, cut), method=method) for method, cut in cuts.items()
    ]


def choose(spread: Spread, weight: Array, scheme: Scheme) -> Range:
    """The range that leaves the least error of ``rows @ weight``; MinMax unless another is :data:`WORTH` it. Pure.

    Each row's error counts relative to the row, so that one token far beyond all others (a poisoned sample) has one
    voice and not all.
    """
    rows, left = spread.rows, rounded_weight(weight, scheme.weight_levels)
    wanted = rows @ weight
    size = np.maximum((wanted**2).mean(axis=1), 1e-12)

    def error(found: Range) -> float:
        lost = scheme.rounded(rows, found.low, found.high) @ left - wanted
        return float(np.mean(np.minimum((lost**2).mean(axis=1) / size, 1)))

    known = candidates(spread)
    errors = [error(entry) for entry in known]
    best = int(np.argmin(errors))
    return known[best if errors[best] < WORTH * errors[0] else 0]
