"""One model: its worker, its queue, and the life of a request between them.

The request's own task asks the router, waits in the queue or for the cloud, and asks again when either fails it, so a
client that goes away takes its request along. One task per model feeds the worker and brings it back when it dies.
Every request gets exactly one answer: the one its own task returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from aios_edge.bundle.read import Bundle
from aios_edge.errors import AiosEdgeError, BundleRefused, WorkerLost
from device_agent import scheduler
from device_agent.answer import Answer, Energy, local_answer, shed_answer
from device_agent.cloud import CloudPool
from device_agent.rehearsal import BATCHES, LIMIT_S, rehearsal_batch
from device_agent.restart import PATIENCE, RestartPlan
from device_agent.router import Here, There, after_cloud_failed, next_review_at, route
from device_agent.scheduler import Forecast, Pending
from device_agent.service_time import ServiceTime
from device_agent.settings import Policy
from device_agent.ticket import Running, Ticket
from device_agent.values import ActivationReport, Cloud, Decision, InferenceRequest, Local, Reason, Shed
from device_agent.watched_run import run_watched
from device_agent.worker_pool import BatchResult, WorkerHandle, WorkerSpec

log = logging.getLogger("device_agent.model")

Emit = Callable[..., None]  # emit(kind, **detail)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a host is given by the agent."""

    policy: Policy
    cloud: CloudPool
    emit: Emit
    energy: Callable[[float, int], Energy]  # (compute_s, batch_size) -> energy of one request
    clock: Callable[[], float] = time.monotonic


