"""A model without a worker, because others needed the room: it ends all it has, and starts one again when it is asked.

It stays what it was otherwise: known to clients, with all that was learnt of it. The router counts the start in, so who
can't wait for it goes to the cloud or is told when to come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aios_edge.errors import RuntimeUnavailable
from device_agent.surroundings import Surroundings

if TYPE_CHECKING:
    from device_agent.model_instance import ModelInstance

log = logging.getLogger("device_agent.model")

SLICE_S = 2.0  # who is to leave and has work answers it for that long; the rest waits until it is back
MakeRoom = Callable[[str], contextlib.AbstractAsyncContextManager[None]]  # the model of that name may load inside


def no_budget(model: str) -> contextlib.AbstractAsyncContextManager[None]:
    """There is always room."""
    return contextlib.nullcontext()


class Resting:
    """Of one model. ``used_at``: when its last batch was answered, or when it was loaded."""

    def __init__(self, instance: ModelInstance, name: str, around: Surroundings, make_room: MakeRoom) -> None:
        self.used_at = around.clock()
        self._instance = instance
        self._name = name
        self._around = around
        self._make_room = make_room
        self._need_bytes = 0
        self._wanted = False
        self._leave_by: float | None = None
        self._changed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """What its workers take; where none is there, what the first that is started again took before it ended."""
        taken = sum(place.held_bytes for place in self._instance.places)
        return taken or self._need_bytes or self._instance.worker.rss_bytes or 0

    async def leave(self) -> None:
        """Make room: answer what waits, for :data:`SLICE_S` at most, and rest. Returns when it does, or died anyway."""
        if self._instance.state != "ready":
            return
        self._leave_by = self._around.clock() + SLICE_S
        self._instance.wake()
        await self._until(lambda: self._leave_by is None)

    def want(self) -> None:
        """Load it again though nobody waits: who asked couldn't, and may come back."""
        self._wanted = True
        self._instance.wake()

    async def back(self) -> None:
        """Load it again and wait for that; nothing happens where it is loaded. Raises when it doesn't serve then."""
        if self._instance.state == "resting":
            self.want()
        await self._until(lambda: self._instance.state not in ("resting", "waking"))
        if self._instance.state != "ready":
            raise RuntimeUnavailable(f"was not loaded again: {self._instance.detail}", where=self._name)

    def chore(self, waiting: int) -> Callable[[], Awaitable[None]] | None:
        """What is to be done before the next batch, while so many requests wait."""
        if self._instance.state == "resting":
            return self._wake_up if waiting or self._wanted else None
        if self._leave_by is not None and self._instance.state != "ready":  # it died instead
            self._tell_changed()
        if self._leave_by is not None and (not waiting or self._around.clock() >= self._leave_by):
            return self._rest
        return None

    async def _rest(self) -> None:
        instance, freed = self._instance, self.held_bytes
        self._need_bytes = instance.lead.held_bytes or freed
        self._wanted = False
        instance.state, instance.detail = "resting", "unloaded to make room; a request loads it again"
        await instance.crew.rest()
        for place in instance.places:
            place.emptied(self._around.clock(), instance.detail)
        await asyncio.gather(*(place.worker.stop() for place in instance.places))
        for place in instance.places:
            place.worker.rss_bytes, place.lost_at = None, 0.0
        self._tell_changed()
        self._around.emit("unloaded", model=self._name, reason="memory_budget", freed_bytes=freed)
        log.info("%s: unloaded to make room, %.0f MB", self._name, freed / 1e6)

    async def _wake_up(self) -> None:
        began = self._around.clock()
        self._wanted = False
        try:
            async with self._make_room(self._name):
                if not await self._instance.start_fresh("waking", "is being loaded again"):
                    return
        finally:
            self._tell_changed()
        self.used_at = now = self._around.clock()
        self._around.emit("loaded", model=self._name, took_s=round(now - began, 3))
        log.info("%s: loaded again after %.2f s", self._name, now - began)

    def _tell_changed(self) -> None:
        self._leave_by = None
        self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            # It may have died or been stopped instead, of which nobody tells here.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), SLICE_S)
            if self._instance.state not in ("ready", "resting", "waking"):
                self._leave_by = None
                return
