"""One worker's place at a model: the batches it has, its crashes, and how it comes back.

What becomes of requests meanwhile is the model host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused, WorkerLost
from device_agent.quarantine import Quarantine
from device_agent.recycling import Recycling
from device_agent.restart import RestartPlan
from device_agent.resting import MakeRoom, Resting, no_budget
from device_agent.surroundings import Surroundings
from device_agent.ticket import Running
from device_agent.values import ActivationReport, Reason
from device_agent.worker_pool import WorkerHandle, WorkerSpec

log = logging.getLogger("device_agent.model")


class ModelInstance:
    """A worker, and its successors. ``state``: loading, ready, restarting, quarantined, resting, waking, refused,
    stopped.

    ``on_wake`` is called when there is something to do between two batches: its worker has ended, or a chore came.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        around: Surroundings,
        on_wake: Callable[[], None],
        make_room: MakeRoom = no_budget,
    ) -> None:
        self.state = "loading"
        self.detail: str | None = None  # why it isn't ready
        self.report: ActivationReport | None = None
        self.restarts = 0
        self.running = Running()
        self.ahead = Running()  # the batch that the worker has already, and takes next
        self.plan = RestartPlan()
        self.quarantine = Quarantine()
        self.lost_at = 0.0
        self.worker = WorkerHandle(spec, on_stage=self._staged, on_lost=self._told_lost)
        self.name = spec.model
        self.recycling = Recycling(self, spec, around)
        self.resting = Resting(self, spec.model, around, make_room)
        self._around = around
        self._on_wake = on_wake
        self._released: asyncio.Future[Exception | None] | None = None  # an operator waits for the next try
        self._release = asyncio.Event()
        self._how_lost = "ended"  # as the handle said it; of a batch's worker its WorkerLost says it too

    @property
    def ready(self) -> bool:
        """Whether it takes a batch now or after the one it has."""
        return self.state == "ready" and self.worker.ready

    def free_at(self, now: float) -> float:
        """When it is expected to take the next batch. Whatever overran its estimate is given a tenth more of what it
        took so far: the longer something hangs, the longer it is likely to hang on."""
        if self.state == "resting":
            return now + self.plan.start_s
        if not self.ready:
            return max(self.lost_at + self.plan.expected_s, now + 0.1 * (now - self.lost_at))
        if not self.running.tickets:
            return now
        since = self.running.since
        return max(since + self.running.expected_s, now + 0.1 * (now - since)) + self.ahead.expected_s

    @property
    def away(self) -> Reason:
        """What is said to those who would have to wait for a worker."""
        if self.state == "quarantined":
            return Reason.QUARANTINED
        return Reason.LOADING if self.state in ("resting", "waking") else Reason.WORKER_LOST

    def back_in_s(self, now: float) -> float:
        """When a worker is expected that isn't there."""
        until = self.quarantine.until
        return self.plan.expected_s if until is None else max(until - now, 0.0) + self.plan.start_s

    def served(self) -> None:
        """A batch was answered: the crashes before it are history."""
        self.plan, self.quarantine = self.plan.served(), self.quarantine.served()
        self.resting.used_at = self._around.clock()
        self.recycling.look()

    def chore(self, waiting: int) -> Callable[[], Awaitable[None]] | None:
        """What is to be done between two batches, before the next one, while so many requests wait."""
        return self.recycling.between_batches if self.recycling.due else self.resting.chore(waiting)

    def wake(self) -> None:
        """There is a chore."""
        self._on_wake()

    def hand_over(self, old: WorkerHandle, new: WorkerHandle) -> bool:
        """Let another worker take the next batch; False when the old one isn't there any more."""
        if self.state != "ready" or self.worker is not old or not old.ready:
            return False
        # Both may have changed since it began to load.
        new.spec, new.tells_classes = old.spec, old.tells_classes
        self.worker = new
        if new.report is not None:
            self._reopened(new.report)
        return True

    async def start_fresh(self, state: str, why: str) -> bool:
        """End the worker, which has no batch, and start another; whether it serves. Else it is as after a crash."""
        self.state, self.detail, self.lost_at = state, why, self._around.clock()
        began = self.lost_at
        await self.worker.stop()
        try:
            self._reopened(await self.worker.start("quick", timeout_s=self._around.policy.load_timeout_s))
        except Exception as error:
            self._did_not_start(error)
            return False
        self.plan = self.plan.started(self._around.clock() - began)
        self.open()
        return True

    async def activate(self) -> ActivationReport:
        """Start the worker and check the whole contract. Raises what refused it."""
        try:
            self.report = await self.worker.start("full", timeout_s=self._around.policy.load_timeout_s)
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
            self._reopened(await self.worker.start("quick", timeout_s=self._around.policy.load_timeout_s))
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
        replaced = self.state == "ready" and self.worker.ready  # in its last batch, another one serves already
        if not replaced:
            self.state, self.detail, self.lost_at = "restarting", description, now
            self.plan = self.plan.crashed()
        self._around.emit("worker_crashed", model=self.name, how=description, in_flight=in_flight, queued=queued)
        if replaced:
            return now
        log.warning("worker of %s %s with %d requests in its batch; restarting", self.name, description, in_flight)
        self._count_crash(now, description)
        return now

    def lost_while_idle(self, *, queued: int) -> None:
        """The worker died without a batch."""
        self.lost(f"{self._how_lost} while idle", in_flight=0, queued=queued)

    async def restart(self) -> Exception | None:
        """Start a worker again when the plan says so; returns what kept it from coming back."""
        if self.state == "quarantined":
            await self._sit_out()
        else:
            await asyncio.sleep(self.plan.pause_s)
        failure = await self._start_again()
        if self._released is not None and not self._released.done():
            self._released.set_result(failure)
        return failure

    async def release(self) -> None:
        """Try now, however often its workers died. Raises what kept one from coming back."""
        self._released = asyncio.get_running_loop().create_future()
        self._release.set()
        failure = await self._released
        if failure is not None:
            raise failure

    async def _sit_out(self) -> None:
        """Wait for the end of the quarantine, or for an operator who ends it."""
        self._release.clear()
        left_s = (self.quarantine.until or 0.0) - self._around.clock()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._release.wait(), max(left_s, 0.0))
        self.quarantine = Quarantine() if self._release.is_set() else self.quarantine.tried()
        log.info("%s: quarantine is over, one try", self.name)

    async def _start_again(self) -> Exception | None:
        await self.worker.stop(grace_s=0.0)
        started = self._around.clock()
        try:
            self._reopened(await self.worker.start("quick", timeout_s=self._around.policy.load_timeout_s))
        except Exception as error:  # no descriptors left, say: whatever it is, it is tried again
            self._did_not_start(error)
            return error
        self.restarts, now = self.restarts + 1, self._around.clock()
        self.plan = self.plan.started(now - started)
        self.open()
        away_s = round(now - self.lost_at, 4)
        self._around.emit("worker_recovered", model=self.name, away_s=away_s, restarts=self.restarts)
        log.info("worker of %s is back after %.2f s", self.name, away_s)
        return None

    def _did_not_start(self, error: Exception) -> None:
        if self.state != "quarantined":
            self.state = "restarting"
        self.plan = self.plan.crashed()
        self.detail = str(error)
        if isinstance(error, BundleRefused):
            self._around.emit("contract_broken", model=self.name, check=error.promise, detail=error.what)
        log.error("worker of %s did not come back: %s", self.name, error)
        self.lost_at = self._around.clock()
        its_own_fault = isinstance(error, WorkerLost | BundleRefused)  # not the machine's
        if its_own_fault or self.quarantine.on_trial:
            self._count_crash(self.lost_at, str(error))

    def _count_crash(self, now: float, how: str) -> None:
        """Quarantine the model when it was one crash too many."""
        self.quarantine = self.quarantine.crashed(now, self._around.policy)
        if self.quarantine.until is None:
            return
        crashes, pause_s = len(self.quarantine.crashed_at), self.quarantine.until - now
        within_s = round(now - self.quarantine.crashed_at[0], 3)
        self.state = "quarantined"
        self.detail = (
            f"{crashes} crashes within {within_s:.3g} s, the last: {how}; one try in {pause_s:.3g} s, or load it"
        )
        self._around.emit(
            "quarantined", model=self.name, crashes=crashes, within_s=within_s, how=how, pause_s=round(pause_s, 3)
        )
        log.error("%s is quarantined: %s", self.name, self.detail)

    def _told_lost(self, description: str) -> None:
        self._how_lost = description
        self._on_wake()

    def _staged(self, stage: str) -> None:
        log.info("%s: %s", self.name, stage)
        self.detail = stage
