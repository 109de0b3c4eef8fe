"""How one model's batches went lately, for the judgement of :mod:`device_agent.probation`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from device_agent.learning import Learning
from device_agent.probation import SLOWER, WINDOW, Batch, Conduct
from device_agent.service_time import ServiceTime
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult

#: The model failed on an input (500), or what it gave is no number (422).
FAILURES = (500, 422)


Follow = Callable[[Sequence[InferenceRequest], BatchResult], None]


class TrackRecord:
    """Filled by the model's dispatch. While :meth:`watch` is in force, batches are held against frozen predictions:
    what is learnt from a slow model would soon call it normal."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self._batches: deque[Batch] = deque(maxlen=WINDOW)
        self._expected: tuple[ServiceTime, ...] = ()
        self._on_bad: Callable[[], None] | None = None
        self._follow: Follow | None = None

    @property
    def conduct(self) -> Conduct:
        """Over the last batches."""
        return Conduct.of(list(self._batches))

    def watch(self, expected: Sequence[ServiceTime], on_bad: Callable[[], None], follow: Follow | None = None) -> None:
        """Begin anew: hold batches against the slowest of these predictions, tell of each that is bad, and to
        ``follow`` of each that was answered."""
        self._batches.clear()
        self._expected, self._on_bad, self._follow = tuple(expected), on_bad, follow

    def unwatch(self) -> None:
        """Nobody needs to be told any more."""
        self._expected, self._on_bad, self._follow = (), None, None

    def answered(self, requests: Sequence[InferenceRequest], result: BatchResult, *, copies: bool = False) -> None:
        """A batch came back; before its time is learnt from. ``copies``: of requests that another bundle answered well,
        so whatever is refused is a failure."""
        costs, statuses = [request.cost_hint_bytes for request in requests], [item.status for item in result.done.items]
        self._add(
            Batch(
                answers=len(requests),
                failures=sum(status != 200 if copies else status in FAILURES for status in statuses),
                busy_s=result.done.busy_s,
                expected_s=self._expected_s(costs),
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
        busy_s, expected_s = learnt.busy_s(learnt.batch_units(costs)), self._expected_s(costs)
        if SLOWER * expected_s < request.deadline_at - now < busy_s:
            self._add(Batch(answers=1, failures=0, busy_s=busy_s, expected_s=expected_s, turned_away=True))

    def lost(self, answers: int) -> None:
        """The worker died with a batch of so many; or idle, or while it was to come back, which counts as one."""
        self._add(Batch(answers=answers, failures=answers, busy_s=None, expected_s=0.0))

    def _expected_s(self, costs_bytes: Sequence[int]) -> float:
        services = self._expected or (self._learning.service,)
        return max(service.busy_s(service.batch_units(costs_bytes)) for service in services)

    def _add(self, batch: Batch) -> None:
        self._batches.append(batch)
        if self._on_bad is not None and (batch.failures or batch.slow):
            self._on_bad()