class ModelHost:
    """Serves one bundle. ``state``: loading, ready, restarting, refused, stopped."""

    def __init__(self, spec: WorkerSpec, bundle: Bundle, around: Surroundings) -> None:
        self.name = spec.model
        self.bundle = bundle
        self.state = "loading"
        self.detail: str | None = None  # why it isn't ready
        self.report: ActivationReport | None = None
        self.restarts = 0
        self.slowdown = spec.slowdown
        self.service = ServiceTime.prior(None)
        self.worker = WorkerHandle(spec, on_stage=self._staged, on_lost=self._told_lost)
        self._around = around
        self._queue: list[Pending] = []
        self._tickets: dict[int, Ticket] = {}
        self._running = Running()
        self._wake = asyncio.Event()
        self._plan = RestartPlan()
        self._lost_at = 0.0
        self._how_lost = "ended"  # as the handle said it; of a batch's worker its WorkerLost says it too
        self._task: asyncio.Task[None] | None = None
        self._review: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        """Requests that wait for the worker."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the batch the worker has."""
        return len(self._running.tickets)

    async def activate(self) -> ActivationReport:
        """Start the worker and check the whole contract; serve from then on. Raises what refused it."""
        try:
            report = await self.worker.start("full")
        except AiosEdgeError as error:
            self.state, self.detail = "refused", str(error)
            self.report = self.worker.report
            raise
        self.report = report
        self.service = ServiceTime.prior(
            report.latency_p95_s * self.slowdown if report.latency_p95_s is not None else None
        )
        self._plan = RestartPlan(start_s=max(report.load_s, 0.2))
        try:
            await self._rehearse()
        except WorkerLost as error:  # the activation held; the serving loop brings the worker back
            log.warning("%s: rehearsal failed: %s", self.name, error)
        self.state, self.detail = "ready", None
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"model-{self.name}")
        return report

    async def stop(self) -> None:
        """Stop the worker; requests still waiting are refused as draining."""
        self.state = "stopped"
        waiting = [*self._tickets.values(), *self._running.tickets]
        if self._review:
            self._review.cancel()
        while self._task and not self._task.done():  # wait_for before Python 3.12 may swallow a cancellation
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=1.0)
        for ticket in waiting:
            self._resolve(ticket, Shed(Reason.DRAINING, 5.0))
        self._queue.clear()
        self._tickets.clear()
        await self.worker.stop()

    async def infer(self, request: InferenceRequest) -> Answer:
        """Answer one request, wherever; cancelling takes it out of the queue."""
        ticket = Ticket(
            request=request,
            pending=Pending(
                request_id=request.request_id,
                priority=request.priority,
                deadline_at=request.deadline_at,
                cost_bytes=request.cost_hint_bytes,
            ),
            reason=Reason.IDLE,
            verdict=asyncio.get_running_loop().create_future(),
        )
        decision = self._decide(ticket)
        while True:
            if isinstance(decision, Shed):
                return shed_answer(decision)
            if isinstance(decision, Cloud):
                answer = await self._around.cloud.infer(decision, request, self.name)
                if answer is not None:
                    return answer
                ticket.no_cloud = True
                decision = after_cloud_failed(self._decide(ticket))
                continue
            ticket.reason = decision.reason
            outcome = await self._wait(ticket)
            if isinstance(outcome, Answer):
                return outcome
            decision = outcome

    # The queue

    async def _wait(self, ticket: Ticket) -> Answer | Cloud | Shed:
        """Queue the ticket and wait for its verdict."""
        ticket.verdict = asyncio.get_running_loop().create_future()
        self._enqueue(ticket)
        try:
            return await ticket.verdict
        finally:
            self._forget(ticket)  # no-op once it was taken; a cancelled client frees its place

    def _enqueue(self, ticket: Ticket) -> None:
        scheduler.insert(self._queue, ticket.pending)
        self._tickets[ticket.pending.request_id] = ticket
        self._wake.set()
        self._plan_review()

    def _forget(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.pending.request_id, None) is not None:
            self._queue.remove(ticket.pending)

    def _resolve(self, ticket: Ticket, verdict: Answer | Cloud | Shed) -> None:
        if not ticket.verdict.done():  # a cancelled one has nobody waiting
            ticket.verdict.set_result(verdict)

    def _decide(self, ticket: Ticket, forecast: Forecast | None = None) -> Decision:
        """Ask the router about a ticket, waiting or not yet."""
        now = self._around.clock()
        waiting = ticket.pending.request_id in self._tickets
        if forecast is None:
            forecast = self._forecast(ticket.pending, now, waiting=waiting)
        request = ticket.request
        return route(
            now=now,
            deadline_at=request.deadline_at,
            local_only=request.local_only,
            here=Here(
                forecast=forecast,
                worker_ready=self.state == "ready" and self.worker.ready,
                queue_full=not waiting and len(self._queue) >= self._around.policy.queue_limit,
            ),
            there=self._there(ticket, now),
        )

    def _there(self, ticket: Ticket, now: float) -> There | None:
        if ticket.no_cloud or ticket.request.local_only:
            return None
        return self._around.cloud.best(self.name, now, natural=ticket.request.natural)

    def _forecast(self, pending: Pending, now: float, *, waiting: bool) -> Forecast | None:
        if self.state not in ("ready", "restarting"):
            return None
        queue = self._queue
        if not waiting:
            queue = list(queue)
            scheduler.insert(queue, pending)
        return scheduler.forecast(
            queue,
            pending.request_id,
            now=now,
            free_at=self._free_at(now),
            model=self.service,
            max_batch_size=self.bundle.manifest.max_batch_size,
        )

    def _free_at(self, now: float) -> float:
        """When the worker is expected to take the next batch. Whatever overran its estimate is given a tenth more
        of what it took so far: the longer something hangs, the longer it is likely to hang on."""
        if self.state != "ready" or not self.worker.ready:
            return max(self._lost_at + self._plan.expected_s, now + 0.1 * (now - self._lost_at))
        if not self._running.tickets:
            return now
        since = self._running.since
        return max(since + self._running.expected_s, now + 0.1 * (now - since))

    def _plan_review(self) -> None:
        """Wake up when a waiting request has its last chance in the cloud, and when its deadline passes."""
        if self._review:
            self._review.cancel()
        now = self._around.clock()
        at = next_review_at(self._queue, self._around.cloud.best(self.name, now, natural=False), now)
        if at is not None:
            self._review = asyncio.get_running_loop().call_later(at - now + 0.0002, self._review_queue)

    def _review_queue(self) -> None:
        self._review = None
        for pending in [pending for pending in self._queue if pending.deadline_at is not None]:
            ticket = self._tickets[pending.request_id]
            decision = self._decide(ticket)
            if not isinstance(decision, Local):
                self._forget(ticket)
                self._resolve(ticket, decision)
        self._plan_review()

    # The worker

    async def _serve(self) -> None:
        while True:
            if not self.worker.ready:
                await self._restart()
            elif batch := self._take():
                await self._run(batch)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _take(self) -> list[Ticket]:
        """The next batch, after judging each member again: no work for the dead."""
        while self._queue:
            now = self._around.clock()
            size = scheduler.next_batch(self._queue, now, self.service, self.bundle.manifest.max_batch_size)
            head = self._queue[:size]
            busy = self.service.busy_s(self.service.batch_units([pending.cost_bytes for pending in head]))
            forecast = Forecast(expected_at=now + busy, safe_at=now + busy + self.service.margin_s(busy), idle=False)
            batch = [self._tickets[pending.request_id] for pending in head]
            late = [
                (ticket, decision)
                for ticket in batch
                if ticket.request.deadline_at is not None
                and not isinstance(decision := self._decide(ticket, forecast), Local)
            ]
            for ticket, decision in late:
                self._forget(ticket)
                if not isinstance(decision, Local):
                    self._resolve(ticket, decision)
            if not late:
                for ticket in batch:
                    self._forget(ticket)
                    ticket.taken_at = now
                self._running = Running(batch, now, busy)
                return batch
        return []

    async def _run(self, batch: list[Ticket]) -> None:
        requests, expected_s = [ticket.request for ticket in batch], self._running.expected_s
        try:
            result = await run_watched(self.worker, requests, self._around.policy.batch_timeout_s, expected_s)
        except WorkerLost as lost:
            self._lost(lost, batch)
            return
        finally:
            seen_s = self._around.clock() - self._running.since
            self._running = Running()
        self._plan = self._plan.served()
        self._answer(batch, result)
        self._learn(requests, result, seen_s)

    def _learn(self, requests: list[InferenceRequest], result: BatchResult, seen_s: float) -> None:
        lengths = {item.request_id: item.length for item in result.done.items if item.status == 200}
        if len(lengths) < len(requests):  # a refusal is quick, and says nothing about an answer
            return
        self.service = self.service.observed(
            [request.cost_hint_bytes for request in requests],
            [lengths[request.request_id] for request in requests],
            result.done.busy_s,
        ).overhead(seen_s - result.done.busy_s)

    async def _rehearse(self) -> None:
        """Learn what requests cost here before the first client's arrives."""
        began = self._around.clock()
        pair = self.bundle.manifest.preprocess.pair
        for number, words in enumerate(BATCHES):
            started = self._around.clock()
            if started - began > LIMIT_S and number > 1:
                break
            batch = rehearsal_batch(self.name, words[: self.bundle.manifest.max_batch_size], pair=pair, now=started)
            result = await run_watched(self.worker, batch, self._around.policy.batch_timeout_s)
            if number == 0:  # paid for the warm-up
                continue
            if number == 1:  # the activation measured the model alone: begin from what a request really takes
                self.service = ServiceTime.prior(result.done.busy_s, max(result.done.items[0].length, 1))
            self._learn(batch, result, self._around.clock() - started)

    def _answer(self, batch: list[Ticket], result: BatchResult) -> None:
        items = {item.request_id: item for item in result.done.items}
        for ticket in batch:
            item = items.get(ticket.pending.request_id)
            answer = local_answer(
                item,
                result.payload,
                ticket.reason,
                queue_s=ticket.taken_at - ticket.request.arrived_at,
                energy=self._around.energy(item.compute_s, item.batch_size) if item else None,
            )
            self._resolve(ticket, answer)

    def _lost(self, lost: WorkerLost, batch: list[Ticket]) -> None:
        """Each request of the dead batch: once more, alone, where its deadline allows; else the cloud; else 503."""
        now = self._mark_lost(lost.what, len(batch))
        for ticket in batch:
            if ticket.verdict.done():
                continue
            if not ticket.pending.alone:
                again = msgspec.structs.replace(ticket.pending, alone=True)
                forecast = self._forecast(again, now, waiting=False)
                if again.deadline_at is None or (forecast and forecast.expected_at <= again.deadline_at):
                    ticket.pending, ticket.reason = again, Reason.RETRIED
                    self._enqueue(ticket)
                    continue
            self._elsewhere(ticket, now)

    def _elsewhere(self, ticket: Ticket, now: float) -> None:
        self._forget(ticket)
        there = self._there(ticket, now)
        deadline = ticket.request.deadline_at
        if there is not None and (deadline is None or now + there.expected_s <= deadline):
            self._resolve(ticket, Cloud(Reason.WORKER_LOST, there.endpoint))
        else:
            self._resolve(ticket, Shed(Reason.WORKER_LOST, self._plan.expected_s))

    def _mark_lost(self, description: str, in_flight: int) -> float:
        now = self._around.clock()
        self.state, self.detail = "restarting", description
        self._lost_at = now
        self._plan = self._plan.crashed()
        self._around.emit(
            "worker_crashed", model=self.name, how=description, in_flight=in_flight, queued=len(self._queue)
        )
        log.warning("worker of %s %s with %d requests in its batch; restarting", self.name, description, in_flight)
        return now

    async def _restart(self) -> None:
        if self.state == "ready":  # it died while idle
            self._mark_lost(f"{self._how_lost} while idle", 0)
            self._review_queue()
        await asyncio.sleep(self._plan.pause_s)
        await self.worker.stop(grace_s=0.0)
        started = self._around.clock()
        try:
            await self.worker.start("quick")
        except Exception as error:  # no descriptors left, say: whatever it is, it is tried again
            self._plan = self._plan.crashed()
            self.detail = str(error)
            if isinstance(error, BundleRefused):
                self._around.emit("contract_broken", model=self.name, check=error.promise, detail=error.what)
            log.error("worker of %s did not come back: %s", self.name, error)
            self._lost_at = self._around.clock()
            self._review_queue()
            if isinstance(error, BundleRefused) or self._plan.crashes > PATIENCE:
                for ticket in list(self._tickets.values()):  # no deadline is no wish to wait for ever
                    self._elsewhere(ticket, self._lost_at)
            return
        self.restarts, now = self.restarts + 1, self._around.clock()
        self._plan = self._plan.started(now - started)
        self.state, self.detail = "ready", None
        away_s = round(now - self._lost_at, 4)
        self._around.emit("worker_recovered", model=self.name, away_s=away_s, restarts=self.restarts)
        log.info("worker of %s is back after %.2f s", self.name, away_s)

    def _told_lost(self, description: str) -> None:
        self._how_lost = description
        self._wake.set()

    def _staged(self, stage: str) -> None:
        log.info("%s: %s", self.name, stage)
        self.detail = stage
