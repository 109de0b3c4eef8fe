"""The agent's own memory, for what no estimate sees of messages that aren't whole: long ones can hide behind packed
ones, and behind what goes on beside a stream.

Where those that are awaited could be more than they may, and the agent has grown by several times that since they
couldn't, connections are to end: first those that likely hold most. What it grew by without anything coming in, as for
a model that was loaded into this process, isn't theirs, nor is what is free and was only kept.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from device_agent.worker_memory import resident_bytes

#: Times its bytes that a message takes: it is held in pieces, unpacked, parsed and handed on.
TIMES = 4


class MayHold(NamedTuple):
    """Bytes of messages that are awaited on a connection: all that came since, without what whole messages account for,
    which may be too much, and with that."""

    likely: int
    most: int


Connection = TypeVar("Connection")


class Wall:
    """``limit_bytes``: what messages may hold together; ``resident``: this process's memory, in bytes."""

    def __init__(self, limit_bytes: Callable[[], int], resident: Callable[[], int] = resident_bytes) -> None:
        self._limit_bytes = limit_bytes
        self._resident = resident
        self._before = self._floor = resident()
        self._came_before = 0

    def over(self, may_hold: Mapping[Connection, MayHold], came_bytes: int) -> list[Connection]:
        """Those to end. ``came_bytes``: on all connections since this was last asked."""
        limit, resident = self._limit_bytes(), self._resident()
        self._floor += max(0, resident - self._before - TIMES * (came_bytes + self._came_before))
        self._floor = min(self._floor, resident)
        self._came_before, self._before = came_bytes, resident
        left = sum(each.most for each in may_hold.values())
        if left <= limit:
            self._floor = resident
        if resident - self._floor <= TIMES * limit:
            return []
        _give_back()
        self._before = self._resident()
        excess = self._before - self._floor - TIMES * limit
        ending: list[Connection] = []
        for connection in sorted(may_hold, key=may_hold.__getitem__, reverse=True):
            if excess <= 0 or left <= limit:
                break
            ending.append(connection)
            left -= may_hold[connection].most
            excess -= may_hold[connection].most
        return ending


def _give_back() -> None:
    """To the kernel, what is free: some milliseconds. Not every C library can."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
