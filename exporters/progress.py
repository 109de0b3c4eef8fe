"""Telling people how far an export is: live on a terminal, plain lines elsewhere, silent in an API."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """What the pipeline reports. ``done`` and ``total`` count steps of the stage that started last."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage starts."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """The stage moved on."""

    def message(self, text: str) -> None:
        """Something worth a line: a choice, a warning."""


class SilentProgress:
    """Says nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        """Nothing."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


class LineProgress:
    """Plain lines on a stream, one per stage and at most one per ten seconds within it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._name = ""
        self._started_at = self._said_at = 0.0

    def stage(self, name: str, detail: str = "") -> None:
        """One line."""
        self._name, self._started_at = name, time.monotonic()
        self._said_at = self._started_at
        self._say(f"{name}: {detail}" if detail else name)

    def update(self, done: int, total: int, note: str = "") -> None:
        """A line with the time left, when the last one is old."""
        now = time.monotonic()
        if now - self._said_at < _LINE_EVERY_S or not done:
            return
        self._said_at = now
        left_s = (now - self._started_at) / done * (total - done)
        self._say(", ".join(filter(None, (f"{self._name}: {done}/{total}", f"{left_s:.0f} s left", note))))

    def message(self, text: str) -> None:
        """One line."""
        self._say(f"  {text}")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class TerminalProgress:
    """A live bar per stage (rich). Use as a context manager, so that the terminal is left tidy."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=Console(stderr=True),
        )
        self._task: int | None = None

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bars.stop()

    def stage(self, name: str, detail: str = "") -> None:
        """A new bar; the one before is full."""
        self._finish()
        self._task = self._bars.add_task(f"{name:<9}", total=None, note=detail)

    def update(self, done: int, total: int, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            fields = {"note": note} if note else {}
            self._bars.update(self._task, completed=done, total=total, **fields)  # type: ignore[arg-type]

    def message(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(f"  {text}", markup=False, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total)  # type: ignore[arg-type]
            self._task = None
