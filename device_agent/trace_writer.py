"""Writes a trace: in a thread of its own, bounded in bytes, and never a reason to keep a request waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from aios_edge.telemetry import rfc3339
from aios_edge.version import __version__
from device_agent.trace import Began, InForce, Traced

log = logging.getLogger("device_agent")

_Line = tuple[str | None, bytes]  # the digest of its policy, and the line

FLUSH_S = 0.5
#: Lines that wait for a slow disk; what comes beyond them is not in the trace.
MOST_WAITING = 20_000


class TraceWriter:
    """Appends to ``path``; at half of ``max_bytes`` the file becomes ``path.1``, which replaces the one before it.

    A disk that fails costs lines, which are counted and logged once, and nothing else. All methods belong to the event
    loop.
    """

    def __init__(self, path: Path, max_bytes: int, wall: Callable[[], float] = time.time) -> None:
        self.dropped = 0
        self._path = path
        self._part_bytes = max(max_bytes // 2, 1)
        self._head = msgspec.json.encode(Began(ts=rfc3339(wall()), agent_version=__version__)) + b"\n"
        self._begun = False
        self._policies: dict[str, bytes] = {}
        self._defined: set[str] = set()  # in the file as it is; the thread's
        self._waiting: list[_Line] = []
        self._timer: asyncio.TimerHandle | None = None
        self._disk = ThreadPoolExecutor(1, "trace")
        self._complained = False

    def define(self, policy: InForce) -> None:
        """Make a policy known; it is written before the first line that names it, in each part of the file."""
        self._policies[policy.digest] = msgspec.json.encode(policy) + b"\n"

    def write(self, line: Traced) -> None:
        """Have it written soon."""
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        self._waiting.append((line.policy, msgspec.json.encode(line) + b"\n"))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    async def stop(self) -> None:
        """Write what waits, and end."""
        if self._timer is not None:
            self._timer.cancel()
        lines, self._waiting = self._waiting, []
        await asyncio.get_running_loop().run_in_executor(self._disk, self._append, lines)
        self._disk.shutdown(wait=False)

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        written = asyncio.get_running_loop().run_in_executor(self._disk, self._append, lines)
        written.add_done_callback(self._flushed)

    def _flushed(self, _: asyncio.Future[None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush) if self._waiting else None

    def _append(self, lines: list[_Line]) -> None:
        """In the thread. Without lines the file isn't touched: it may be another agent's, which this one found here."""
        begin = size = 0
        for index, (_, line) in enumerate(lines):  # so many came since the last time that one part can't hold them
            if size and size + len(line) > self._part_bytes // 2:
                self._append_some(lines[begin:index])
                begin, size = index, 0
            size += len(line)
        if lines:
            self._append_some(lines[begin:])

    def _append_some(self, lines: list[_Line]) -> None:
        try:
            text = self._text(lines)
            if self._path.exists() and self._path.stat().st_size + len(text) > self._part_bytes:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._begun = False
                text = self._text(lines)
            with self._path.open("ab") as file:
                file.write(text)
            self._begun, self._complained = True, False
        except OSError as error:
            self._begun = False  # what was written of it, nobody knows
            self.dropped += len(lines)
            if not self._complained:
                log.warning("the trace can't be written to %s (%s)", self._path, error.strerror or error)
                self._complained = True

    def _text(self, lines: list[_Line]) -> bytes:
        pieces = []
        if not self._begun:
            self._defined.clear()
            pieces.append(self._head)
        for digest, line in lines:
            if digest in self._policies and digest not in self._defined:
                self._defined.add(digest)
                pieces.append(self._policies[digest])
            pieces.append(line)
        return b"".join(pieces)
