"""Callers without a known key: written down with their address, in ``audit/_unauthorized.jsonl``, never with their key.

Somebody who tries keys may come ten thousand times a second. A few of those a second are written, the next line says
how many were not, and the file is bounded as a tenant's audit is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from aios_edge.telemetry import rfc3339
from device_agent.audit import CLIP_CHARS, AuditLog
from device_agent.quota import Bucket

NAME = "_unauthorized"  # no tenant's: those begin with a letter or digit
LIMIT_BYTES = 1_000_000
LINES_PER_S = 10.0
BURST = 100.0
_ON_THE_SOCKET = "unix"


class Unauthorized(msgspec.Struct, frozen=True, kw_only=True):
    """One 401. ``address`` is the other end's, or ``unix:`` and the user id of its process; ``key_sent``: whether there
    was one; ``not_written``: how many came since the line before, and have none."""

    ts: str
    address: str
    method: str
    path: str
    key_sent: bool
    not_written: int

    @property
    def tenant(self) -> str:
        """Whose file it goes to."""
        return NAME


def address_of(client: tuple[str, int] | None, uid: int | None) -> str:
    """Where a request came from: of what the door knows of its other end."""
    return client[0] if client else _ON_THE_SOCKET if uid is None else f"{_ON_THE_SOCKET}:{uid}"


class Strangers:
    """``tell`` hears each one's address."""

    def __init__(
        self,
        state_dir: Path,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._log = AuditLog(state_dir, {NAME: LIMIT_BYTES})
        self._tell = tell
        self._clock = clock
        self._wall = wall
        self._bucket = Bucket.full(LINES_PER_S, BURST, clock())
        self._not_written = 0

    def came(self, address: str, method: str, path: str, *, key_sent: bool) -> None:
        """One came, and was sent away."""
        self._tell(address)
        now = self._clock()
        if self._bucket.wait_s(now) > 0:
            self._not_written += 1
            return
        self._bucket = self._bucket.taken(now)
        record = Unauthorized(
            ts=rfc3339(self._wall()),
            address=address,
            method=method[:CLIP_CHARS],
            path=path[:CLIP_CHARS],
            key_sent=key_sent,
            not_written=self._not_written,
        )
        self._not_written = 0
        self._log.write(record)

    def close(self) -> None:
        """Write what waits. Not for the event loop."""
        self._log.close()
