"""One model of an agent under a virtual clock: the real decisions, and a worker that only takes time.

The queue and its order, batches, forecasts, the router, fairness and what is learnt are the agent's own code; the
worker's times are drawn from a distribution, so a minute under ten times the capacity takes seconds, and the same seed
gives the same run. What isn't in it: sockets, processes, the event loop, a cloud.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence

import msgspec
from open_loop import Outcome

from device_agent.learning import Learning
from device_agent.policy_in_force import PolicyInForce
from device_agent.room import Room
from device_agent.router import Here, Question, Stage
from device_agent.scheduler import Forecast, Pending, forecast, next_batch
from device_agent.settings import Policy
from device_agent.ticket_queue import TicketQueue
from device_agent.values import Decision, Local

COST_BYTES = 100
LENGTH = 20  # what the worker counts for it
WARM_UP = 200  # batches that were learnt from before the run


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """How long a batch takes: as the model of overload.py, measured. ``spread`` of the logarithm; a stall comes with a
    chance and is anything between the two."""

    base_s: float = 0.0058
    row_s: float = 0.0088
    spread: float = 0.04
    stall_chance: float = 0.003
    stall_s: tuple[float, float] = (0.002, 0.010)
    overhead_s: float = 0.0008  # of the supervisor, a batch
    gap_chance: float = 0.0  # that the supervisor itself stalls between two batches, which nothing reports
    gap_s: tuple[float, float] = (0.005, 0.025)
    max_batch_size: int = 4

    def took_s(self, rows: int, chance: random.Random) -> float:
        """One batch, drawn."""
        busy_s = (self.base_s + self.row_s * rows) * chance.lognormvariate(0, self.spread)
        return busy_s + (chance.uniform(*self.stall_s) if chance.random() < self.stall_chance else 0.0)

    def gap(self, chance: random.Random) -> float:
        """How long the supervisor stalls behind a batch, drawn."""
        return chance.uniform(*self.gap_s) if self.gap_chance and chance.random() < self.gap_chance else 0.0

    def capacity_per_s(self, batches: int = 4000) -> float:
        """Requests a second in full batches, as the closed loop of overload.py has them."""
        chance = random.Random(0)
        total_s = sum(self.took_s(self.max_batch_size, chance) + self.overhead_s for _ in range(batches))
        return batches * self.max_batch_size / total_s

    def unloaded_p95_s(self, count: int = 4000) -> float:
        """One request after the other."""
        chance = random.Random(0)
        return sorted(self.took_s(1, chance) for _ in range(count))[count * 95 // 100] + self.overhead_s


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One request: when it comes, and within what time it wants its answer (None: it may wait)."""

    at_s: float
    deadline_s: float | None = None
    priority: int = 0
    tenant: str = ""


