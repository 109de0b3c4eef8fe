"""When a worker that took too much memory is replaced by a fresh one: pure.

A model that leaks, or an arena that a huge request has grown for ever, ends with the kernel killing somebody, perhaps
not the one whose fault it is. So a worker has a ceiling, and is replaced between two batches when it is above it. Each
replacement costs a start: they don't follow each other closer than a few starts, unless memory grows faster than that;
and a worker that is above its ceiling from the beginning isn't helped by a fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from device_agent.memory_room import Room

_Whose = TypeVar("_Whose")

FACTOR = 2.0  # times what the contract promises: the ceiling of a bundle that isn't given one
SHARE = 0.75  # of the memory that the kernel lets all of us have: the ceiling of everyone who isn't given one
GROWN = 1.1  # times what the worker had when it was ready: less is what serving takes
PAUSE = 3.0  # starts between two replacements: at most a quarter of the time goes into them
HASTE = 1.5  # times the ceiling, or what there is at all: at once, whatever it costs
SHORT = 0.05  # of the memory there is: the kernel is about to choose somebody
PRESSURE_PERCENT = 20.0  # of ten seconds waited for memory: everybody is slow already
LEAST_GROWTH_BYTES = 32_000_000  # below that a replacement gives back little
LEAST_GROWTH = 1.25  # times what it had when it was ready


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's resident set now and when it became ready, ``age_s`` ago."""

    rss_bytes: int
    ready_bytes: int
    age_s: float = 0.0

    def growth_bytes(self, during_s: float) -> float:
        """By how much it is going to grow, if it goes on like that."""
        return max(self.rss_bytes - self.ready_bytes, 0) * during_s / self.age_s if self.age_s else 0.0


def ceiling_bytes(asked: int | None, promised_bytes: int | None, room: Room) -> int | None:
    """What a worker may take: as it was set (0: whatever it wants), else by its contract and by what there is at all.
    None: whatever it wants."""
    if asked is not None:
        return asked or None
    promised = () if promised_bytes is None else (round(FACTOR * promised_bytes),)
    limit = () if room.limit_bytes is None else (round(SHARE * room.limit_bytes),)
    return min((*promised, *limit), default=None)


def above(worker: Worker, ceiling: int | None, room: Room, *, since_last_s: float, start_s: float) -> bool:
    """Whether it is to be replaced now; ``since_last_s``: since the model's last replacement began."""
    if ceiling is None or worker.rss_bytes <= max(ceiling, GROWN * worker.ready_bytes):
        return False
    at_once = min(HASTE * ceiling, *(() if room.limit_bytes is None else (SHARE * room.limit_bytes,)))
    return since_last_s >= PAUSE * start_s or worker.rss_bytes > at_once


def is_short(room: Room) -> bool:
    """Whether so little is left that the kernel may soon end somebody, or everybody waits for memory already."""
    available, limit = room.available_bytes, room.limit_bytes
    if available is not None and limit is not None and available < SHORT * limit:
        return True
    return (room.pressure_percent or 0.0) >= PRESSURE_PERCENT


def most_grown(workers: Mapping[_Whose, Worker]) -> _Whose | None:
    """Where memory is short: whose worker gives most of it back; None: none took more than it needs."""
    grown = {
        whose: worker.rss_bytes - worker.ready_bytes
        for whose, worker in workers.items()
        if worker.rss_bytes >= max(LEAST_GROWTH * worker.ready_bytes, worker.ready_bytes + LEAST_GROWTH_BYTES)
    }
    return max(grown, key=lambda whose: grown[whose], default=None)


def fits_beside(room: Room, worker: Worker, start_s: float) -> bool:
    """Whether a second worker may be loaded, for ``start_s``, while the first one serves and grows on; where nothing is
    known, it may."""
    if room.available_bytes is None or room.limit_bytes is None:
        return True
    need_bytes = GROWN * worker.ready_bytes + worker.growth_bytes(2 * start_s)  # two at a time are slower
    return room.available_bytes - need_bytes >= SHORT * room.limit_bytes and not is_short(room)
