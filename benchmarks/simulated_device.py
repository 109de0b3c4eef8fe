"""One model of an agent under a virtual clock: the real decisions, and a worker that only takes time.

The queue's order, batches, forecasts, the router and what is learnt are the agent's own code; the worker's times are
drawn from a distribution, so a minute under ten times the capacity takes seconds, and the same seed gives the same run.
What isn't in it: sockets, processes, the event loop, a cloud.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import msgspec
from open_loop import Outcome

from device_agent.router import Here, Question, Stage
from device_agent.scheduler import Forecast, Pending, forecast, insert, next_batch
from device_agent.service_time import ServiceTime
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
    max_batch_size: int = 4

    def took_s(self, rows: int, chance: random.Random) -> float:
        """One batch, drawn."""
        busy_s = (self.base_s + self.row_s * rows) * chance.lognormvariate(0, self.spread)
        return busy_s + (chance.uniform(*self.stall_s) if chance.random() < self.stall_chance else 0.0)

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


class Device:
    """Runs a schedule; :attr:`batches` has the sizes of those that ran."""

    def __init__(self, worker: Worker, seed: int) -> None:
        self.batches: list[int] = []
        self._worker = worker
        self._chance = random.Random(seed)
        self._service = ServiceTime.prior(worker.base_s + worker.row_s, LENGTH)
        for _ in range(WARM_UP):
            size = self._chance.randint(1, worker.max_batch_size)
            self._learn(size, worker.took_s(size, self._chance))
        self._queue: list[Pending] = []
        self._free_at: tuple[float, float] | None = None  # when the running batch began, and its prediction
        self._reasons: dict[int, str] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._arrivals: Sequence[Arrival] = ()

    def run(self, arrivals: Sequence[Arrival]) -> tuple[Outcome, ...]:
        """What became of each, in their order; a request without a deadline has an infinite one."""
        self._arrivals = arrivals
        events: list[tuple[float, int, list[Pending], float]] = [
            (arrival.at_s, number, [], 0.0) for number, arrival in enumerate(arrivals)
        ]
        heapq.heapify(events)
        while events:
            now, number, batch, took_s = heapq.heappop(events)
            if number >= 0:
                self._arrive(number, now)
            else:
                self._done(batch, took_s, now)
            if self._free_at is None and (batch := self._take(now)):
                took_s = self._worker.took_s(len(batch), self._chance)
                heapq.heappush(events, (now + took_s + self._worker.overhead_s, -1, batch, took_s))
        return tuple(self._outcomes[number] for number in range(len(arrivals)))

    def _arrive(self, number: int, now: float) -> None:
        arrival = self._arrivals[number]
        pending = Pending(
            request_id=number,
            priority=arrival.priority,
            deadline_at=None if arrival.deadline_s is None else now + arrival.deadline_s,
            cost_bytes=COST_BYTES,
        )
        order = list(self._queue)
        insert(order, pending)
        decision = self._decide(pending, now, Stage.NEW, self._forecast(order, pending, now))
        if isinstance(decision, Local):
            self._reasons[number] = decision.reason.value
            insert(self._queue, pending)
        else:
            self._end(number, now, decision)

    def _forecast(self, order: Sequence[Pending], pending: Pending, now: float) -> Forecast:
        free_at = now
        if self._free_at is not None:
            since, expected_s = self._free_at
            free_at = max(since + expected_s, now + 0.1 * (now - since))
        return forecast(
            order,
            pending.request_id,
            now=now,
            free_at=free_at,
            model=self._service,
            max_batch_size=self._worker.max_batch_size,
            newcomer=True,
        )

    def _decide(self, pending: Pending, now: float, stage: Stage, seen: Forecast) -> Decision:
        here = Here(stage=stage, forecast=seen, worker_ready=True)
        return Question(now=now, deadline_at=pending.deadline_at, local_only=False, here=here, there=None).decide()

    def _take(self, now: float) -> list[Pending]:
        """As the dispatch does: who wouldn't be in time leaves, one at a time."""
        while self._queue:
            size = next_batch(self._queue, now, self._service, self._worker.max_batch_size)
            batch = self._queue[:size]
            busy_s = self._service.busy_s(self._service.batch_units([pending.cost_bytes for pending in batch]))
            seen = Forecast(expected_at=now + busy_s, safe_at=now + busy_s + self._service.margin_s(busy_s), idle=False)
            for pending in batch:
                decision = self._decide(pending, now, Stage.NEXT, seen)
                if not isinstance(decision, Local):
                    self._queue.remove(pending)
                    self._end(pending.request_id, now, decision)
                    break
            else:
                del self._queue[:size]
                self._free_at = (now, busy_s)
                self.batches.append(size)
                return batch
        return []

    def _done(self, batch: list[Pending], took_s: float, now: float) -> None:
        self._free_at = None
        for pending in batch:
            self._end(pending.request_id, now, None)
        self._learn(len(batch), took_s)

    def _learn(self, size: int, took_s: float) -> None:
        learnt = self._service.observed([COST_BYTES] * size, [LENGTH] * size, took_s)
        self._service = learnt.overhead(self._worker.overhead_s)

    def _end(self, number: int, now: float, refused: Decision | None) -> None:
        arrival = self._arrivals[number]
        self._outcomes[number] = Outcome(
            arrival.at_s,
            float("inf") if arrival.deadline_s is None else arrival.deadline_s,
            arrival.at_s,
            now,
            200 if refused is None else 503,
            "local" if refused is None else None,
            self._reasons[number] if refused is None else refused.reason.value,
        )
