"""Drawings of the report as inline SVG: what accuracy costs in size and time, and how training went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from exporters.report_format import MINUS, text

_WIDTH, _HEIGHT = 520, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 18, 46
_CHARACTER, _STRONG, _LINE, _RADIUS = 6.9, 7.8, 14, 9
_MANY = 8  # points: more than that, and only the front is named, the rest by number
_TICKS = 5

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Point:
    """A candidate in a plot: ``x`` in the plot's unit, ``drop`` with its interval in points of accuracy lost."""

    name: str
    number: int
    x: float
    drop: float
    low: float
    high: float
    state: Literal["chosen", "kept", "missed"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From data to pixels. ``start`` and ``end`` are where ``low`` and ``high`` lie."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond lie at the edge."""
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that keep their promises and that no other one of these beats in both: left to right. Pure."""
    kept = sorted((p for p in points if p.state != "missed"), key=lambda p: (p.x, p.drop, p.number))
    found: list[Point] = []
    for point in kept:
        if not found or point.drop < found[-1].drop:
            found.append(point)
    return found


def scatter(points: Sequence[Point], *, title: str, x_label: str, max_drop: float) -> str:
    """``x`` against points of accuracy lost; lower left is better. ``max_drop`` in points: the line not to cross."""
    best = front(points)
    top = _y_top(points, max_drop)
    bottom = min(0.0, *(max(p.low, -top) for p in points), *(p.drop for p in points))
    x = Axis(low=0.0, high=max(p.x for p in points) * 1.12 or 1.0, start=_LEFT, end=_WIDTH - _RIGHT)
    margin = (top - bottom) * 0.06
    y = Axis(low=bottom - margin, high=top + margin, start=_HEIGHT - _BOTTOM, end=_TOP)
    parts = [_axes(x, y, x_label, "accuracy lost, points"), _limit(x, y, max_drop)]
    if len(best) > 1:
        path = f"M{x.at(best[0].x):.1f} {y.at(best[0].drop):.1f}"
        path += "".join(f"H{x.at(p.x):.1f}V{y.at(p.drop):.1f}" for p in best[1:])  # as a stair: nothing lies between
        parts.append(f"<path class='front' d='{path}'/>")
    taken = [_around(x.at(p.x), y.at(p.drop)) for p in points] + [
        (x.at(p.x), y.at(p.drop) - 2, x.at(q.x), y.at(p.drop) + 2) for p, q in pairwise(best)
    ]
    for point in sorted(points, key=lambda p: (p.state != "chosen", p not in best, p.number)):
        if len(points) <= _MANY or point.state == "chosen" or point in best:
            parts.append(_label(point, x.at(point.x), y.at(point.drop), taken, y))
    for point in sorted(points, key=lambda p: p.state == "chosen"):  # the chosen one on top
        parts.append(_mark(point, x, y))
    listed = "; ".join(f"{p.name}: {p.x:.3g}, {p.drop:+.2f} points, {p.state}" for p in points)
    return _svg(
        title, f"{x_label} and accuracy lost. {listed}. Front: {', '.join(p.name for p in best) or 'none'}.", parts
    )


def curve(values: Sequence[float], *, title: str, y_label: str, best: int | None = None) -> str:
    """One value per epoch; ``best`` counts from 1."""
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.05 or 1.0
    x = Axis(low=1.0, high=max(2.0, len(values)), start=_LEFT + 12, end=_WIDTH - _RIGHT - 12)
    y = Axis(low=low - room, high=high + room, start=_HEIGHT - _BOTTOM, end=_TOP)
    places = [(x.at(epoch), y.at(value)) for epoch, value in enumerate(values, start=1)]
    parts = [_axes(x, y, "epoch", y_label, whole=True)]
    parts.append(f"<polyline class='curve' points='{' '.join(f'{a:.1f},{b:.1f}' for a, b in places)}'/>")
    for epoch, (value, (a, b)) in enumerate(zip(values, places, strict=True), start=1):
        parts.append(
            f"<circle class='dot' cx='{a:.1f}' cy='{b:.1f}' r='4'><title>epoch {epoch}: {value:.4f}</title></circle>"
        )
        if epoch == best:
            side = "end" if a > _WIDTH / 2 else "start"
            parts.append(f"<circle class='ring' cx='{a:.1f}' cy='{b:.1f}' r='8'/>")
            parts.append(
                f"<text class='strong' x='{a:.1f}' y='{b + 26:.1f}' text-anchor='{side}'>kept: {value:.4f}</text>"
            )
    return _svg(title, f"{y_label} per epoch: {', '.join(f'{value:.4f}' for value in values)}.", parts)


def _y_top(points: Sequence[Point], max_drop: float) -> float:
    """High enough for the limit and for all but outliers, which are drawn at the edge with their figure."""
    wanted = max(max_drop * 1.5, 0.1)
    ordinary = [p.drop for p in points if p.drop <= wanted * 3]
    return max([wanted, *ordinary, *(min(p.high, wanted) for p in points)])


def _axes(x: Axis, y: Axis, x_label: str, y_label: str, *, whole: bool = False) -> str:
    parts = []
    for value in _ticks(y.low, y.high):
        at = y.at(value)
        parts.append(f"<path class='grid' d='M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}'/>")
        parts.append(f"<text class='soft' x='{_LEFT - 7}' y='{at + 4:.1f}' text-anchor='end'>{_figure(value)}</text>")
    for value in _ticks(x.low, x.high):
        if whole and value != int(value):
            continue
        at = x.at(value)
        parts.append(
            f"<text class='soft' x='{at:.1f}' y='{_HEIGHT - _BOTTOM + 17}' text-anchor='middle'>{_figure(value)}</text>"
        )
    base = _HEIGHT - _BOTTOM
    parts.append(f"<path class='axis' d='M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}'/>")
    parts.append(
        f"<text x='{(_LEFT + _WIDTH - _RIGHT) / 2}' y='{_HEIGHT - 8}' text-anchor='middle'>{text(x_label)}</text>"
    )
    middle = (_TOP + base) / 2
    parts.append(f"<text transform='translate(14 {middle}) rotate(-90)' text-anchor='middle'>{text(y_label)}</text>")
    return "".join(parts)


def _limit(x: Axis, y: Axis, max_drop: float) -> str:
    at = y.at(max_drop)
    label = f"<text class='limit-text' x='{x.end}' y='{at - 5:.1f}' text-anchor='end'>allowed: {max_drop:g}</text>"
    return f"<path class='limit' d='M{_LEFT} {at:.1f}H{x.end}'/>{label}"


def _mark(point: Point, x: Axis, y: Axis) -> str:
    a, b = x.at(point.x), y.at(point.drop)
    spread = (
        f"<path class='span' d='M{a:.1f} {y.at(point.low):.1f}V{y.at(point.high):.1f}'/>"
        if point.high > point.low
        else ""
    )
    ring = f"<circle class='ring' cx='{a:.1f}' cy='{b:.1f}' r='{_RADIUS + 4}'/>" if point.state == "chosen" else ""
    said = {"chosen": "chosen", "kept": "keeps its promises", "missed": "misses a promise"}[point.state]
    told = f"{point.name}: {point.x:.3g}, {point.drop:+.2f} points [{point.low:+.2f}, {point.high:+.2f}], {said}"
    return (
        f"<g><title>{text(told)}</title>{spread}{ring}"
        f"<circle class='{point.state}' cx='{a:.1f}' cy='{b:.1f}' r='{_RADIUS}'/>"
        f"<text class='number{' on-missed' if point.state == 'missed' else ''}' x='{a:.1f}' y='{b + 4:.1f}' "
        f"text-anchor='middle'>{point.number}</text></g>"
    )


def _label(point: Point, a: float, b: float, taken: list[Box], y: Axis) -> str:
    """The name where there is room for it; elsewhere the number in the mark has to do."""
    words = point.name + (f" ({point.drop:+.1f} ↑)" if point.drop > y.high else "")
    width = len(words) * (_STRONG if point.state == "chosen" else _CHARACTER)
    gap = _RADIUS + 7
    beside = [(a + gap, b + 4, "start"), (a - gap - width, b + 4, "end")]
    above = [(a - width / 2, b - gap - 3, "middle"), (a - width / 2, b + gap + 12, "middle")]
    aslant = [(a + 4, b + shift, "start") for shift in (-20, 26, -34, 40)]
    aslant += [(a - width - 4, b + shift, "end") for shift in (-20, 26, -34, 40)]
    for left, base, anchor in beside + above + aslant:
        box = (left, base - _LINE + 3, left + width, base + 3)
        fits = box[0] >= _LEFT + 2 and box[2] <= _WIDTH - 2 and box[1] >= 2 and box[3] <= _HEIGHT - _BOTTOM
        if fits and not any(_meet(box, other) for other in taken):
            taken.append(box)
            at = {"start": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
            strong = " class='strong'" if point.state == "chosen" else ""
            return f"<text{strong} x='{at:.1f}' y='{base:.1f}' text-anchor='{anchor}'>{text(words)}</text>"
    return ""


def _around(a: float, b: float) -> Box:
    reach = _RADIUS + 3
    return a - reach, b - reach, a + reach, b + reach


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _ticks(low: float, high: float) -> list[float]:
    """Round values within the range: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


def _svg(title: str, description: str, parts: Sequence[str]) -> str:
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{text(title)}. {text(description)}'>"
        f"<title>{text(title)}</title><desc>{text(description)}</desc>{''.join(parts)}</svg>"
    )
