"""One model: its queue, its worker, and the life of a request between them.

The request's own task asks the router, waits in the queue or for the cloud, and asks again when either fails it, so a
client that goes away takes its request along. One task per model feeds the worker and brings it back when it dies.
Every request gets exactly one answer: the one its own task returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from pathlib import Path

import msgspec

from aios_edge.bundle.read import Bundle
from aios_edge.errors import WorkerLost
from device_agent.answer import Answer, shed_answer
from device_agent.dispatch import Dispatch
from device_agent.judge import Judge
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.raw_model import as_loaded
from device_agent.rehearsal import rehearse
from device_agent.review import Review
from device_agent.router import for_want_of_cloud
from device_agent.scheduler import Pending
from device_agent.second_opinion import second_opinion
from device_agent.service_time import ServiceTime
from device_agent.surroundings import Surroundings
from device_agent.ticket import Ticket
from device_agent.ticket_queue import TicketQueue
from device_agent.trace import Decided, traced
from device_agent.track_record import TrackRecord
from device_agent.values import ActivationReport, Cloud, Decision, InferenceRequest, Local, Reason, Shed
from device_agent.worker_pool import WorkerSpec

log = logging.getLogger("device_agent.model")


class ModelHost:
    """Serves one bundle. What its worker is doing: ``instance``. ``never_leaves``: every request is local-only."""

    def __init__(self, spec: WorkerSpec, bundle: Bundle, around: Surroundings, *, never_leaves: bool = False) -> None:
        self.name = spec.model
        self.never_leaves = never_leaves
        self.bundle = bundle
        self.tensors = frozenset(tensor.name for tensor in bundle.manifest.inputs)  # the model's own inputs
        self.slowdown = spec.slowdown
        self._around = around
        self._queue = queue = TicketQueue()
        self._learning = learning = Learning()
        self.instance = ModelInstance(spec, around, on_lost=queue.wake.set)
        self._judge = Judge(bundle.manifest, around, queue, self.instance, learning)
        self._review = Review(queue, self._judge, around.clock)
        self.record = TrackRecord(learning, around.slowed)
        self._dispatch = Dispatch(self.instance, queue, self._judge, self._review, learning, self.record, around)
        self._task: asyncio.Task[None] | None = None
        self._here = 0  # requests that aren't answered yet, wherever they wait
        self._nobody_here = asyncio.Event()
        self._nobody_here.set()

    @property
    def state(self) -> str:
        """loading, ready, restarting, refused, stopped."""
        return self.instance.state

    @property
    def detail(self) -> str | None:
        """Why it isn't ready."""
        return self.instance.detail

    @property
    def service(self) -> ServiceTime:
        """How long a batch takes, as learnt so far."""
        return self._learning.service

    @property
    def queued(self) -> int:
        """Requests that wait for the worker."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the batch the worker has."""
        return len(self.instance.running.tickets)

    async def activate(self) -> ActivationReport:
        """Start the worker and check the whole contract; serve from then on. Raises what refused it."""
        report = await self.instance.activate()
        self.bundle = as_loaded(self.bundle, report)
        self._learning.begin(report.latency_p95_s * self.slowdown if report.latency_p95_s is not None else None)
        try:
            await rehearse(self.instance.worker, self.bundle.manifest, self._learning, self._around)
        except WorkerLost as error:  # the activation held; the serving loop brings the worker back
            log.warning("%s: rehearsal failed: %s", self.name, error)
        self.instance.open()
        self._begin()
        return report

    async def come_back(self) -> None:
        """Serve again after :meth:`stop`, with what was learnt before. Raises what refused it."""
        await self.instance.come_back()
        self._begin()

    def move_to(self, path: Path) -> None:
        """Workers are started from this copy of the bundle from now on."""
        self.instance.worker.spec = dataclasses.replace(self.instance.worker.spec, bundle_path=path)

    async def drain(self, limit_s: float | None = None) -> None:
        """Wait until everyone who is here was answered, for at most ``limit_s``. Who calls it lets nobody in any more.

        Without a limit it ends as well: each batch has a watchdog, and nobody waits for a worker that stays away.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._nobody_here.wait(), limit_s)

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._dispatch.serve(), name=f"model-{self.name}")

    async def stop(self) -> None:
        """Stop the worker; requests still waiting are refused as draining."""
        self.instance.state = "stopped"
        waiting = [*self._queue.tickets(), *self.instance.running.tickets]
        self._review.cancel()
        while self._task and not self._task.done():  # wait_for before Python 3.12 may swallow a cancellation
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=1.0)
        for ticket in waiting:
            ticket.resolve(Shed(Reason.DRAINING, 5.0))
        self._queue.clear()
        await self.instance.worker.stop()

    # A request

    async def infer(self, request: InferenceRequest) -> Answer:
        """Answer one request, wherever it may; cancelling takes it out of the queue."""
        self._here += 1
        self._nobody_here.clear()
        try:
            return await self._infer(request)
        finally:
            self._here -= 1
            if not self._here:
                self._nobody_here.set()

    async def _infer(self, request: InferenceRequest) -> Answer:
        if self.never_leaves:
            request = msgspec.structs.replace(request, local_only=True)
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
        question = self._judge.question(ticket)
        decision = question.decide()
        if not isinstance(decision, Local) and self.instance.ready and not self.queued and not self.running:
            self.record.turned_away(request, self._around.clock())
        if self._around.trace is None:
            return await self._answer(ticket, decision)
        device, sampled_at = self._around.device()
        answer = await self._answer(ticket, decision)
        line = traced(
            self.name,
            question,
            ticket.unsure or decision,
            device=device,
            sampled_at=sampled_at,
            opinion=ticket.opinion,
            outcome=Decided(route=answer.route, reason=answer.reason.value),
            status=answer.status,
            now=self._around.clock(),
        )
        self._around.trace(line)
        return answer

    async def _answer(self, ticket: Ticket, decision: Decision) -> Answer:
        """Follow a decision, and those after it, to an answer."""
        request = ticket.request
        while True:
            if isinstance(decision, Shed):
                return shed_answer(decision)
            if isinstance(decision, Cloud):
                answer = await self._around.cloud.infer(decision, request, self.name, tried=ticket.failed_at)
                if isinstance(answer, Answer):
                    return answer
                ticket.failed_at = (*ticket.failed_at, *answer.endpoints)
                decision = self._judge.decide(ticket)  # another endpoint, if there is time
                if not isinstance(decision, Cloud):
                    decision = for_want_of_cloud(decision, answer.reason)
                continue
            ticket.reason = decision.reason
            outcome = await self._wait(ticket)
            if isinstance(outcome, Answer):
                ticket.unsure = self._judge.second_opinion(ticket, outcome.confidence)
                if ticket.unsure is None:
                    return outcome
                now, cloud = self._around.clock(), self._around.cloud
                return await second_opinion(outcome, ticket.unsure, request, cloud, now, ticket.failed_at)
            decision = outcome

    async def _wait(self, ticket: Ticket) -> Answer | Cloud | Shed:
        """Queue the ticket and wait for its verdict."""
        if ticket.verdict.done():  # it was decided before, and the decision failed
            ticket.verdict = asyncio.get_running_loop().create_future()
        self._queue.put(ticket)
        if ticket.request.deadline_at is not None:  # nobody else is ever reviewed
            self._review.plan()
        try:
            return await ticket.verdict
        finally:
            self._queue.drop(ticket)  # no-op once it was taken; a cancelled client frees its place
