"""The agent's own memory, for what no estimate sees of messages that aren't whole: long ones can hide behind packed
ones, and behind what goes on beside a stream.

A message is no longer than what its connection brought while it was awaited. Where all that are awaited could be more
than they may, and the agent has grown by several times that since they couldn't, the connection that may hold most is
to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from device_agent.worker_memory import resident_bytes

#: Times ``in_flight_bytes`` that the agent may grow: messages are held in pieces, and unpacked, parsed and handed on.
TIMES = 4

Connection = TypeVar("Connection")


class Wall:
    """``limit_bytes``: what messages may hold together; ``resident``: this process's memory, in bytes."""

    def __init__(self, limit_bytes: Callable[[], int], resident: Callable[[], int] = resident_bytes) -> None:
        self._limit_bytes = limit_bytes
        self._resident = resident
        self._floor = resident()

    def over(self, may_hold: Mapping[Connection, int]) -> Connection | None:
        """The one to end, if any. ``may_hold``: the most that the messages that are awaited there can be, in bytes."""
        limit, resident = self._limit_bytes(), self._resident()
        if sum(may_hold.values()) <= limit:
            self._floor = resident
            return None
        return max(may_hold, key=may_hold.__getitem__) if resident - self._floor > TIMES * limit else None
