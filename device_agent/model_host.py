"""One model: its queue, its workers, and the life of a request between them.

A request asks the router when it comes, waits in the queue or for the cloud, and asks again when either fails it. One
that stays on this device is a ticket and nothing else: no task, no future, no turn of the event loop beyond those in
which its bytes came and its batch was answered. One that leaves is a task from then on. Every request gets exactly one
answer, unless its client goes away, which takes it along.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from aios_edge.bundle.read import Bundle
from aios_edge.errors import WorkerLost
from device_agent.answer import Answer, shed_answer
from device_agent.background import ended
from device_agent.crew import SpareRoom, no_limit
from device_agent.dispatch import Dispatch
from device_agent.judge import Judge
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.raw_model import as_loaded
from device_agent.rehearsal import rehearse
from device_agent.resting import MakeRoom, no_budget
from device_agent.review import Review
from device_agent.room import Room
from device_agent.router import for_want_of_cloud
from device_agent.scheduler import Pending
from device_agent.second_opinion import second_opinion
from device_agent.service_time import ServiceTime
from device_agent.surroundings import Surroundings
from device_agent.ticket import Arrival, Ticket, Verdict
from device_agent.ticket_queue import TicketQueue
from device_agent.trace import Decided, traced
from device_agent.track_record import TrackRecord
from device_agent.values import SERVING, ActivationReport, Cloud, Decision, InferenceRequest, Local, Reason, Shed
from device_agent.worker_pool import WorkerSpec

log = logging.getLogger("device_agent.model")


class ModelHost:
    """Serves one bundle. What its workers are doing: ``instance``. ``never_leaves``: every request is local-only."""

    def __init__(
        self,
        spec: WorkerSpec,
        bundle: Bundle,
        around: Surroundings,
        *,
        never_leaves: bool = False,
        make_room: MakeRoom = no_budget,
        has_room: SpareRoom = no_limit,
    ) -> None:
        self.name = spec.model
        self.never_leaves = never_leaves
        self.bundle = bundle
        self.tensors = frozenset(tensor.name for tensor in bundle.manifest.inputs)  # the model's own inputs
        self.slowdown = spec.slowdown
        self._around = around
        weights = {tenant.id: tenant.weight for tenant in around.tenants if tenant.sees(spec.model)}
        self._learning = learning = Learning(one_by_one=bundle.manifest.max_batch_size == 1)
        self._queue = queue = TicketQueue(weights, learning.alone_s)
        wake = asyncio.Event()
        self.instance = instance = ModelInstance(spec, around, wake.set, make_room, has_room)
        several = (lambda: instance.serving) if spec.workers > 1 else None
        self.room = room = Room(queue, learning, around.rules, weights, bundle.manifest.max_batch_size, several)
        self._judge = Judge(bundle.manifest, around, queue, self.instance, learning, room)
        self._review = Review(queue, self._judge, around.clock)
        self.record = TrackRecord(learning, around.slowed)
        self._dispatch = Dispatch(
            self.instance, queue, self._judge, self._review, learning, self.record, around, wake, room, self._beside
        )
        instance.crew.on_joined, instance.crew.on_failed = self._dispatch.next, self._dispatch.not_back
        instance.on_died = self._dispatch.died
        self._task: asyncio.Task[None] | None = None
        self._here = 0  # requests that aren't answered yet, wherever they wait
        self._nobody_here: asyncio.Event | None = None  # while somebody waits for that

    @property
    def state(self) -> str:
        """loading, ready, restarting, quarantined, resting, waking, refused, stopped."""
        return self.instance.state

    @property
    def serves(self) -> bool:
        """Whether who asks is answered, if need be after a load."""
        return self.instance.state in SERVING

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
        """Requests that wait for a worker."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that the workers have."""
        return self.instance.held

    async def activate(self) -> ActivationReport:
        """Start a worker and check the whole contract; serve from then on, with further ones from :meth:`muster` on.
        Raises what refused it."""
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

    async def muster(self) -> None:
        """Start the other workers, where it has several, and keep them; returns when each was tried."""
        await self.instance.crew.muster()

    async def come_back(self) -> None:
        """Serve again after :meth:`stop`, with what was learnt before. Raises what refused it."""
        await self.instance.come_back()
        self._begin()

    def move_to(self, path: Path) -> None:
        """Workers are started from this copy of the bundle from now on."""
        self.instance.start_from(bundle_path=path)

    async def drain(self, limit_s: float | None = None) -> None:
        """Wait until everyone who is here was answered, for at most ``limit_s``. Who calls it lets nobody in any more.

        Without a limit it ends as well: each batch has a watchdog, and nobody waits for a worker that stays away.
        """
        if not self._here:
            return
        self._nobody_here = self._nobody_here or asyncio.Event()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._nobody_here.wait(), limit_s)

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._dispatch.serve(), name=f"model-{self.name}")

    async def stop(self) -> None:
        """Stop the workers; requests still waiting are refused as draining."""
        self.instance.state = "stopped"
        places = self.instance.places
        running = [ticket for place in places for ticket in (*place.running.tickets, *place.ahead.tickets)]
        waiting = [*self._queue.tickets(), *running]
        self._review.cancel()
        await ended(self._task)
        for ticket in waiting:
            ticket.resolve(Shed(Reason.DRAINING, 5.0))
        self._queue.clear()
        await self.instance.crew.end()
        await asyncio.gather(*(place.recycling.end() for place in places))
        await asyncio.gather(*(place.worker.stop() for place in places))

    # A request

    def submit(self, request: InferenceRequest, on_answer: Callable[[Answer], None]) -> Ticket:
        """Take a request in. ``on_answer`` is called with its answer, once, maybe before this returns; never after
        :meth:`leave`."""
        if self.never_leaves:
            request = msgspec.structs.replace(request, local_only=True)
        ticket = Ticket(
            request=request,
            pending=Pending(
                request_id=request.request_id,
                priority=request.priority,
                deadline_at=request.deadline_at,
                cost_bytes=request.cost_hint_bytes,
                tenant=request.tenant,
            ),
            on_verdict=self._told,
            on_answer=on_answer,
        )
        self.room.arrives(ticket.pending, request.arrived_at)
        if self._around.trace is None:
            decision = self._judge.decide(ticket)
        else:
            question = self._judge.question(ticket)
            decision = question.decide()
            ticket.arrival = Arrival(question, decision, *self._around.device())
        if not isinstance(decision, Local) and self.instance.ready and not self.queued and not self.running:
            self.record.turned_away(request, self._around.clock())
        if not isinstance(decision, Local) and self.state == "resting":
            self.instance.resting.want()
        self._here += 1
        self._told(ticket, decision)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Its client has gone: it frees its place. Nothing happens to one that was answered."""
        if not ticket.answered:
            ticket.waits = False
            self._queue.drop(ticket)
            self._gone(ticket)

    def _follow(self, ticket: Ticket, decision: Decision) -> None:
        """Do what the router says."""
        if isinstance(decision, Local):
            ticket.reason, ticket.waits = decision.reason, True
            ticket.promised = decision.safe
            self._dispatch.offer(ticket)
            # Nobody else is ever reviewed, and who runs already needn't be.
            if ticket.request.deadline_at is not None and ticket in self._queue:
                self._review.plan()
        elif isinstance(decision, Cloud):
            if ticket.asking is not None:
                ticket.asking.cancel()
            ticket.asking = self._task_of(self._ask_cloud(ticket, decision), ticket)
        else:
            self._answer(ticket, shed_answer(decision))

    def _told(self, ticket: Ticket, verdict: Verdict | Local) -> None:
        """What becomes of one. Others wait behind it: whatever goes wrong is its trouble alone."""
        try:
            if not isinstance(verdict, Answer):
                self._follow(ticket, verdict)
                return
            if ticket.asking is not None:  # a worker was quicker
                ticket.asking.cancel()
            ticket.unsure = self._judge.second_opinion(ticket, verdict.confidence)
            if ticket.unsure is None:
                self._answer(ticket, verdict)
            else:
                ticket.asking = self._task_of(self._ask_again(ticket, verdict, ticket.unsure), ticket)
        except Exception:
            self._failed(ticket)

    async def _ask_cloud(self, ticket: Ticket, decision: Cloud) -> None:
        """Ask one endpoint, and another, while the router says so; then do what it says instead."""
        after: Decision = decision
        while isinstance(after, Cloud):
            answer = await self._around.cloud.infer(after, ticket.request, self.name, tried=ticket.failed_at)
            if isinstance(answer, Answer):
                self._answer(ticket, answer)
                return
            ticket.failed_at = (*ticket.failed_at, *answer.endpoints)
            after = self._judge.decide(ticket)  # another endpoint, if there is time
            if not isinstance(after, Cloud):
                after = for_want_of_cloud(after, answer.reason)
        self._follow(ticket, after)

    def _beside(self, ticket: Ticket, decision: Cloud) -> None:
        """Ask the cloud while a worker has it too: whoever answers first is heard."""
        ticket.asking = self._task_of(self._ask_beside(ticket, decision), ticket)

    async def _ask_beside(self, ticket: Ticket, decision: Cloud) -> None:
        try:
            answer = await self._around.cloud.infer(decision, ticket.request, self.name, tried=ticket.failed_at)
        except Exception:  # no reason for it not to hear what the worker says
            log.exception("the cloud could not be asked for a request for %s that its worker has too", self.name)
            ticket.failed_at, ticket.asking = (*ticket.failed_at, decision.endpoint), None
            return
        if isinstance(answer, Answer):
            ticket.waits, ticket.held_by = False, None
            self._queue.drop(ticket)
            self._answer(ticket, answer)
        else:
            ticket.failed_at, ticket.asking = (*ticket.failed_at, *answer.endpoints), None

    async def _ask_again(self, ticket: Ticket, ours: Answer, unsure: Cloud) -> None:
        now, cloud = self._around.clock(), self._around.cloud
        self._answer(ticket, await second_opinion(ours, unsure, ticket.request, cloud, now, ticket.failed_at))

    def _task_of(self, asking: Coroutine[Any, Any, None], ticket: Ticket) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await asking
            except Exception:
                self._failed(ticket)

        return asyncio.get_running_loop().create_task(guarded(), name=f"cloud-{self.name}")

    def _failed(self, ticket: Ticket) -> None:
        log.exception("a request for %s failed", self.name)
        text = "an internal error; the agent's log has it"
        self._answer(ticket, Answer(status=500, route="error", reason=ticket.reason, error=text))

    def _answer(self, ticket: Ticket, answer: Answer) -> None:
        if ticket.answered:
            return
        self._gone(ticket)
        if ticket.promised:
            self._learn_from_promise(ticket, answer)
        if (arrival := ticket.arrival) is not None and self._around.trace is not None:
            line = traced(
                self.name,
                arrival.question,
                ticket.unsure or arrival.decision,
                device=arrival.device,
                sampled_at=arrival.sampled_at,
                opinion=ticket.opinion,
                outcome=Decided(route=answer.route, reason=answer.reason.value),
                status=answer.status,
                now=self._around.clock(),
            )
            self._around.trace(line)
        ticket.on_answer(answer)

    def _learn_from_promise(self, ticket: Ticket, answer: Answer) -> None:
        """Whether it was in time; of one that a cloud took over, or whose worker died, nobody knows."""
        deadline_at = ticket.request.deadline_at
        if deadline_at is None or ticket.reason is Reason.RETRIED or not self.instance.ready:
            return
        now = self._around.clock()
        if answer.route == "local":
            self._learning.promised(now <= deadline_at, now)
        elif answer.reason in (Reason.DEADLINE_PASSED, Reason.CLOUD_UNAVAILABLE):
            self._learning.promised(False, now)

    def _gone(self, ticket: Ticket) -> None:
        ticket.answered = True
        if ticket.asking is not None and ticket.asking is not asyncio.current_task():
            ticket.asking.cancel()
        self._here -= 1
        if not self._here and self._nobody_here is not None:
            self._nobody_here.set()
            self._nobody_here = None
