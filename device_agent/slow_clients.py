"""Clients that keep a connection and hardly move: each would hold a descriptor and memory as long as it likes.

A request's head must be whole within the limit of its first byte (of the connection, when none came yet). A body, and
an answer that its client reads, must move ``LEAST_BYTES`` within it: a narrow link may take hours for a long body, and
a client that sends a byte now and then gets nowhere. No request is timed; all connections are looked at every quarter
of the limit, so it is kept to a quarter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

#: In every ``receive_timeout_s``, of a body or an answer: 2 kbit/s at the default.
LEAST_BYTES = 16 * 1024
LOOKS = 4  # in each limit

Part = Literal["head", "body", "answer"]


class Progress(NamedTuple):
    """What a connection waits for its client to do: the ``part``, of which request, and how far that is, in bytes."""

    part: Part
    request: int
    done_bytes: int


class Connection(Protocol):
    """What is looked at; :class:`device_agent.http_protocol.DoorProtocol` is one."""

    def progress(self) -> Progress | None:
        """None: it is our turn, not the client's."""
        ...

    def too_slow(self, part: Part, limit_s: float) -> None:
        """Its client had its time."""
        ...


class SlowClients:
    """:meth:`look` now and then."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._next_at = 0.0
        self._since: dict[Connection, tuple[Progress, float]] = {}  # as first seen, and when that was

    def look(self, connections: Iterable[Connection], now: float) -> None:
        """Tell each connection whose client had its time. ``now``: monotonic, in seconds."""
        if now < self._next_at:
            return
        self._next_at = now + self._limit_s / LOOKS
        before, self._since = self._since, {}
        for connection in tuple(connections):
            progress = connection.progress()
            if progress is None:
                continue
            seen, since = before.get(connection, (progress, now))
            if _moved(seen, progress):
                seen, since = progress, now
            if now - since >= self._limit_s:
                connection.too_slow(progress.part, self._limit_s)
            else:
                self._since[connection] = seen, since


def _moved(before: Progress, now: Progress) -> bool:
    if (before.part, before.request) != (now.part, now.request):
        return True
    return now.part != "head" and abs(now.done_bytes - before.done_bytes) >= LEAST_BYTES
