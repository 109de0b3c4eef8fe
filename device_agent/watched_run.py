"""Batches with a watchdog: whatever goes wrong with one ends the worker, and the caller hears :class:`WorkerLost`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from aios_edge.errors import WorkerLost
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerHandle

OVERRUN = 20.0  # so many times its prediction is no slow batch any more


class Watchdog:
    """Looks after one worker's batches, which it runs one after the other; a worker that takes too long, or answers
    nonsense, is killed.

    One timer looks after all of them, and looks again when the batch it finds has time left: nearly all end long
    before, and a timer for each would be a part of what a request costs. A worker in a thread can't be killed: it loses
    its connection, and its thread is left to its endless loop.
    """

    def __init__(self) -> None:
        self._limits: deque[tuple[float, WorkerHandle]] = deque()  # of the batch that runs, and of those behind it
        self._ends_by = 0.0  # of the one that runs
        self._overran = False
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = 0.0

    def run(
        self,
        worker: WorkerHandle,
        requests: Sequence[InferenceRequest],
        on_end: Callable[[BatchResult | WorkerLost], None],
        *,
        timeout_s: float,
        predicted_s: float = 0.0,
    ) -> None:
        """Give the worker a batch; ``on_end`` is called later and once. It may take ``timeout_s``; where it was
        predicted to take long (a slow device, a huge request), ``OVERRUN`` times that."""
        loop = asyncio.get_running_loop()
        within_s = max(timeout_s, OVERRUN * predicted_s)
        self._limits.append((within_s, worker))
        if len(self._limits) == 1:
            self._overran = False
            self._time_runs()

        def ended(end: BatchResult | WorkerLost) -> None:
            self._limits.popleft()
            if self._limits:
                self._time_runs()
            on_end(self._checked(end, worker, requests, within_s))

        try:
            worker.begin(requests, ended)
        except Exception as error:  # no worker, no memory left here
            loop.call_soon(ended, error if isinstance(error, WorkerLost) else _failed(error, worker, requests))

    def _time_runs(self) -> None:
        loop = asyncio.get_running_loop()
        self._ends_by = loop.time() + self._limits[0][0]
        if self._timer is None or self._looks_at > self._ends_by:
            self.close()
            self._look_at_end(loop)

    def _look_at_end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looks_at, self._timer = self._ends_by, loop.call_at(self._ends_by, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        if not self._limits:
            return
        if loop.time() < self._ends_by:
            self._look_at_end(loop)
            return
        self._overran = True
        self._limits[0][1].kill()

    def _checked(
        self, end: BatchResult | WorkerLost, worker: WorkerHandle, requests: Sequence[InferenceRequest], within_s: float
    ) -> BatchResult | WorkerLost:
        if isinstance(end, WorkerLost):
            worker.kill()  # lost to us: it must not take another batch, even if it still lives
            if not self._overran:
                return end
            what = f"did not end a batch within {within_s:.3g} s and was killed"
            return WorkerLost(what, where=_where(requests))
        try:
            for item in end.done.items:
                if not 200 <= item.status <= 599:
                    return _failed(ValueError(f"a status of {item.status}"), worker, requests)
                item.outputs.of(end.payload)
                if item.binary.length:
                    item.binary.of(end.payload)
        except Exception as error:
            return _failed(error, worker, requests)
        return end


async def run_watched(worker: WorkerHandle, requests: Sequence[InferenceRequest], timeout_s: float) -> BatchResult:
    """One batch, awaited; raises :class:`WorkerLost`."""
    answered: asyncio.Future[BatchResult | WorkerLost] = asyncio.get_running_loop().create_future()
    watchdog = Watchdog()

    def ended(end: BatchResult | WorkerLost) -> None:
        if not answered.done():
            answered.set_result(end)

    watchdog.run(worker, requests, ended, timeout_s=timeout_s)
    try:
        end = await answered
    finally:
        watchdog.close()
    if isinstance(end, WorkerLost):
        raise end
    return end


def _failed(error: Exception, worker: WorkerHandle, requests: Sequence[InferenceRequest]) -> WorkerLost:
    worker.kill()
    return WorkerLost(f"failed a batch ({type(error).__name__}: {error}) and was killed", where=_where(requests))


def _where(requests: Sequence[InferenceRequest]) -> str:
    return f"worker of {requests[0].model}"
