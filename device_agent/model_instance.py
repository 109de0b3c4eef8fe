"""The workers of one model: which of them serve, their crashes, and how the model comes back when none is left.

One of them is the lead: the one that is checked in full, that is reported where only one can be, and that is started
again when none serves. The others, where there are any, are the crew's. What becomes of requests meanwhile is the model
host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused, WorkerLost
from device_agent.crew import Crew, SpareRoom, no_limit
from device_agent.crew_size import own_cpus
from device_agent.place import Place
from device_agent.quarantine import Quarantine
from device_agent.recycling import Recycling
from device_agent.restart import RestartPlan
from device_agent.resting import MakeRoom, Resting, no_budget
from device_agent.surroundings import Surroundings
from device_agent.values import ActivationReport, Reason
from device_agent.worker_pool import WorkerHandle, WorkerSpec

log = logging.getLogger("device_agent.model")


class ModelInstance:
    """``spec.workers`` places, each with a worker and its successors. ``state``: loading, ready while any of them
    serves, restarting, quarantined, resting, waking, refused, stopped. ``lead``: a place whose worker serves, while any
    does.

    ``on_wake`` is called when there is something to do between two batches; ``on_died`` when a worker has ended, or the
    one before it in its last batch.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        around: Surroundings,
        on_wake: Callable[[], None],
        make_room: MakeRoom = no_budget,
        has_room: SpareRoom = no_limit,
    ) -> None:
        self.state = "loading"
        self.detail: str | None = None  # why it isn't ready
        self.report: ActivationReport | None = None
        self.restarts = 0
        self.quarantine = Quarantine()
        self.name = spec.model
        self._around = around
        self.on_died: Callable[[Place], None] = lambda place: on_wake()
        self._on_wake = on_wake
        self.places = tuple(self._place(number, spec) for number in range(spec.workers))
        self.lead = self.places[0]
        self.resting = Resting(self, spec.model, around, make_room)
        self.crew = Crew(self, around, has_room)
        self._tells_classes = False
        self._released: asyncio.Future[Exception | None] | None = None  # an operator waits for the next try
        self._release = asyncio.Event()

    def _place(self, number: int, spec: WorkerSpec) -> Place:
        own = replace(spec, cpus=own_cpus(spec.cpus, number, spec.workers, spec.intra_op_threads))
        place = Place()
        place.worker = WorkerHandle(own, on_stage=self._staged, on_lost=partial(self.told_lost, place))
        place.recycling = Recycling(self, place, own, self._around)
        return place

    def told_lost(self, place: Place, description: str) -> None:
        """Its worker has ended, or the one before it in its last batch."""
        place.how_lost = description
        self.on_died(place)

    # The lead, for whom it is all there is to see

    @property
    def worker(self) -> WorkerHandle:
        """The lead's."""
        return self.lead.worker

    @worker.setter
    def worker(self, worker: WorkerHandle) -> None:
        self.lead.worker = worker

    @property
    def recycling(self) -> Recycling:
        """The lead's."""
        return self.lead.recycling

    @property
    def plan(self) -> RestartPlan:
        """The lead's: when it is started again, after it was lost and while no other serves."""
        return self.lead.plan

    # All of them

    @property
    def ready(self) -> bool:
        """Whether any takes a batch now or after the one it has."""
        return self.state == "ready" and (self.lead.worker.ready or bool(self.serving))

    @property
    def serving(self) -> int:
        """How many workers serve."""
        return sum(place.worker.ready for place in self.places) if self.state == "ready" else 0

    @property
    def serves_with_several(self) -> bool:
        """Whether it is to have more workers than one."""
        return len(self.places) > 1

    @property
    def held(self) -> int:
        """Requests that workers have."""
        return sum(place.held for place in self.places)

    @property
    def awaits_batch(self) -> bool:
        """Whether a worker has a batch, those left out that were sent away or replaced: they come back for no other."""
        return any(place.running.tickets and place.running.worker is place.worker for place in self.places)

    @property
    def recycles(self) -> int:
        """How often one was replaced because of its memory."""
        return sum(place.recycling.count for place in self.places)

    @property
    def rss_bytes(self) -> int | None:
        """Of all workers together; None where nobody knows."""
        known = [place.worker.rss_bytes for place in self.places if place.worker.rss_bytes is not None]
        return sum(known) if known else None

    def tell_classes(self, told: bool) -> None:
        """Whether batches come back with each row's class from now on."""
        self._tells_classes = told
        for place in self.places:
            place.worker.tells_classes = told

    def start_from(self, **changes: Any) -> None:
        """Workers are started with these fields of their :class:`WorkerSpec` changed from now on."""
        for place in self.places:
            place.worker.spec = replace(place.worker.spec, **changes)

    def free_times(self, now: float) -> Sequence[float]:
        """When each worker that serves is expected to take its next batch; where none does, when the first will."""
        if self.state == "resting":
            return (now + self.plan.start_s,)
        if self.state == "ready" and len(self.places) > 1:
            if times := [place.free_at(now) for place in self.places if place.worker.ready]:
                return times
        elif self.state == "ready" and self.lead.worker.ready:
            return (self.lead.free_at(now),)
        return (self.lead.back_at(now),)

    def free_at(self, now: float) -> float:
        """When the first of them is expected to take the next batch."""
        return min(self.free_times(now))

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

    def served(self, place: Place) -> None:
        """A batch was answered: the crashes before it are history."""
        place.plan, before = place.plan.served(), self.quarantine
        self.quarantine = before.served()
        if before.until is not None and self.quarantine.until is None:
            self.crew.look()
        self.resting.used_at = self._around.clock()
        place.recycling.look()

    # Between two batches

    def has_chore(self, place: Place, waiting: int) -> bool:
        """Whether something is to be done there before the next batch, while so many requests wait."""
        return place.recycling.due is not None or self.resting.chore(waiting) is not None

    def chore(self, waiting: int) -> Callable[[], Awaitable[None]] | None:
        """What is to be done now, where no batch runs that is concerned, while so many requests wait."""
        for place in self.places:
            if place.recycling.due is not None and not place.running.tickets:
                return place.recycling.between_batches
        return None if self.held else self.resting.chore(waiting)

    def wake(self) -> None:
        """There is a chore."""
        self._on_wake()

    def hand_over(self, old: WorkerHandle, new: WorkerHandle) -> bool:
        """Let another worker take the next batch; False when the old one isn't there any more."""
        place = next((place for place in self.places if place.worker is old), None)
        if place is None or self.state != "ready" or not old.ready:
            return False
        # Both may have changed since it began to load.
        new.spec, new.tells_classes = old.spec, old.tells_classes
        place.worker = new
        if new.report is not None and place is self.lead:
            self._reopened(new.report)
        return True

    async def start_fresh(self, state: str, why: str, place: Place | None = None) -> bool:
        """End a worker, the lead where none is named, which has no batch, and start another; whether it serves. Else it
        is as after a crash. The model is in that state meanwhile, if no other serves."""
        place = place or self.lead
        began = self._around.clock()
        place.emptied(began, why)
        if not self._another_leads(place):
            self.state, self.detail = state, why
        place.starting = True
        try:
            await place.worker.stop()
            self._started(place, await place.worker.start("quick", timeout_s=self._around.policy.load_timeout_s), began)
        except Exception as error:
            self.did_not_start(place, error)
            return False
        finally:
            place.starting = False
        return True

    # The life of one

    async def activate(self) -> ActivationReport:
        """Start the lead and check the whole contract. Raises what refused it."""
        try:
            self.report = await self.worker.start("full", timeout_s=self._around.policy.load_timeout_s)
        except AiosEdgeError as error:
            self.state, self.detail = "refused", str(error)
            self.report = self.worker.report
            raise
        self.lead.plan = RestartPlan(start_s=max(self.report.load_s, 0.2))
        return self.report

    async def come_back(self) -> None:
        """Start the lead again after all were stopped, as after a crash: the bundle went through the whole check here.
        Raises what refused it."""
        started = self._around.clock()
        try:
            self._reopened(await self.worker.start("quick", timeout_s=self._around.policy.load_timeout_s))
        except AiosEdgeError as error:
            self.detail = str(error)
            raise
        self.lead.plan = RestartPlan().started(self._around.clock() - started)
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
        for place in self.places:
            place.live = place.worker.ready
        self.crew.look()

    def lost(self, place: Place, description: str, *, in_flight: int, queued: int) -> float:
        """A worker died; returns when that was noticed. Who has others serves on."""
        now = self._around.clock()
        replaced = self.state == "ready" and place.worker.ready  # in its last batch, another one is there already
        if not replaced:
            place.emptied(now, description)
            self._crashed(place, now)
            if not self._another_leads(place):
                self.state, self.detail = "restarting", description
        detail = {"how": description, "in_flight": in_flight, "queued": queued, "serving": self.serving}
        self._around.emit("worker_crashed", model=self.name, **detail)
        if replaced:
            return now
        log.warning(
            "worker of %s %s with %d requests in its batch; restarting, %d serve on",
            self.name,
            description,
            in_flight,
            self.serving,
        )
        self._count_crash(now, description)
        self.crew.look()
        return now

    def lost_while_idle(self, place: Place, *, queued: int) -> None:
        """A worker died without a batch."""
        self.lost(place, f"{place.how_lost} while idle", in_flight=0, queued=queued)

    def joined(self, place: Place, worker: WorkerHandle, took_s: float) -> bool:
        """The crew has started one; False when the model has no use for it any more."""
        if self.state not in ("ready", "restarting") or worker.report is None:
            return False
        worker.tells_classes = self._tells_classes
        place.worker = worker
        place.plan = place.plan.started(took_s)
        if not self.lead.worker.ready:  # all others died meanwhile
            self.lead = place
        if place.lost_at:
            self._recovered(place)
        place.detail = None
        self.open()
        return True

    def _crashed(self, place: Place, now: float) -> None:
        place.plan = place.plan.crashed()
        place.not_before = max(place.not_before, now + place.plan.pause_s)  # it may have been sent away

    def _another_leads(self, place: Place) -> bool:
        """Whether others than this one serve; if so, it leads no longer."""
        others = [other for other in self.places if other is not place and other.worker.ready]
        if self.state != "ready" or not others:
            return False
        if self.lead is place:
            self.lead = others[0]
        return True

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
        if self._released is None or self._released.done():  # else somebody ended it already
            self._release.clear()
        left_s = (self.quarantine.until or 0.0) - self._around.clock()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._release.wait(), max(left_s, 0.0))
        self.quarantine = Quarantine() if self._release.is_set() else self.quarantine.tried()
        log.info("%s: quarantine is over, one try", self.name)

    async def _start_again(self) -> Exception | None:
        place = self.lead
        await place.worker.stop(grace_s=0.0)
        began = self._around.clock()
        try:
            self._started(place, await place.worker.start("quick", timeout_s=self._around.policy.load_timeout_s), began)
        except Exception as error:  # no descriptors left, say: whatever it is, it is tried again
            self.did_not_start(place, error)
            return error
        self._recovered(place)
        return None

    def _started(self, place: Place, report: ActivationReport, began: float) -> None:
        if not self.lead.worker.ready:  # it died meanwhile
            self.lead = place
        if place is self.lead:
            self._reopened(report)
        place.plan, place.detail = place.plan.started(self._around.clock() - began), None
        self.open()

    def _recovered(self, place: Place) -> None:
        self.restarts += 1
        away_s = round(self._around.clock() - place.lost_at, 4)
        self._around.emit("worker_recovered", model=self.name, away_s=away_s, restarts=self.restarts)
        log.info("worker of %s is back after %.2f s", self.name, away_s)

    def did_not_start(self, place: Place, error: Exception) -> None:
        """A worker that was to take that place isn't there."""
        now = self._around.clock()
        place.emptied(now, str(error))
        self._crashed(place, now)
        if not self._another_leads(place):
            self.detail = str(error)
            if self.state != "quarantined":
                self.state = "restarting"
        if isinstance(error, BundleRefused):
            self._around.emit("contract_broken", model=self.name, check=error.promise, detail=error.what)
        log.error("worker of %s did not come back: %s", self.name, error)
        its_own_fault = isinstance(error, WorkerLost | BundleRefused)  # not the machine's
        if its_own_fault or self.quarantine.on_trial:
            self._count_crash(now, str(error))

    def _count_crash(self, now: float, how: str) -> None:
        """Quarantine the model when it was one crash too many: no worker is started by itself; those that serve, serve
        on."""
        self.quarantine = self.quarantine.crashed(now, self._around.policy)
        if self.quarantine.until is None:
            return
        crashes, pause_s = len(self.quarantine.crashed_at), self.quarantine.until - now
        within_s = round(now - self.quarantine.crashed_at[0], 3)
        serving = self.serving
        why = f"{crashes} crashes within {within_s:.3g} s, the last: {how}; one try in {pause_s:.3g} s, or load it"
        if not serving:
            self.state, self.detail = "quarantined", why
        detail = {"crashes": crashes, "within_s": within_s, "how": how, "pause_s": round(pause_s, 3)}
        self._around.emit("quarantined", model=self.name, **detail, serving=serving)
        log.error("%s is quarantined, %d workers serve on: %s", self.name, serving, why)

    def _staged(self, stage: str) -> None:
        log.info("%s: %s", self.name, stage)
        self.detail = stage
