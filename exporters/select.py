"""The choice: which candidate a profile gets, and why each of the others did not. Pure.

Accuracy, parity and size must be measured and kept; a missing figure never wins. Latency and memory count only
where they were measured on a host of the profile's class: there a candidate slower than fp32 is never chosen, and
the fastest wins. Elsewhere the profile's order of preference decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from aios_edge.contract import ACCURACY_DROP, AGREEMENT, BUNDLE_SIZE, LATENCY_P95, MEMORY, SIZE
from aios_edge.profile import Budgets

#: Quantized models must answer as fp32 does on this share of the rows, however accurate they are by luck.
MIN_AGREEMENT = 0.90
#: A pruned one is another network, which finds other answers as good; below this it is no longer its teacher's student.
MIN_AGREEMENT_PRUNED = 0.80
#: Latencies this close are one latency; the smaller model wins then.
TIE = 0.05

UNMEASURED = "unmeasured on target"
#: The promise that a candidate is faster than fp32.
SPEEDUP = "speedup"

_MOST_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A broken rule: its name, in words, how far off (a ratio, inf where unknown), and what would have to give."""

    promise: str
    reason: str
    excess: float
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a candidate; None where a figure was not measured. Latency at the profile's conditions.

    ``brought``: latency and memory were measured on the target and brought here; False where that was done for other
    candidates and not for this one, None where it was done for none. ``broken``: what other checks found already (a
    class it loses, outputs out of range).
    """

    name: str
    is_fp32: bool
    is_pruned: bool = False
    drop: float | None
    agreement: float | None
    size_bytes: int | None
    bundle_size_bytes: int | None
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    speedup: float | None = None
    rss_bytes: int | None = None
    brought: bool | None = None
    broken: tuple[Miss, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``chosen`` is None when no candidate is left; then ``remedy`` says what would have to give for the ``nearest``,
    and ``broken`` is the first promise that it doesn't keep. ``eligible``: all that keep every rule."""

    chosen: str | None
    reasons: dict[str, str]
    nearest: str | None = None
    broken: str | None = None
    remedy: str | None = None
    eligible: tuple[str, ...] = ()


def select(candidates: Sequence[Figures], budgets: Budgets, *, max_drop: float, on_target: bool) -> Choice:
    """Choose among ``candidates``, which stand in the profile's order of preference.

    ``max_drop`` is the stricter of recipe and profile; ``on_target`` says that latency and memory were measured on
    a host that matches the profile. Of figures that were brought from there, a candidate without any wins only where
    none that was measured keeps its promises.
    """
    missed = {c.name: misses(c, budgets, max_drop=max_drop, on_target=on_target) for c in candidates}
    reasons = {name: "; ".join(miss.reason for miss in found) for name, found in missed.items() if found}
    eligible = [candidate for candidate in candidates if not missed[candidate.name]]
    if not eligible:
        nearest = min(candidates, key=lambda c: _distance(missed[c.name]), default=None)
        if nearest is None:
            return Choice(chosen=None, reasons={}, remedy="Name a precision in the profile's precision_preference")
        found = missed[nearest.name]
        text = f"{nearest.name} {'; '.join(m.reason for m in found)}; {', '.join(m.remedy for m in found)}"
        return Choice(chosen=None, reasons=reasons, nearest=nearest.name, broken=found[0].promise, remedy=text)
    timed = [candidate for candidate in eligible if candidate.brought is not False]
    if on_target and timed:
        winner = _fastest(timed)
        won = "keeps accuracy, size, latency and memory, and is the fastest here"
        if winner.brought:
            won = "keeps accuracy, size, latency and memory, and is the fastest of those measured on the target"
            won += "" if winner.speedup is not None or winner.is_fp32 else "; fp32 was not measured there"
        if winner.latency_p50_s != min(c.latency_p50_s or 0.0 for c in timed):
            won = "keeps every promise and is the smallest of those within 5 % of the fastest"
    else:
        winner = eligible[0]
        won = f"first of the profile's preference that keeps accuracy and size; latency and memory {UNMEASURED}"
    for candidate in eligible:
        lost = f"keeps its promises, but {winner.name} is " + (
            "faster or smaller" if on_target and timed else "preferred"
        )
        if candidate.brought is False and winner.brought:
            lost = f"is {UNMEASURED}, where {winner.name} was measured and keeps its promises"
        reasons[candidate.name] = won if candidate is winner else lost
    return Choice(chosen=winner.name, reasons=reasons, eligible=tuple(c.name for c in eligible))


def _fastest(eligible: Sequence[Figures]) -> Figures:
    quickest = min(c.latency_p50_s or 0.0 for c in eligible)
    close = [c for c in eligible if (c.latency_p50_s or 0.0) <= quickest * (1 + TIE)]
    return min(close, key=lambda c: (c.size_bytes or 0, c.latency_p50_s or 0.0))


