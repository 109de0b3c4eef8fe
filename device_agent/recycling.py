"""Replaces a worker that took too much memory (:mod:`device_agent.recycle`), and loses no request by it; of several
that a model has, one at a time.

Where there is room the successor is loaded beside the worker that serves, and takes the next batch when it is ready.
Where there isn't, the worker ends between two batches and who waits, waits for the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from aios_edge.errors import BundleRefused
from device_agent import recycle
from device_agent.place import Place
from device_agent.recycle import Worker
from device_agent.surroundings import Surroundings
from device_agent.worker_pool import WorkerHandle, WorkerSpec

if TYPE_CHECKING:
    from device_agent.model_instance import ModelInstance

log = logging.getLogger("device_agent.model")

REFUSED_PAUSE_S = 60.0  # after a successor that may not serve: its files were altered, and the worker is all there is


class Recycling:
    """Of one place. ``due``: why its worker is to be replaced between two batches, with nothing beside it."""

    def __init__(self, instance: ModelInstance, place: Place, spec: WorkerSpec, around: Surroundings) -> None:
        self.count = 0
        self.ceiling: int | None = None  # bytes; a thread's memory is the agent's
        self._whole = around.room()  # of which only the limit counts: it stays
        if spec.isolation == "process":
            self.ceiling = recycle.ceiling_bytes(spec.max_rss_bytes, spec.promised_rss_bytes, self._whole)
        self.due: str | None = None
        self._instance = instance
        self._place = place
        self._name = spec.model
        self._around = around
        self._began_at = float("-inf")
        self._not_before = float("-inf")
        self._beside: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None  # the worker that was replaced, in its last batch

    @property
    def worker(self) -> Worker | None:
        """What the worker takes; None where nobody knows, or where there is none."""
        handle = self._place.worker
        ready = handle.report.rss_bytes if handle.report is not None else None
        if not handle.ready or not self._instance.ready or handle.rss_bytes is None or ready is None:
            return None
        age_s = asyncio.get_running_loop().time() - handle.ready_at
        return Worker(rss_bytes=handle.rss_bytes, ready_bytes=ready, age_s=age_s)

    def look(self) -> None:
        """A batch was answered."""
        rss = self._place.worker.rss_bytes
        if self.ceiling is None or rss is None or rss <= self.ceiling or (worker := self.worker) is None:
            return
        now, start_s = self._around.clock(), self._place.plan.start_s
        if recycle.above(worker, self.ceiling, self._whole, since_last_s=now - self._began_at, start_s=start_s):
            self.ask("max_rss_bytes")

    @property
    def goes_on(self) -> bool:
        """Whether a worker is being replaced."""
        return self.due is not None or (self._beside is not None and not self._beside.done())

    def ask(self, why: str) -> None:
        """Replace the worker, unless that is being done already, or another's; at once where the room for two has gone
        meanwhile."""
        now = self._around.clock()
        if self.due is not None or now < self._not_before:
            return
        if any(other.recycling.goes_on for other in self._instance.places if other is not self._place):
            return
        if self._beside is not None and not self._beside.done():
            if recycle.is_short(self._around.room()):
                self._beside.cancel()
                self._end_first(why)
            return
        self._began_at = now
        worker, start_s = self.worker, self._place.plan.start_s
        if worker is not None and recycle.fits_beside(self._around.room(), worker, start_s):
            task = self._told(self._load_beside(why, worker, now))
            self._beside = asyncio.get_running_loop().create_task(task, name=f"recycling-{self._name}")
        else:
            self._end_first(why)

    def _end_first(self, why: str) -> None:
        self.due = why
        self._instance.wake()

    async def between_batches(self) -> None:
        """End the worker that is due, and start the next; what keeps that from serving is as after a crash."""
        why, self.due = self.due, None
        worker, began = self.worker, self._around.clock()
        if why is None or worker is None:  # it died meanwhile, and is fresh anyway
            return
        if await self._instance.start_fresh("restarting", f"its worker is replaced: {why}", self._place):
            self._tell(why, worker, began, beside=False)

    async def end(self) -> None:
        """The model is stopped: a successor on its way isn't needed any more."""
        tasks = [task for task in (self._beside, self._retiring) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _told(self, change: Awaitable[None]) -> None:
        try:
            await change
        except Exception:  # nobody waits for the task
            log.exception("%s: replacing its worker failed", self._name)

    async def _load_beside(self, why: str, worker: Worker, began: float) -> None:
        old, generation = self._place.worker, self._place.worker.generation
        successor = old.successor()
        try:
            await successor.start("quick", timeout_s=self._around.policy.load_timeout_s)
        except BaseException as error:
            await successor.stop(grace_s=0.0)
            if not isinstance(error, Exception):
                raise
            log.warning("%s: the worker that was to replace its own did not start: %s", self._name, error)
            self._not_before = self._around.clock() + REFUSED_PAUSE_S
            if not isinstance(error, BundleRefused):  # it may be the room that it lacked
                self._not_before = float("-inf")
                self._end_first(why)
            return
        # If it died meanwhile it is fresh by now, or being started.
        if old.generation != generation or not self._instance.hand_over(old, successor):
            await successor.stop()
            return
        self._tell(why, worker, began, beside=True)
        retiring = self._told(self._retire(old))  # in its own time: what is asked from now on is of the successor
        self._retiring = asyncio.get_running_loop().create_task(retiring, name=f"retiring-{self._name}")

    async def _retire(self, old: WorkerHandle) -> None:
        try:
            await old.retire()
        finally:  # the model may be stopped while its last batch runs
            await old.stop(grace_s=0.0)

    def _tell(self, why: str, before: Worker, began: float, *, beside: bool) -> None:
        self.count += 1
        after = self._place.worker
        detail = {
            "reason": why,
            "rss_bytes": before.rss_bytes,
            "max_rss_bytes": self.ceiling,
            "now_rss_bytes": after.rss_bytes,
            "beside": beside,
            "took_s": round(self._around.clock() - began, 3),
        }
        self._around.emit("worker_recycled", model=self._name, **detail)
        mb = before.rss_bytes / 1e6
        log.warning("%s: its worker was replaced at %.0f MB (%s), number %d", self._name, mb, why, self.count)
