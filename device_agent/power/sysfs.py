"""Reading one value from a file of ``/sys`` or ``/proc``: the value, or why not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from device_agent.power.reading import Skipped


def read_text(path: Path) -> str | Skipped:
    """The file's content, stripped."""
    try:
        return path.read_text("utf-8", "replace").strip("\0\n\t ")
    except PermissionError:
        return Skipped(path=str(path), reason="permission denied: run as root or make the file readable")
    except FileNotFoundError:
        return Skipped(path=str(path), reason="no such file")
    except OSError as error:  # power-gated sensors answer EAGAIN, EIO, ENODATA …
        return Skipped(path=str(path), reason=f"can't be read: {error.strerror or error}")


def read_int(path: Path) -> int | Skipped:
    """The file's content as an integer."""
    text = read_text(path)
    if isinstance(text, Skipped):
        return text
    try:
        return int(text)
    except ValueError:
        return Skipped(path=str(path), reason=f"is not a number: {text[:40]!r}")


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted as people count: zone2 before zone10."""
    return sorted(paths, key=lambda path: [int(part) if part.isdigit() else part for part in _PARTS.split(str(path))])


_PARTS = re.compile(r"(\d+)")
