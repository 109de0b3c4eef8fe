"""Looks after the memory of all models together, now and then, beside their requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from device_agent import recycle
from device_agent.model_host import ModelHost
from device_agent.surroundings import Surroundings

log = logging.getLogger("device_agent")

EVERY_S = 2.0
PAUSE_S = 30.0  # between two replacements for want of memory: the kernel needs a while to be at ease again


class Upkeep:
    """:meth:`run` until it is cancelled."""

    def __init__(self, hosts: Mapping[str, ModelHost], around: Surroundings) -> None:
        self._hosts = hosts
        self._around = around
        self._relieved_at = float("-inf")

    async def run(self) -> None:
        """Look again and again; a look that fails is no reason to stop looking."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                self.look()
            except Exception:
                log.exception("the models' memory could not be looked after")

    def look(self) -> None:
        """Replace who is above its ceiling and wasn't to be replaced so soon; the one that grew most, while memory is
        short."""
        now = self._around.clock()
        for host in self._hosts.values():
            host.instance.recycling.look()
        if now - self._relieved_at < PAUSE_S or not recycle.is_short(self._around.room()):
            return
        found = {name: host.instance.recycling.worker for name, host in self._hosts.items()}
        model = recycle.most_grown({name: worker for name, worker in found.items() if worker is not None})
        if model is not None:
            self._relieved_at = now
            self._hosts[model].instance.recycling.ask("memory_pressure")
