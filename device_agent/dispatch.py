"""Feeds a model's worker from its queue, and brings it back when it dies; whose request died with it is told."""

from __future__ import annotations

import msgspec

from aios_edge.errors import WorkerLost
from device_agent.answer import local_answer
from device_agent.judge import Judge
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.review import Review
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

    async def serve(self) -> None:
        """Batch after batch; waits for requests, and for a worker that restarts."""
        while True:
            if not self._instance.worker.ready:
                await self._bring_back()
            elif batch := self._take():
                await self._run(batch)
            else:
                self._queue.wake.clear()
                await self._queue.wake.wait()

    def _take(self) -> list[Ticket]:
        """The next batch, after judging each member again: no work for the dead."""
        while self._queue:
            now = self._around.clock()
            batch, busy, forecast = self._judge.next_batch(now)
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
                self._instance.running = Running(batch, now, busy)
                return batch
        return []

    async def _run(self, batch: list[Ticket]) -> None:
        instance, requests = self._instance, [ticket.request for ticket in batch]
        timeout_s, expected_s = self._around.policy.batch_timeout_s, instance.running.expected_s
        try:
            result = await run_watched(instance.worker, requests, timeout_s, expected_s)
        except WorkerLost as lost:
            self._record.lost(requests)
            self._lost(lost, batch)
            return
        finally:
            seen_s = self._around.clock() - instance.running.since
            instance.running = Running()
        instance.plan = instance.plan.served()
        self._answer(batch, result)
        self._record.answered(requests, result)
        self._learning.learn(requests, result, seen_s)

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
            self._record.lost()
            instance.lost_while_idle(queued=len(self._queue))
            self._review.run()
        failure = await instance.restart()
        if failure is None:
            return
        self._record.lost()
        self._review.run()
        if instance.plan.hopeless(failure):
            for ticket in self._queue.tickets():  # no deadline is no wish to wait for ever
                self._elsewhere(ticket, instance.lost_at)
