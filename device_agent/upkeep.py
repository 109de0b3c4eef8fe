"""Looks after the memory of all models together: now and then beside their requests, and when one needs room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType

from device_agent import recycle
from device_agent.model_host import ModelHost
from device_agent.residency import Resident, to_thin_out, to_unload
from device_agent.settings import BundleEntry
from device_agent.surroundings import Surroundings
from device_agent.trial_run import TrialRun

log = logging.getLogger("device_agent")

EVERY_S = 2.0
PAUSE_S = 30.0  # between two replacements for want of memory: the kernel needs a while to be at ease again


class Upkeep:
    """Works from :meth:`start` to :meth:`stop`; ``hosts`` and ``entries`` are what is deployed at any moment.
    ``trials``: who stands beside them to be tried takes memory too, and neither of the two goes for anybody."""

    def __init__(
        self,
        hosts: Mapping[str, ModelHost],
        entries: Mapping[str, BundleEntry],
        around: Surroundings,
        trials: Mapping[str, TrialRun] = MappingProxyType({}),
    ) -> None:
        self._trials = trials
        self._hosts = hosts
        self._entries = entries
        self._around = around
        self._relieved_at = float("-inf")
        self._exceeded = False
        self._failed = False
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look again and again."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="upkeep")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                self.relieve()
                await self.keep_budget()
            except Exception:  # no reason to stop looking
                if not self._failed:  # once, and not every two seconds
                    log.exception("the models' memory could not be looked after; said once")
                self._failed = True
            else:
                self._failed = False

    def relieve(self) -> None:
        """Replace who is above its ceiling and wasn't to be replaced so soon; while memory is short, who grew most."""
        now = self._around.clock()
        places = [place for host in self._hosts.values() for place in host.instance.places]
        for place in places:
            place.recycling.look()
        if now - self._relieved_at < PAUSE_S or not recycle.is_short(self._around.room()):
            return
        able = [host for host in self._hosts.values() if host.instance.crew.spare_bytes]
        if able:
            self._relieved_at = now
            min(able, key=lambda host: host.instance.resting.used_at).instance.crew.let_go("memory is short")
            return
        found = {place: place.recycling.worker for place in places}
        grown = recycle.most_grown({place: worker for place, worker in found.items() if worker is not None})
        if grown is not None:
            self._relieved_at = now
            grown.recycling.ask("memory_pressure")

    async def keep_budget(self, asking: str | None = None) -> None:
        """Unload what doesn't fit beside the others, ``asking`` last of all; tell when that isn't enough."""
        budget = self._around.policy.memory_budget_bytes
        # A resident set is never less than the proportional one, and costs nothing to know.
        hosts = [*self._hosts.values(), *(trial.successor for trial in self._trials.values())]
        if budget is None or sum(host.instance.rss_bytes or 0 for host in hosts) <= budget:
            self._exceeded = False
            return
        async with self._turn:
            await self._unload(budget, asking)
        held = sum(each.held_bytes for each in self._residents(asking))
        if held > budget and not self._exceeded:
            self._around.emit("memory_budget_exceeded", held_bytes=held, memory_budget_bytes=budget)
            log.warning(
                "the models take %.0f MB, and none of them may go; the budget is %.0f", held / 1e6, budget / 1e6
            )
        self._exceeded = held > budget

    @contextlib.asynccontextmanager
    async def make_room(self, model: str) -> AsyncIterator[None]:
        """Unload others until that one fits, as far as others may go; it is loaded inside. One at a time: what two are
        loading together, neither has seen in the memory yet."""
        if (budget := self._around.policy.memory_budget_bytes) is None:
            yield
            return
        async with self._turn:
            await self._unload(budget, model)
            yield

    def has_room(self, need_bytes: int) -> bool:
        """Whether so much is left that nobody would have to go for it."""
        budget = self._around.policy.memory_budget_bytes
        return budget is None or sum(each.held_bytes for each in self._residents(None)) + need_bytes <= budget

    def room_was_made(self) -> None:
        """A model has gone, and nobody asked it to for another."""
        for host in self._hosts.values():
            host.instance.crew.room_was_made()

    async def _unload(self, budget: int, asking: str | None) -> None:
        while (model := to_thin_out(self._residents(asking), budget)) is not None:
            await self._hosts[model].instance.crew.let_go("others need the room")
        for model in to_unload(self._residents(asking), budget, asking=asking):
            if (host := self._hosts.get(model)) is not None:  # else it went by itself meanwhile
                await host.instance.resting.leave()

    def _residents(self, asking: str | None) -> list[Resident]:
        tried = [
            Resident(
                model=f"{name} on trial",
                held_bytes=trial.successor.instance.resting.held_bytes,
                used_at=float("inf"),
                stays=True,
            )
            for name, trial in self._trials.items()
        ]
        return tried + [
            Resident(
                model=name,
                held_bytes=host.instance.resting.held_bytes,
                spare_bytes=host.instance.crew.spare_bytes,
                used_at=float("inf") if host.running or host.queued else host.instance.resting.used_at,
                stays=host.state != "ready" or self._pinned(name) or name in self._trials,
            )
            for name, host in self._hosts.items()
            if host.state != "resting" or name == asking
        ]

    def _pinned(self, model: str) -> bool:
        entry = self._entries.get(model)
        return entry is not None and entry.pinned
