"""What one model's batches take on this device, as learnt so far."""

from __future__ import annotations

from collections.abc import Sequence

from device_agent.scheduler import Pending
from device_agent.service_time import DEFAULT_UNITS, ServiceTime
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult


class Learning:
    """Holds the estimate that stands now; what it is made of is pure, in :mod:`device_agent.service_time`."""

    def __init__(self, *, one_by_one: bool = False) -> None:
        self._one_by_one = one_by_one
        self.service = ServiceTime.prior(None, one_by_one=one_by_one)

    def begin(self, busy_s: float | None, length: int | None = None) -> None:
        """Forget what was learnt and begin from one request: how long it took, and its tokens where they are known."""
        units = DEFAULT_UNITS if length is None else max(length, 1)
        self.service = ServiceTime.prior(busy_s, units, one_by_one=self._one_by_one)

    def alone_s(self, pending: Pending) -> float:
        """How long a request would take alone."""
        return self.service.busy_s(self.service.units(pending.cost_bytes))

    def promised(self, kept: bool, now: float) -> None:
        """A request that was let in because it was safe to be in time was so, or wasn't."""
        self.service = self.service.promised(kept, now)

    def learn(self, requests: Sequence[InferenceRequest], result: BatchResult, seen_s: float | None) -> None:
        """Learn from a batch that took ``seen_s`` from its sending to its answer; None where that wasn't seen."""
        lengths = {item.request_id: item.length for item in result.done.items if item.status == 200 and item.batch_size}
        if len(lengths) < len(requests):  # a refusal, or an answer without rows, is quick and says nothing about others
            return
        self.service = self.service.observed(
            [request.cost_hint_bytes for request in requests],
            [lengths[request.request_id] for request in requests],
            result.done.busy_s,
        )
        if seen_s is not None:
            self.service = self.service.overhead(seen_s - result.done.busy_s)
