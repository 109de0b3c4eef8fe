"""One worker's place at a model: the batch it has, its crashes, and how it comes back.

What becomes of requests meanwhile is the model host's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused
from device_agent.restart import RestartPlan
from device_agent.surroundings import Surroundings
from device_agent.ticket import Running
from device_agent.values import ActivationReport
from device_agent.worker_pool import WorkerHandle, WorkerSpec

log = logging.getLogger("device_agent.model")


class ModelInstance:
    """A worker, and its successors. ``state``: loading, ready, restarting, refused, stopped.

    ``on_lost`` is called when a worker ends that nobody stopped, busy or idle.
    """

    def __init__(self, spec: WorkerSpec, around: Surroundings, on_lost: Callable[[], None]) -> None:
        self.state = "loading"
        self.detail: str | None = None  # why it isn't ready
        self.report: ActivationReport | None = None
        self.restarts = 0
        self.running = Running()
        self.ahead = Running()  # the batch that the worker has already, and takes next
        self.plan = RestartPlan()
        self.lost_at = 0.0
        self.worker = WorkerHandle(spec, on_stage=self._staged, on_lost=self._told_lost)
        self._name = spec.model
        self._around = around
        self._on_lost = on_lost
        self._how_lost = "ended"  # as the handle said it; of a batch's worker its WorkerLost says it too

    @property
    def ready(self) -> bool:
        """Whether it takes a batch now or after the one it has."""
        return self.state == "ready" and self.worker.ready

    def free_at(self, now: float) -> float:
        """When it is expected to take the next batch. Whatever overran its estimate is given a tenth more of what it
        took so far: the longer something hangs, the longer it is likely to hang on."""
        if not self.ready:
            return max(self.lost_at + self.plan.expected_s, now + 0.1 * (now - self.lost_at))
        if not self.running.tickets:
            return now
        since = self.running.since
        return max(since + self.running.expected_s, now + 0.1 * (now - since)) + self.ahead.expected_s

    async def activate(self) -> ActivationReport:
        """Start the worker and check the whole contract. Raises what refused it."""
        try:
            self.report = await self.worker.start("full")
        except AiosEdgeError as error:
            self.state, self.detail = "refused", str(error)
            self.report = self.worker.report
            raise
        self.plan = RestartPlan(start_s=max(self.report.load_s, 0.2))
        return self.report

    async def come_back(self) -> None:
        """Start a worker again after it was stopped, as after a crash: the bundle went through the whole check here.
        Raises what refused it."""
        started = self._around.clock()
        try:
            self._reopened(await self.worker.start("quick"))
        except AiosEdgeError as error:
            self.detail = str(error)
            raise
        self.plan = RestartPlan().started(self._around.clock() - started)
        self.open()

    def _reopened(self, found: ActivationReport) -> None:
        """A quick check measures nothing, but the model may be on other providers now."""
        if self.report is not None:
            self.report = msgspec.structs.replace(
                self.report,
                providers_active=found.providers_active,
                provider_reason=found.provider_reason,
                provider_steps=found.provider_steps,
                engine=found.engine,
            )

    def open(self) -> None:
        """Batches may come."""
        self.state, self.detail = "ready", None

    def lost(self, description: str, *, in_flight: int, queued: int) -> float:
        """The worker died; returns when that was noticed."""
        now = self._around.clock()
        self.state, self.detail = "restarting", description
        self.lost_at = now
        self.plan = self.plan.crashed()
        self._around.emit("worker_crashed", model=self._name, how=description, in_flight=in_flight, queued=queued)
        log.warning("worker of %s %s with %d requests in its batch; restarting", self._name, description, in_flight)
        return now

    def lost_while_idle(self, *, queued: int) -> None:
        """The worker died without a batch."""
        self.lost(f"{self._how_lost} while idle", in_flight=0, queued=queued)

    async def restart(self) -> Exception | None:
        """Start a worker again when the plan says so; returns what kept it from coming back."""
        await asyncio.sleep(self.plan.pause_s)
        await self.worker.stop(grace_s=0.0)
        started = self._around.clock()
        try:
            self._reopened(await self.worker.start("quick"))
        except Exception as error:  # no descriptors left, say: whatever it is, it is tried again
            self.plan = self.plan.crashed()
            self.detail = str(error)
            if isinstance(error, BundleRefused):
                self._around.emit("contract_broken", model=self._name, check=error.promise, detail=error.what)
            log.error("worker of %s did not come back: %s", self._name, error)
            self.lost_at = self._around.clock()
            return error
        self.restarts, now = self.restarts + 1, self._around.clock()
        self.plan = self.plan.started(now - started)
        self.open()
        away_s = round(now - self.lost_at, 4)
        self._around.emit("worker_recovered", model=self._name, away_s=away_s, restarts=self.restarts)
        log.info("worker of %s is back after %.2f s", self._name, away_s)
        return None

    def _told_lost(self, description: str) -> None:
        self._how_lost = description
        self._on_lost()

    def _staged(self, stage: str) -> None:
        log.info("%s: %s", self._name, stage)
        self.detail = stage