def misses(c: Figures, budgets: Budgets, *, max_drop: float, on_target: bool) -> list[Miss]:
    """The rules that a candidate breaks; see :func:`select`."""
    found = []
    if c.drop is None or c.agreement is None:
        found.append(_unknown(ACCURACY_DROP, "accuracy"))
    else:
        if c.drop > max_drop + 1e-12:
            points = (c.drop - max_drop) * 100
            remedy = f"allow max_drop = {_ceil(c.drop)}"
            reason, excess = f"misses max_drop by {points:.2g} pt", c.drop - max_drop
            found.append(Miss(promise=ACCURACY_DROP, reason=reason, excess=excess, remedy=remedy))
        least = MIN_AGREEMENT_PRUNED if c.is_pruned else MIN_AGREEMENT
        if c.agreement < least:
            reason = f"agrees with fp32 on {c.agreement:.3f} of the rows only (at least {least})"
            remedy = "prune less or distil longer" if c.is_pruned else "fine-tune longer or use another precision"
            excess = least - c.agreement
            found.append(Miss(promise=AGREEMENT, reason=reason, excess=excess, remedy=remedy))
    if c.size_bytes is None or c.bundle_size_bytes is None:
        found.append(_unknown(SIZE, "size"))
    else:
        found += _over("bundle size", c.bundle_size_bytes, budgets.bundle_size_bytes, 1e6, "MB", BUNDLE_SIZE)
    found += c.broken
    if on_target and c.brought is not False:
        found += _cost_misses(c, budgets)
    return found


def _cost_misses(c: Figures, budgets: Budgets) -> list[Miss]:
    found = []
    if c.latency_p50_s is None or c.latency_p95_s is None or (c.speedup is None and not c.brought):
        return [_unknown(LATENCY_P95, "latency")]
    if c.speedup is not None and c.speedup < 1 and not c.is_fp32:
        reason = f"is slower than fp32 on {'the target' if c.brought else 'this host'} ({c.speedup:.2f}x)"
        remedy = "add fp32 to the profile's preference"
        found.append(Miss(promise=SPEEDUP, reason=reason, excess=1 / c.speedup - 1, remedy=remedy))
    found += _over("p95 latency", c.latency_p95_s, budgets.latency_p95_s, 1e-3, "ms", LATENCY_P95)
    if budgets.memory_bytes is not None and c.rss_bytes is None:
        found.append(_unknown(MEMORY, "memory"))
    elif c.rss_bytes is not None:
        found += _over("memory", c.rss_bytes, budgets.memory_bytes, 1e6, "MB", MEMORY)
    return found


def _unknown(promise: str, what: str) -> Miss:
    return Miss(promise=promise, reason=f"has no {what} measured", excess=float("inf"), remedy="find out why")


def _over(what: str, value: float, budget: float | None, scale: float, unit: str, promise: str) -> list[Miss]:
    if budget is None or value <= budget:
        return []
    if not math.isfinite(value):
        return [_unknown(promise, what)]
    found, allowed = apart(value / scale, budget / scale, digits=1)
    reason = f"misses the {what} budget ({found} of {allowed} {unit})"
    remedy = f"raise budgets.{promise} to {_raised(value)}"  # a budget has the name of its promise
    return [Miss(promise=promise, reason=reason, excess=value / budget - 1, remedy=remedy)]


def apart(value: float, limit: float, *, digits: int) -> tuple[str, str]:
    """Two different figures with as many decimals as it takes to read differently, and as zero only where one is."""
    while True:
        found, allowed = f"{value:.{digits}f}", f"{limit:.{digits}f}"
        as_zero = (value and not float(found)) or (limit and not float(allowed))
        if digits >= _MOST_DIGITS or (found != allowed and not as_zero):
            return found, allowed
        digits += 1


def _distance(misses: Sequence[Miss]) -> tuple[int, float]:
    return len(misses), sum(miss.excess for miss in misses)


def _ceil(drop: float) -> float:
    """The next per-mille above, so that what is proposed really suffices."""
    return math.ceil(round(drop * 1000, 9)) / 1000  # 0.014 * 1000 is a little more than 14


def _raised(value: float) -> str:
    """The same for a budget: bytes and other whole numbers as they are, seconds with four digits, the last one rounded
    up."""
    value = float(value)  # numpy's are floats as well, but their repr is no number
    if value.is_integer():
        return str(int(value))
    exact = Decimal(repr(value))
    step = Decimal(1).scaleb(exact.adjusted() - 3)
    return f"{exact.quantize(step, rounding=ROUND_CEILING):f}"
