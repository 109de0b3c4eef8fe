"""Figures as people read them; a figure that wasn't measured is said to be so, never drawn as zero."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

MINUS, TIMES, DASH = "&minus;", "&times;", "&ndash;"
NONE = "<span class='none'>not measured</span>"


def text(value: object) -> str:
    """Safe inside HTML, attributes included."""
    return escape(str(value), quote=True)


def percent(share: float | None, digits: int = 2) -> str:
    """A share (0 … 1) in percent."""
    return NONE if share is None else f"{share * 100:.{digits}f} %"


def points(share: float, *, sign: bool = True) -> str:
    """A difference of shares, in points."""
    return f"{_signed(share * 100, sign=sign)} pt"


def between(low: float, high: float, *, sign: bool = True) -> str:
    """A 95 % interval of a difference of shares."""
    return f"{_signed(low * 100, sign=sign)} … {_signed(high * 100, sign=sign)}"


def _signed(value: float, *, sign: bool) -> str:
    written = f"{value:+.2f}" if sign else f"{value:.2f}"
    return written[1:] if written in ("+0.00", "-0.00") else written.replace("-", MINUS)


def megabytes(size_bytes: int | None) -> str:
    """MB = 10⁶ bytes."""
    return NONE if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def milliseconds(time_s: float | None) -> str:
    """Three significant digits, more where there are more whole ones."""
    if time_s is None:
        return NONE
    time_ms = time_s * 1e3
    return f"{time_ms:.0f} ms" if time_ms >= 100 else f"{time_ms:.3g} ms"


def times(ratio: float | None) -> str:
    """A ratio."""
    return NONE if ratio is None else f"{ratio:.2f}{TIMES}"


def name_of(candidate: str) -> str:
    """A candidate's name, which may be long: it may break after each of its parts."""
    return "<code>" + text(candidate).replace("+", "+<wbr>").replace("-", "-<wbr>") + "</code>"


def table(head: Iterable[str], rows: Iterable[str], *, caption: str, kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide. Heads and caption are HTML; a head with ``|`` before it is
    left-aligned text. ``rows`` are rows, or bodies of rows that belong together."""
    cells = "".join(
        f"<th scope='col' class='text'>{cell[1:]}</th>" if cell.startswith("|") else f"<th scope='col'>{cell}</th>"
        for cell in head
    )
    mark = f" class='{kind}'" if kind else ""
    body = "".join(rows)
    body = body if body.startswith("<tbody") else f"<tbody>{body}</tbody>"
    return (
        f"<div class='wide' tabindex='0' role='group' aria-label='Table'><table{mark}><caption>{caption}</caption>"
        f"<thead><tr>{cells}</tr></thead>{body}</table></div>"
    )


def folded(summary: str, content: str, *, opened: bool = False) -> str:
    """Content behind a line to click on; printed in full."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{content}</details>"
