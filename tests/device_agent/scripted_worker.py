"""What a scripted worker tells when it is asked to load a bundle, and how its batches are begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aios_edge.errors import WorkerLost
from device_agent.answer import Answer
from device_agent.model_host import ModelHost
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerHandle

REPORT = ActivationReport(
    bundle_id="b",
    model="tiny",
    version="1",
    providers_requested=(),
    providers_active=(),
    provider_reason=None,
    checks=(),
    latency_p95_s=0.01,
    rss_bytes=None,
    load_s=0.0,
)


class Batches:
    """Of a stand-in for the handle of a worker: what :meth:`run` says of a batch is what becomes of it."""

    ready: bool

    @property
    def takes(self) -> bool:
        return self.ready

    async def run(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        raise NotImplementedError

    def begin(self, requests: Sequence[InferenceRequest], on_end: Callable[[BatchResult | WorkerLost], None]) -> None:
        async def run() -> None:
            try:
                end: BatchResult | WorkerLost = await self.run(requests)
            except WorkerLost as lost:
                end = lost
            on_end(end)

        self.batch = asyncio.create_task(run())


async def run(worker: WorkerHandle, requests: Sequence[InferenceRequest]) -> BatchResult:
    """A batch, awaited; raises what its worker was lost by."""
    ended: asyncio.Future[BatchResult | WorkerLost] = asyncio.get_running_loop().create_future()
    worker.begin(requests, ended.set_result)
    end = await ended
    if isinstance(end, WorkerLost):
        raise end
    return end


async def infer(host: ModelHost, request: InferenceRequest) -> Answer:
    """A request, awaited; cancelling it is going away."""
    answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    ticket = host.submit(request, lambda answer: None if answered.done() else answered.set_result(answer))
    try:
        return await answered
    finally:
        host.leave(ticket)
