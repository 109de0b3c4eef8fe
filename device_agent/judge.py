"""Where one model's requests go: gathers what the router decides by, and decides nothing itself."""

from __future__ import annotations

from functools import partial

import msgspec

from aios_edge.manifest import Manifest
from device_agent import scheduler
from device_agent.cloud_choice import Wanted
from device_agent.fairness import NO_RESERVE
from device_agent.learning import Learning
from device_agent.model_instance import ModelInstance
from device_agent.room import Room
from device_agent.router import (
    Here,
    Question,
    Stage,
    There,
    after_worker_lost,
    next_review_at,
    or_for_budget,
    route,
    second_opinion,
)
from device_agent.scheduler import Forecast, Pending
from device_agent.surroundings import Surroundings
from device_agent.ticket import Ticket
from device_agent.ticket_queue import TicketQueue
from device_agent.trace import Opinion
from device_agent.values import SERVING, Cloud, Decision


class Judge:
    """Asked when a request arrives, while it waits, just before it runs, and when a worker took it along."""

    def __init__(
        self,
        manifest: Manifest,
        around: Surroundings,
        queue: TicketQueue,
        instance: ModelInstance,
        learning: Learning,
        room: Room,
    ) -> None:
        self._manifest = manifest
        self._around = around
        self._queue = queue
        self._instance = instance
        self._learning = learning
        self._room = room

    def decide(self, ticket: Ticket, forecast: Forecast | None = None) -> Decision:
        """Ask the router about a ticket, waiting or not yet; ``forecast`` where more is known than the queue tells."""
        request, here = ticket.request, self._here(ticket, forecast)
        if here.knows_enough(request.deadline_at):
            return route(now=0.0, deadline_at=None, local_only=request.local_only, here=here, there=None)
        return self.question(ticket, forecast).decide()

    def question(self, ticket: Ticket, forecast: Forecast | None = None) -> Question:
        """What the router would be asked now."""
        now, request = self._around.clock(), ticket.request
        here = self._here(ticket, forecast)
        there = dear = None
        if self._around.trace is not None or not here.knows_enough(request.deadline_at):  # a trace has all of it
            there, dear = self.there(ticket, now), self._dear(ticket, now)
            if forecast is None:
                waiting = ticket in self._queue
                here = msgspec.structs.replace(here, forecast=self.forecast(ticket.pending, now, waiting=waiting))
        return Question(
            now=now,
            deadline_at=request.deadline_at,
            local_only=request.local_only,
            queued=len(self._queue),
            crowded=here.stage is Stage.NEW and self._room.crowded(ticket.pending),
            here=here,
            there=there,
            dear=dear,
            policy=self._around.rules.digest,
        )

    def _here(self, ticket: Ticket, forecast: Forecast | None) -> Here:
        stage = Stage.WAITING if ticket in self._queue else Stage.NEW
        full = stage is Stage.NEW and (
            len(self._queue) >= self._around.policy.queue_limit or self._room.crowded(ticket.pending)
        )
        here = Here(
            stage=stage if forecast is None else Stage.NEXT,
            forecast=forecast,
            worker_ready=self._instance.ready,
            queue_full=full,
            strain=self._around.strain(),
        )
        if here.worker_ready:
            return here
        back_in_s = self._instance.back_in_s(self._around.clock())
        return msgspec.structs.replace(here, away=self._instance.away, back_in_s=back_in_s)

    def second_opinion(self, ticket: Ticket, confidence: float | None) -> Cloud | None:
        """Ask the router about a ticket that was answered here."""
        if self._around.policy.min_confidence is None and self._around.trace is None:
            return None
        now, request = self._around.clock(), ticket.request
        there = self.there(ticket, now)
        if confidence is not None:
            ticket.opinion = Opinion(at=now, confidence=confidence, there=there)
        return second_opinion(
            now=now,
            deadline_at=request.deadline_at,
            local_only=request.local_only,
            confidence=confidence,
            least=self._around.policy.min_confidence,
            there=there,
        )

    def there(self, ticket: Ticket, now: float) -> There | None:
        """The cloud endpoint that may take it now."""
        if ticket.no_cloud or ticket.request.local_only:
            return None
        return self._around.cloud.choose(self._manifest.name, ticket.wanted, now)

    def _dear(self, ticket: Ticket, now: float) -> There | None:
        """The cloud endpoint that could take it if its budget weren't spent."""
        if ticket.no_cloud or ticket.request.local_only:
            return None
        return self._around.cloud.unaffordable(self._manifest.name, ticket.wanted, now)

    def elsewhere(self, ticket: Ticket, now: float) -> Decision:
        """Where one goes whose worker died, or doesn't come back."""
        back_in_s, away = self._instance.back_in_s(now), self._instance.away
        ask = partial(after_worker_lost, now, ticket.request.deadline_at, back_in_s=back_in_s, away=away)
        return or_for_budget(ask, there=self.there(ticket, now), dear=self._dear(ticket, now))

    def forecast(self, pending: Pending, now: float, *, waiting: bool) -> Forecast | None:
        """When it would be answered here; None where nobody knows."""
        if self._instance.state not in ("restarting", *SERVING):
            return None
        free_at, *others_free_at = self._instance.free_times(now)
        return scheduler.forecast(
            self._queue.order if waiting else self._queue.with_one_more(pending),
            pending.request_id,
            now=now,
            free_at=free_at,
            others_free_at=others_free_at,
            model=self._learning.service,
            max_batch_size=self._manifest.max_batch_size,
            newcomer=not waiting,
            reserve=NO_RESERVE if waiting or pending.deadline_at is None else self._room.reserve(pending, now),
            length_bucketing=self._around.policy.length_bucketing,
        )

    def next_batch(self, now: float, at: float) -> tuple[list[Ticket], float, Forecast]:
        """Who would run together on the worker that is free ``at`` then, how long that takes, and when they would be
        answered."""
        service = self._learning.service
        order, bucketing = self._queue.order, self._around.policy.length_bucketing
        places = scheduler.next_batch(order, at, service, self._manifest.max_batch_size, length_bucketing=bucketing)
        batch = [order[place] for place in places]
        busy = service.batch_s([pending.cost_bytes for pending in batch])
        forecast = Forecast(expected_at=at + busy, safe_at=at + busy + service.margin_s(at - now + busy), idle=False)
        return [self._queue.ticket(pending) for pending in batch], busy, forecast

    def next_review_at(self, now: float) -> float | None:
        """When one that waits has its last chance in the cloud, or its deadline passes."""
        return next_review_at(self._queue.order, self.soonest(now), now)

    def soonest(self, now: float) -> There | None:
        """The cloud endpoint that is predicted to answer first, whoever asks."""
        return self._around.cloud.soonest(self._manifest.name, Wanted(), now)
