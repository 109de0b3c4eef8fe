"""What a scripted worker tells when it is asked to load a bundle, and how its batches are begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aios_edge.errors import WorkerLost
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_pool import BatchResult

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
