"""Feeds a model's worker from its queue, and brings it back when it dies; whose request died with it is told.

A worker that is through with a short batch would stand still until the next one reaches it. Where batches are short, it
has the next one already while one runs (:func:`device_agent.scheduler.goes_ahead`); never more, so that who comes late
may still overtake.
"""

from __future__ import annotations

import asyncio

import msgspec

from aios_edge.errors import WorkerLost
from device_agent.answer import local_answer
from device_agent.judge import Judge
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.review import Review
from device_agent.scheduler import goes_ahead
from device_agent.surroundings import Surroundings
from device_agent.ticket import Running, Ticket
from device_agent.ticket_queue import TicketQueue
from device_agent.track_record import TrackRecord
from device_agent.values import Local, Reason
from device_agent.watched_run import run_watched
from device_agent.worker_pool import BatchResult


class Dispatch:
    """One worker's loop; :meth:`serve` runs as a task until it is cancelled."""

    def __init__(
        self,
        instance: ModelInstance,
        queue: TicketQueue,
        judge: Judge,
        review: Review,
        learning: Learning,
        record: TrackRecord,
        around: Surroundings,
    ) -> None:
        self._instance = instance
        self._queue = queue
        self._judge = judge
        self._review = review
        self._learning = learning
        self._record = record
        self._around = around
        self._flights: set[asyncio.Task[None]] = set()  # of batches that went ahead
        self._landed = asyncio.Event()

    async def serve(self) -> None:
        """Batch after batch; waits for requests, and for a worker that restarts."""
        instance = self._instance
        try:
            while True:
                if instance.running.tickets or instance.ahead.tickets:
                    self._landed.clear()
                    await self._landed.wait()
                elif not instance.worker.ready:
                    await self._bring_back()
                elif batch := self._take():
                    await self._run(batch)
                else:
                    self._queue.wake.clear()
                    await self._queue.wake.wait()
        finally:
            for flight in self._flights:
                flight.cancel()
            instance.running, instance.ahead = Running(), Running()

    def go_ahead(self) -> None:
        """Give the worker its next batch while it has one, where that pays; asked whenever somebody begins to wait."""
        instance = self._instance
        if instance.running.tickets and instance.worker.ready and (batch := self._take()):
            flight = asyncio.get_running_loop().create_task(self._run(batch))
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)

    def _take(self) -> list[Ticket]:
        """The next batch, after judging each member again: no work for the dead."""
        instance = self._instance
        while self._queue and not instance.ahead.tickets:
            now = self._around.clock()
            batch, busy, forecast = self._judge.next_batch(now)
            if running := instance.running.tickets:
                alone = batch[0].pending.alone or running[0].pending.alone
                if alone or not goes_ahead(busy, instance.running.expected_s):
                    break
            strained = self._around.strain() is not None  # else one without a deadline stays where it is
            leaving = [
                (ticket, decision)
                for ticket in batch
                if (strained or ticket.request.deadline_at is not None)
                and not isinstance(decision := self._judge.decide(ticket, forecast), Local)
            ]
            for ticket, decision in leaving:
                self._queue.drop(ticket)
                if not isinstance(decision, Local):
                    ticket.resolve(decision)
            if not leaving:
                for ticket in batch:
                    self._queue.drop(ticket)
                    ticket.taken_at = now
                if running:
                    instance.ahead = Running(batch, now, busy)
                else:
                    instance.running = Running(batch, now, busy)
                return batch
        return []

    async def _run(self, batch: list[Ticket]) -> None:
        instance, requests = self._instance, [ticket.request for ticket in batch]
        timeout_s, expected_s = self._around.policy.batch_timeout_s, instance.running.expected_s
        self.go_ahead()  # with those who wait already; they are sent after these
        try:
            result = await run_watched(instance.worker, requests, timeout_s, expected_s + instance.ahead.expected_s)
        except WorkerLost as lost:
            if batch is instance.ahead.tickets:
                self._untouched(batch)
            else:
                instance.running = Running()
                self._record.lost(len(batch))
                self._lost(lost, batch)
            return
        finally:
            self._landed.set()
        now = self._around.clock()
        seen_s = now - instance.running.since
        self._next_runs(now)
        instance.plan = instance.plan.served()
        self._answer(batch, result)
        self._record.answered(requests, result)
        self._learning.learn(requests, result, seen_s)

    def _next_runs(self, now: float) -> None:
        """The batch that went ahead is the one that runs now, if there is one."""
        ahead = self._instance.ahead
        for ticket in ahead.tickets:
            ticket.taken_at = now
        self._instance.running, self._instance.ahead = Running(ahead.tickets, now, ahead.expected_s), Running()
        self.go_ahead()

    def _untouched(self, batch: list[Ticket]) -> None:
        """The worker died before it came to this batch: it waits again, as before."""
        self._instance.ahead = Running()
        for ticket in batch:
            if not ticket.verdict.done():
                self._queue.put(ticket)
        self._review.run()

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
            ticket.resolve(answer)

    def _lost(self, lost: WorkerLost, batch: list[Ticket]) -> None:
        """Each request of the dead batch: once more, alone, where its deadline allows; else the cloud; else 503."""
        now = self._instance.lost(lost.what, in_flight=len(batch), queued=len(self._queue))
        for ticket in batch:
            if ticket.verdict.done():
                continue
            if not ticket.pending.alone:
                again = msgspec.structs.replace(ticket.pending, alone=True)
                forecast = self._judge.forecast(again, now, waiting=False)
                if again.deadline_at is None or (forecast and forecast.expected_at <= again.deadline_at):
                    ticket.pending, ticket.reason = again, Reason.RETRIED
                    self._queue.put(ticket)
                    self._review.plan()
                    continue
            self._elsewhere(ticket, now)

    def _elsewhere(self, ticket: Ticket, now: float) -> None:
        self._queue.drop(ticket)
        decision = self._judge.elsewhere(ticket, now, self._instance.plan.expected_s)
        if not isinstance(decision, Local):
            ticket.resolve(decision)

    async def _bring_back(self) -> None:
        instance = self._instance
        if instance.state == "ready":  # it died while idle
            self._record.lost(1)
            instance.lost_while_idle(queued=len(self._queue))
            self._review.run()
        failure = await instance.restart()
        if failure is None:
            return
        self._record.lost(1)
        self._review.run()
        if instance.plan.hopeless(failure):
            for ticket in self._queue.tickets():  # no deadline is no wish to wait for ever
                self._elsewhere(ticket, instance.lost_at)
