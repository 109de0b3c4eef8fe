"""How one model's batches went lately, for the judgement of :mod:`device_agent.probation`."""

from __future__ import annotations

import operator
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from device_agent.learning import Learning
from device_agent.probation import SLOWER, WINDOW, Batch, Conduct, Part
from device_agent.service_time import ServiceTime
from device_agent.values import InferenceRequest
from device_agent.wire import DoneItem
from device_agent.worker_pool import BatchResult

Slowed = Callable[[], tuple[bool, float | None]]  # too hot to run as it can, and when that was seen

Follow = Callable[[Sequence[InferenceRequest], BatchResult], None]

_ALL_WELL = frozenset((200,))
_status, _tenant = operator.attrgetter("status"), operator.attrgetter("tenant")


class TrackRecord:
    """Filled by the model's dispatch. While :meth:`watch` is in force, batches are held against frozen predictions:
    what is learnt from a slow model would soon call it normal."""

    def __init__(self, learning: Learning, slowed: Slowed = lambda: (False, None)) -> None:
        self._learning = learning
        self._slowed = slowed
        self._batches: deque[Batch] = deque(maxlen=WINDOW)
        self._seen_at: float | None = None  # when the device was seen last
        self._expected: tuple[ServiceTime, ...] = ()
        self._on_bad: Callable[[], None] | None = None
        self._follow: Follow | None = None
        self._strict = False

    @property
    def conduct(self) -> Conduct:
        """Over the last batches."""
        return Conduct.of(list(self._batches))

    def watch(
        self,
        expected: Sequence[ServiceTime],
        on_bad: Callable[[], None],
        follow: Follow | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Begin anew: hold batches against the slowest of these predictions, tell of each that is bad, and to
        ``follow`` of each that was answered. ``strict``: they are copies of what another bundle answered well, so
        whatever is refused is a failure."""
        self._batches.clear()
        self._expected, self._on_bad, self._follow, self._strict = tuple(expected), on_bad, follow, strict

    def unwatch(self) -> None:
        """Nobody needs to be told any more."""
        self._expected, self._on_bad, self._follow, self._strict = (), None, None, False

    def answered(self, requests: Sequence[InferenceRequest], result: BatchResult, predicted_s: float) -> None:
        """A batch came back that was predicted to take so long."""
        expected_s = predicted_s
        if self._expected:
            expected_s = self._expected_s([request.cost_hint_bytes for request in requests])
        failed = _failed(requests, result.done.items, strict=self._strict)
        self._add(
            Batch(
                answers=len(requests),
                failures=len(failed),
                busy_s=result.done.busy_s,
                expected_s=expected_s,
                parts=_parts(requests, failed),
                held=self._held(),
            )
        )
        if self._follow is not None:
            self._follow(requests, result)

    def turned_away(self, request: InferenceRequest, now: float) -> None:
        """An idle device didn't take it. While watched, that is as bad as a slow batch where what was learnt makes
        it late and twice the frozen prediction doesn't: of a model slow enough nothing with a deadline ever runs."""
        if not self._expected or request.deadline_at is None:
            return
        costs, learnt = [request.cost_hint_bytes], self._learning.service
        busy_s, expected_s = learnt.batch_s(costs), self._expected_s(costs)
        if SLOWER * expected_s < request.deadline_at - now < busy_s:
            batch = Batch(answers=1, failures=0, busy_s=busy_s, expected_s=expected_s, turned_away=True)
            self._add(msgspec.structs.replace(batch, held=self._held()))

    def lost(self, requests: Sequence[InferenceRequest] = ()) -> None:
        """The worker died with that batch; or idle, or while it was to come back, which counts as one."""
        count = len(requests) or 1
        parts = _parts(requests, requests)
        self._add(Batch(answers=count, failures=count, busy_s=None, expected_s=0.0, parts=parts))

    def _expected_s(self, costs_bytes: Sequence[int]) -> float:
        services = self._expected or (self._learning.service,)
        return max(service.batch_s(costs_bytes) for service in services)

    def _add(self, batch: Batch) -> None:
        self._batches.append(batch)
        if self._on_bad is not None and (batch.failures or batch.slow):
            self._on_bad()

    def _held(self) -> bool | None:
        """Whether the device holds batches back now. It is sampled now and then: what it was like is known the next
        time, and then of those before as well."""
        slowed, seen_at = self._slowed()
        if seen_at != self._seen_at:
            self._seen_at = seen_at
            self._settle(slowed)
        return slowed or (False if seen_at is None else None)

    def _settle(self, held: bool) -> None:
        slow = False
        for index, batch in enumerate(self._batches):
            if batch.held is None:
                self._batches[index] = msgspec.structs.replace(batch, held=held)
                slow |= batch.slow and not held
        if slow and self._on_bad is not None:
            self._on_bad()


def _failed(
    requests: Sequence[InferenceRequest], items: Sequence[DoneItem], *, strict: bool
) -> Sequence[InferenceRequest]:
    """Those where it was the model: it failed (500), or what it made of input that we prepared is no number (422)."""
    if _ALL_WELL.issuperset(map(_status, items)):
        return ()
    bad = {item.request_id: item.status for item in items if item.status != 200}
    return [
        request
        for request in requests
        if (status := bad.get(request.request_id)) is not None
        and (strict or status == 500 or (status == 422 and request.natural))
    ]


def _parts(requests: Sequence[InferenceRequest], failed: Sequence[InferenceRequest]) -> tuple[Part, ...]:
    if not any(map(_tenant, requests)):
        return ()
    answers = Counter(request.tenant for request in requests)
    failures = Counter(request.tenant for request in failed)
    return tuple(Part(tenant, count, failures[tenant]) for tenant, count in answers.items() if tenant)