class _Ticket:
    """As much of a ticket as the queue wants."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending


class Device:
    """Runs a schedule; :attr:`batches` has the sizes of those that ran. ``weights``: the tenants'."""

    def __init__(
        self, worker: Worker, seed: int, weights: Mapping[str, float] | None = None, policy: Policy | None = None
    ) -> None:
        self.batches: list[int] = []
        self._worker = worker
        self._policy = policy or Policy()
        self._chance = random.Random(seed)
        self._learning = Learning()
        self._learning.begin(worker.base_s + worker.row_s, LENGTH)
        for _ in range(WARM_UP):
            size = self._chance.randint(1, worker.max_batch_size)
            self._learn(size, worker.took_s(size, self._chance))
        self._queue = TicketQueue(weights or {}, self._learning.alone_s)
        self.room = Room(self._queue, self._learning, PolicyInForce(self._policy), weights or {}, worker.max_batch_size)
        self._running: tuple[float, float] | None = None  # when the batch began, and its prediction
        self._reasons: dict[int, str] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._arrivals: Sequence[Arrival] = ()

    def run(self, arrivals: Sequence[Arrival]) -> tuple[Outcome, ...]:
        """What became of each, in their order; a request without a deadline has an infinite one."""
        self._arrivals = arrivals
        events: list[tuple[float, int, Sequence[Pending], float]] = [
            (arrival.at_s, number, (), 0.0) for number, arrival in enumerate(arrivals)
        ]
        heapq.heapify(events)
        while events:
            now, number, batch, took_s = heapq.heappop(events)
            if number >= 0:
                self._arrive(number, now)
            else:
                self._done(batch, took_s, now)
            if self._running is None and (batch := self._take(now)):
                took_s = self._worker.took_s(len(batch), self._chance)
                gap_s = self._worker.gap(self._chance)
                heapq.heappush(events, (now + took_s + self._worker.overhead_s + gap_s, -1, batch, took_s))
        return tuple(self._outcomes[number] for number in range(len(arrivals)))

    def _arrive(self, number: int, now: float) -> None:
        arrival = self._arrivals[number]
        pending = Pending(
            request_id=number,
            priority=arrival.priority,
            deadline_at=None if arrival.deadline_s is None else now + arrival.deadline_s,
            cost_bytes=COST_BYTES,
            tenant=arrival.tenant,
        )
        self.room.arrives(pending, now)
        full = len(self._queue) >= self._policy.queue_limit or self.room.crowded(pending)
        seen = None if pending.deadline_at is None else self._forecast(pending, now)
        decision = self._decide(pending, now, Stage.NEW, seen, full)
        if isinstance(decision, Local):
            self._reasons[number] = decision.reason.value
            self._queue.put(_Ticket(pending))  # type: ignore[arg-type]
        else:
            self._end(number, now, decision)

    def _forecast(self, pending: Pending, now: float) -> Forecast:
        free_at = now
        if self._running is not None:
            since, expected_s = self._running
            free_at = max(since + expected_s, now + 0.1 * (now - since))
        return forecast(
            self._queue.with_one_more(pending),
            pending.request_id,
            now=now,
            free_at=free_at,
            model=self._learning.service,
            max_batch_size=self._worker.max_batch_size,
            newcomer=True,
            reserve=self.room.reserve(pending, now),
        )

    def _decide(
        self, pending: Pending, now: float, stage: Stage, seen: Forecast | None, full: bool = False
    ) -> Decision:
        here = Here(stage=stage, forecast=seen, worker_ready=True, queue_full=full)
        return Question(now=now, deadline_at=pending.deadline_at, local_only=False, here=here, there=None).decide()

    def _take(self, now: float) -> Sequence[Pending]:
        """As the dispatch does: who wouldn't be in time leaves, one at a time."""
        service = self._learning.service
        while self._queue:
            order = self._queue.order
            batch = [order[place] for place in next_batch(order, now, service, self._worker.max_batch_size)]
            busy_s = service.batch_s([pending.cost_bytes for pending in batch])
            end_at = now + busy_s
            seen = Forecast(expected_at=end_at, safe_at=end_at + service.margin_s(busy_s), idle=False)
            for pending in batch:
                decision = self._decide(pending, now, Stage.NEXT, seen)
                if not isinstance(decision, Local):
                    self._queue.drop(self._queue.ticket(pending))
                    self._end(pending.request_id, now, decision)
                    break
            else:
                patient = [self._arrivals[pending.request_id].at_s for pending in batch if pending.deadline_at is None]
                self.room.taken(patient, now)
                for pending in batch:
                    self._queue.take(self._queue.ticket(pending))
                self._running = (now, busy_s)
                self.batches.append(len(batch))
                return batch
        return ()

    def _done(self, batch: Sequence[Pending], took_s: float, now: float) -> None:
        self._running = None
        for pending in batch:
            self._end(pending.request_id, now, None)
        self._learn(len(batch), took_s)

    def _learn(self, size: int, took_s: float) -> None:
        learnt = self._learning.service.observed([COST_BYTES] * size, [LENGTH] * size, took_s)
        self._learning.service = learnt.overhead(self._worker.overhead_s)

    def _end(self, number: int, now: float, refused: Decision | None) -> None:
        arrival = self._arrivals[number]
        if self._reasons.get(number) in ("idle", "in_time") and arrival.deadline_s is not None:
            self._learning.promised(refused is None and now <= arrival.at_s + arrival.deadline_s, now)
        self._outcomes[number] = Outcome(
            arrival.at_s,
            float("inf") if arrival.deadline_s is None else arrival.deadline_s,
            arrival.at_s,
            now,
            200 if refused is None else 503,
            "local" if refused is None else None,
            self._reasons[number] if refused is None else refused.reason.value,
        )
