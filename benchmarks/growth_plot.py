"""Panels of curves side by side on logarithmic axes, as SVG text: no plotting library for three small pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 330, 250, 62, 44, 16
COLOURS = ("#1f6feb", "#d1570c", "#57606a")


@dataclass(frozen=True)
class Curve:
    """Points (x, y), both positive, x rising."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One picture; ``x`` and ``y`` say what is along the axes."""

    x: str
    y: str
    curves: Sequence[Curve]


def drawn(panels: Sequence[Panel]) -> str:
    """The panels in a row."""
    parts = [f'<g transform="translate({index * WIDTH},0)">{_panel(panel)}</g>' for index, panel in enumerate(panels)]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#24292f"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>\n'


def _panel(panel: Panel) -> str:
    across = Scale.over([x for curve in panel.curves for x, _ in curve.points], LEFT, WIDTH - 14)
    up = Scale.over([y for curve in panel.curves for _, y in curve.points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - 14 - LEFT}" height="{HEIGHT - BOTTOM - TOP}" fill="#f6f8fa"/>'
    ]
    for value in across.ticks():
        parts.append(_text(across.at(value), HEIGHT - BOTTOM + 14, _told(value), "middle"))
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 14}" stroke="#d0d7de"/>')
        parts.append(_text(LEFT - 4, y + 4, _told(value), "end"))
    for index, curve in enumerate(panel.curves):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{TOP + 14 * (index + 1)}" fill="{colour}">{escape(curve.name)}</text>')
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, panel.x, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 12 {middle:.0f})">{_text(12, middle, panel.y, "middle")}</g>')
    return "".join(parts)


@dataclass(frozen=True)
class Scale:
    """Whole decades from ``low`` to ``high``, laid from ``begin`` to ``end``."""

    low: int
    high: int
    begin: float
    end: float

    @staticmethod
    def over(values: Sequence[float], begin: float, end: float) -> Scale:
        """The decades that hold all of these."""
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return Scale(low, max(high, low + 1), begin, end)

    def at(self, value: float) -> float:
        """Where a value lies."""
        return self.begin + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """One a decade."""
        return [10.0**exponent for exponent in range(self.low, self.high + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _told(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
