"""Feeds a model's workers from its queue, and brings them back when they die; whose request died with one is told.

A worker that is through with a short batch would stand still until the next one reaches it. Where batches are short, it
has the next one already while one runs (:func:`device_agent.scheduler.goes_ahead`); never more, so that who comes late
may still overtake.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

import msgspec

from aios_edge.errors import WorkerLost
from device_agent.answer import local_answer
from device_agent.background import kept_up
from device_agent.judge import Judge
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.overrun import Overrun
from device_agent.place import Place
from device_agent.review import Review
from device_agent.room import Room
from device_agent.scheduler import Forecast, goes_ahead
from device_agent.surroundings import Surroundings
from device_agent.ticket import Running, Ticket
from device_agent.ticket_queue import TicketQueue
from device_agent.track_record import TrackRecord
from device_agent.values import Cloud, Local, Reason, Shed
from device_agent.worker_pool import BatchResult

log = logging.getLogger("device_agent.model")

STANDS_STILL = 2.0  # times what a batch and the way to its worker were expected to take: then nothing goes behind it
LEARN_EVERY_S = 0.002  # of batches that take less, some teach as much as all; learning would be a part of their cost


class Dispatch:
    """One model's: :meth:`offer` for each request that is to run here. A batch begins the moment that there is one and
    any worker is free, in the same turn of the event loop. :meth:`serve` brings the workers back, as a task that runs
    until it is cancelled."""

    def __init__(
        self,
        instance: ModelInstance,
        queue: TicketQueue,
        judge: Judge,
        review: Review,
        learning: Learning,
        record: TrackRecord,
        around: Surroundings,
        wake: asyncio.Event,
        room: Room,
        ask_beside: Callable[[Ticket, Cloud], None],
    ) -> None:
        self._instance = instance
        self._places = instance.places
        self._queue = queue
        self._judge = judge
        self._review = review
        self._learning = learning
        self._record = record
        self._around = around
        self._room = room
        self._overrun = Overrun(instance.places, judge, around.clock, ask_beside)
        self._learnt_at = -math.inf
        self._wake = wake  # set when a worker may have died, or there is a chore

    def offer(self, ticket: Ticket) -> None:
        """Run a ticket that was judged this moment, now or when its turn comes."""
        if not self._queue:
            for place in self._places:
                if self._free(place):
                    now = ticket.taken_at = self._around.clock()
                    self._room.taken(_patient([ticket]), now)
                    self._begin(place, [ticket], now, self._learning.alone_s(ticket.pending))
                    return
        self._queue.put(ticket)
        for place in self._places:
            if not place.ahead.tickets:  # else it has all that it may have
                self.next()
                return

    def next(self) -> None:
        """Give each worker that is free its next batch, while somebody waits; where batches are short, one ahead."""
        idle = False
        for place in self._places:
            if self._free(place):
                if self._queue and (batch := self._take(place)):
                    self._begin(place, *batch)
            elif not place.running.tickets:
                idle = True
        if idle and self._undone():  # there is something else to be done first
            self._wake.set()
        while self._queue and (soonest := self._soonest()) is not None and self._may_go_ahead(soonest):
            if not (batch := self._take(soonest)):
                return
            self._begin(soonest, *batch)

    def _free(self, place: Place) -> bool:
        """Whether its worker takes a batch now; what else is to be done first is :meth:`serve`'s."""
        instance = self._instance
        if place.running.tickets or not place.worker.takes or instance.state != "ready":
            return False
        return not instance.has_chore(place, len(self._queue))

    def _undone(self) -> bool:
        """Whether :meth:`serve` has something to do at this moment."""
        instance = self._instance
        if not instance.ready or instance.chore(len(self._queue)) is not None:
            return True
        return any(self._died(place) for place in self._places)

    def _died(self, place: Place) -> bool:
        """Whether its worker has ended while idle, and nobody was told yet; the one before it may have its last batch
        still."""
        if not place.live or place.worker.ready or self._instance.state not in ("ready", "restarting"):
            return False
        return not place.running.tickets or place.running.worker is not place.worker

    def died(self, place: Place) -> None:
        """Its worker has ended: whoever was idle is told at once, also while :meth:`serve` is at a chore that takes
        long; of one with a batch its batch tells."""
        if self._died(place):
            self._record.lost()
            self._instance.lost_while_idle(place, queued=len(self._queue))
            self._review.run()
        self._wake.set()

    def _soonest(self) -> Place | None:
        """Of those at work the one that is expected to be free first: who goes ahead anywhere else waits longer."""
        if len(self._places) == 1:
            return self._places[0]
        now = self._around.clock()
        at_work = [place for place in self._places if place.running.tickets and place.worker.ready]
        return min(at_work, key=lambda place: place.free_at(now), default=None)

    def _may_go_ahead(self, place: Place) -> bool:
        """Whether a second batch may be given to it while it has a short one. None goes before or behind a request that
        died with a worker, nor before a chore, which would never have its turn; nor to a worker that took over while
        the one before it has its last batch, or that should have been through long ago."""
        instance, running = self._instance, place.running
        if not self._queue or not running.tickets or place.ahead.tickets or instance.state != "ready":
            return False
        if running.worker is not place.worker or not place.worker.takes:
            return False
        overhead_s = self._learning.service.overhead_s
        if not goes_ahead(running.expected_s, running.expected_s, overhead_s):
            return False
        if self._around.clock() > running.since + STANDS_STILL * (running.expected_s + overhead_s):
            return False
        alone = running.tickets[0].pending.alone or self._queue.order[0].alone
        return not alone and not instance.has_chore(place, len(self._queue))

    async def serve(self) -> None:
        """Bring the workers back whenever none is left, and do what is to be done between two batches."""
        try:
            await kept_up(self._step, f"the workers of {self._instance.name} could not be looked after")
        finally:
            self._overrun.close()
            for place in self._places:
                place.watchdog.close()

    async def _step(self) -> None:
        self._wake.clear()
        instance = self._instance
        for place in self._places:
            if self._died(place):  # the one before it had a batch when it ended
                self.died(place)
        if chore := instance.chore(len(self._queue)):
            await chore()
        elif instance.ready or instance.awaits_batch or instance.state == "resting":
            if instance.ready:  # else it rests, and nobody asks for it
                self.next()
            await self._wake.wait()
        else:
            await self._bring_back()

    def _take(self, place: Place) -> tuple[list[Ticket], float, float] | None:
        """The next batch, after judging each member again (no work for the dead); now, and how long it will take."""
        while self._queue and not place.ahead.tickets:  # who is sent away may bring another, which is begun
            now = self._around.clock()
            batch, busy, forecast = self._judge.next_batch(now, place.free_at(now))
            if place.running.tickets:
                service, running_s = self._learning.service, place.running.expected_s
                if not goes_ahead(busy, running_s, service.overhead_s, grows=not service.one_by_one):
                    return None
            if leaves := self._first_to_leave(batch, forecast):  # one at a time: without it the others may be in time
                ticket, decision = leaves
                self._queue.drop(ticket)
                ticket.resolve(decision)
            else:
                self._room.taken(_patient(batch), now)
                for ticket in batch:
                    self._queue.take(ticket)
                    ticket.taken_at = now
                return batch, now, busy
        return None

    def _first_to_leave(self, batch: list[Ticket], forecast: Forecast) -> tuple[Ticket, Cloud | Shed] | None:
        strained = self._around.strain() is not None  # else one without a deadline stays where it is
        for ticket in batch:
            if strained or ticket.request.deadline_at is not None:
                decision = self._judge.decide(ticket, forecast)
                if not isinstance(decision, Local):
                    return ticket, decision
        return None

    def _begin(self, place: Place, batch: list[Ticket], now: float, expected_s: float) -> None:
        instance, given = self._instance, Running(batch, now, expected_s, place.worker)
        if was_ahead := bool(place.running.tickets):
            place.ahead = given
        else:
            place.running = given
        requests = [ticket.request for ticket in batch]
        for ticket in batch:
            ticket.held_by = given

        def ended(end: BatchResult | WorkerLost) -> None:
            if instance.state == "stopped":  # which ended the worker, and told everybody
                place.running = place.ahead = Running()
                return
            if isinstance(end, WorkerLost):
                if given is place.ahead:
                    self._untouched(place, given)
                    return
                place.running = Running()
                self._record.lost(requests)
                self._lost(place, end, given)
                self.next()  # another may be free for them
                self._wake.set()
                return
            began, now = place.running.since, self._around.clock()
            self._next_runs(place, now)
            try:
                instance.served(place)
                self.next()  # the worker needn't wait for the answers to be written, nor clients for the rest
            except Exception:  # no reason for these to go without their answers
                log.exception("the next batch of %s could not begin; tried again", instance.name)
                self._wake.set()
            self._answer(given, end)
            self._record.answered(requests, end, expected_s)
            if now - self._learnt_at >= LEARN_EVERY_S:
                self._learnt_at = now
                # Of one that was there already, the time from reply to reply tells nothing of the way to the worker.
                self._learning.learn(requests, end, None if was_ahead else now - began)

        self._overrun.watch(place, given, now)
        timeout_s = self._around.policy.batch_timeout_s
        place.watchdog.run(place.worker, requests, ended, timeout_s=timeout_s, predicted_s=expected_s)

    def _next_runs(self, place: Place, now: float) -> None:
        """The batch that went ahead is the one that runs now, if there is one. An empty one never changes, and may
        stand for both."""
        place.running = ahead = place.ahead
        if ahead.tickets:
            for ticket in ahead.tickets:
                ticket.taken_at = now
            ahead.since = now
            place.ahead = Running()

    def _untouched(self, place: Place, batch: Running) -> None:
        """The worker died before it came to this batch: it waits again, as before, for this one or another."""
        place.ahead = Running()
        for ticket in batch.tickets:
            if ticket.held_by is batch and ticket.waits:
                self._queue_again(ticket)
        self._review.run()
        self.next()

    def _queue_again(self, ticket: Ticket) -> None:
        ticket.held_by = None
        self._queue.put(ticket)

    def _answer(self, batch: Running, result: BatchResult) -> None:
        items = {item.request_id: item for item in result.done.items}
        for ticket in batch.tickets:
            if ticket.held_by is not batch:  # it has left, and may be waiting again
                continue
            item = items.get(ticket.pending.request_id)
            answer = local_answer(
                item,
                result.payload,
                ticket.reason,
                queue_s=ticket.taken_at - ticket.request.arrived_at,
                energy=self._around.energy(item.compute_s, item.batch_size) if item else None,
            )
            ticket.resolve(answer)

    def _lost(self, place: Place, lost: WorkerLost, batch: Running) -> None:
        """Each request of the dead batch: once more, alone, where its deadline allows; else the cloud; else 503."""
        now = self._instance.lost(place, lost.what, in_flight=len(batch.tickets), queued=len(self._queue))
        for ticket in batch.tickets:
            if ticket.held_by is not batch or not ticket.waits:
                continue
            if not ticket.pending.alone:
                again = msgspec.structs.replace(ticket.pending, alone=True)
                forecast = self._judge.forecast(again, now, waiting=False)
                if again.deadline_at is None or (forecast and forecast.expected_at <= again.deadline_at):
                    ticket.pending, ticket.reason = again, Reason.RETRIED
                    self._queue_again(ticket)
                    self._review.plan()
                    continue
            self._elsewhere(ticket, now)

    def _elsewhere(self, ticket: Ticket, now: float) -> None:
        self._queue.drop(ticket)
        decision = self._judge.elsewhere(ticket, now)
        if not isinstance(decision, Local):
            ticket.resolve(decision)

    async def _bring_back(self) -> None:
        instance = self._instance
        if instance.state == "quarantined":
            self._all_elsewhere()
        await instance.crew.settled()
        if instance.ready:  # one was on its way
            return
        failure = await instance.restart()
        if failure is None:
            return
        self.not_back()
        if instance.plan.hopeless(failure):
            self._all_elsewhere()

    def not_back(self) -> None:
        """A worker was to come back, or to join, and didn't."""
        self._record.lost()
        self._review.run()

    def _all_elsewhere(self) -> None:
        for ticket in self._queue.tickets():  # no deadline is no wish to wait for ever
            self._elsewhere(ticket, self._instance.lead.lost_at)


def _patient(batch: Sequence[Ticket]) -> list[float]:
    """When those came that have no deadline."""
    return [ticket.request.arrived_at for ticket in batch if ticket.request.deadline_at is None]
