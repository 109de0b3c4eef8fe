"""The workers of a model beyond the one that it needs: started beside it once it is live, one at a time, and again when
one is lost.

They are worth having and never worth another's place: none is started while the device, or the budget of all models,
has no memory for it, and they are the first to go when another model needs room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from device_agent import recycle
from device_agent.background import ended, kept_up
from device_agent.place import Place
from device_agent.quarantine import Quarantine
from device_agent.surroundings import Surroundings
from device_agent.worker_pool import WorkerHandle

if TYPE_CHECKING:
    from device_agent.model_instance import ModelInstance

log = logging.getLogger("device_agent.model")

NO_ROOM_PAUSE_S = 10.0  # until it is looked again whether there is room for one
MADE_ROOM_PAUSE_S = 60.0  # after one had to go: whoever needed its room is still loading

SpareRoom = Callable[[int], bool]  # whether so many bytes are left of what all models may take


def no_limit(need_bytes: int) -> bool:
    """There is always room."""
    return True


class Crew:
    """Of one model. Nothing is started before :meth:`muster`, and nothing after :meth:`end`."""

    def __init__(self, instance: ModelInstance, around: Surroundings, has_room: SpareRoom = no_limit) -> None:
        self.on_joined: Callable[[], None] = lambda: None  # there is a worker more
        self.on_failed: Callable[[], None] = lambda: None  # one that was to come isn't there
        self._instance = instance
        self._around = around
        self._has_room = has_room
        self._changed = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._ended = True

    async def muster(self) -> None:
        """Try to start each that isn't there, and look after them from then on. Whatever keeps one from starting is
        told as of any worker, and tried again later."""
        if len(self._instance.places) == 1 or self._instance.state == "stopped":
            return
        self._ended = False
        for place in self._instance.places:
            if not self._ended and self._instance.ready and _is_empty(place):
                await self._start(place)
        if not self._ended and self._keeper is None:
            keep = kept_up(self._step, f"the workers of {self._instance.name} could not be looked after")
            self._keeper = asyncio.get_running_loop().create_task(keep, name=f"crew-{self._instance.name}")

    def look(self) -> None:
        """Something has changed: one was lost, or the model serves again."""
        self._changed.set()

    def try_now(self) -> None:
        """Somebody wants those that are missing, however often they died."""
        self._instance.quarantine = Quarantine()
        for place in self._instance.places:
            place.not_before = float("-inf")
        self.look()

    def room_was_made(self) -> None:
        """Another model has gone: those that there was no room for are tried at once."""
        for place in self._instance.places:
            if place.wants_room:
                place.not_before = float("-inf")
                self.look()

    async def settled(self) -> None:
        """Wait for the end of a start that goes on, if any does."""
        if self._starting is not None:
            await asyncio.wait((self._starting,))

    async def rest(self) -> None:
        """Give up a start that goes on: the model ends its workers."""
        await ended(self._starting)

    async def end(self) -> None:
        """Start nobody any more, and wait for those that were sent away."""
        self._ended = True
        keeper, self._keeper = self._keeper, None
        await ended(keeper, self._starting, *self._retiring)

    # Memory

    @property
    def spare_bytes(self) -> int:
        """What those take that could go."""
        return sum(place.held_bytes for place in self._instance.places if self._can_go(place))

    def let_go(self, why: str) -> Awaitable[None]:
        """Send one away that the model can do without, when its batch is answered; awaited: when it has gone."""
        place = next(place for place in reversed(self._instance.places) if self._can_go(place))
        freed, old = place.held_bytes, place.worker
        place.emptied(0.0, why)
        place.not_before = self._around.clock() + MADE_ROOM_PAUSE_S
        place.worker = old.successor()
        task = asyncio.get_running_loop().create_task(_retire(old), name=f"retiring-{self._instance.name}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        self.look()
        log.info("%s: one of its workers is sent away, %.0f MB: %s", self._instance.name, freed / 1e6, why)
        return asyncio.shield(task)

    def _can_go(self, place: Place) -> bool:
        return place is not self._instance.lead and place.worker.ready

    def _want_of_room(self) -> str | None:
        lead = self._instance.lead
        taken = lead.recycling.worker
        if taken is not None and not recycle.fits_beside(self._around.room(), taken, lead.plan.start_s):
            return "this device has no memory for another worker"
        if not self._has_room(round(recycle.GROWN * lead.own_bytes)):
            return "memory_budget_bytes leaves no room for another worker"
        return None

    # Starting

    async def _step(self) -> None:
        self._changed.clear()
        empty = [place for place in self._instance.places if _is_empty(place)] if self._instance.ready else []
        place = min(empty, key=lambda each: each.not_before, default=None)
        wait_s: float | None = None
        if place is not None:
            until = max(place.not_before, self._instance.quarantine.until or place.not_before)
            wait_s = until - self._around.clock()
            if wait_s <= 0:
                if self._instance.quarantine.until is not None:
                    self._instance.quarantine = self._instance.quarantine.tried()
                await self._start(place)
                return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), wait_s)

    async def _start(self, place: Place) -> None:
        if (why := self._want_of_room()) is not None:
            place.detail, place.not_before = why, self._around.clock() + NO_ROOM_PAUSE_S
            place.wants_room = True
            return
        place.wants_room = False
        task = asyncio.get_running_loop().create_task(self._started(place), name=f"crew-start-{self._instance.name}")
        self._starting = task
        try:
            await asyncio.wait((task,))
        finally:
            await ended(task)
            self._starting = None

    async def _started(self, place: Place) -> None:
        lead, began = self._instance.lead.worker, self._around.clock()
        spec = replace(lead.spec, cpus=place.worker.spec.cpus)
        worker = lead.successor(spec, partial(self._instance.told_lost, place))
        place.starting = True
        try:
            await worker.start("quick", timeout_s=self._around.policy.load_timeout_s)
            if self._instance.joined(place, worker, self._around.clock() - began):
                self.on_joined()
                return
            await worker.stop(grace_s=0.0)
        except BaseException as error:
            await worker.stop(grace_s=0.0)
            if not isinstance(error, Exception):
                raise
            self._instance.did_not_start(place, error)
            self.on_failed()
        finally:
            place.starting = False


def _is_empty(place: Place) -> bool:
    return not (place.live or place.starting or place.worker.ready)


async def _retire(old: WorkerHandle) -> None:
    try:
        await old.retire()
    finally:  # the model may be stopped while its last batch runs
        await old.stop(grace_s=0.0)
