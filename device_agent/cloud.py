"""The cloud: any Open Inference Protocol v2 servers over HTTP(S). Nothing here decides; the router does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from aios_edge.errors import AiosEdgeError
from device_agent.answer import Answer
from device_agent.cloud_endpoint import Endpoint
from device_agent.cloud_fit import ModelShape
from device_agent.cloud_health import Emit
from device_agent.router import There
from device_agent.settings import CloudEndpoint, Policy
from device_agent.values import Cloud, InferenceRequest

log = logging.getLogger("device_agent.cloud")


class CloudPool:
    """All endpoints. With none, every method says so."""

    def __init__(
        self,
        endpoints: tuple[CloudEndpoint, ...],
        policy: Policy,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoints: Mapping[str, Endpoint] = {
            settings.name: Endpoint(settings, policy, emit, clock) for settings in endpoints
        }

    def add(self, shape: ModelShape) -> None:
        """Make a model known to every endpoint."""
        for endpoint in self.endpoints.values():
            endpoint.add(shape)

    def start(self) -> None:
        """Start the background checks."""
        for endpoint in self.endpoints.values():
            endpoint.watch.start()

    async def stop(self) -> None:
        """Stop them and close connections."""
        for endpoint in self.endpoints.values():
            await endpoint.stop()

    def best(self, model: str, now: float, *, natural: bool) -> There | None:
        """The endpoint that is predicted to answer soonest, of those that may be used now."""
        offers = [
            offer for endpoint in self.endpoints.values() if (offer := endpoint.offer(model, now, natural=natural))
        ]
        return min(offers, key=lambda offer: offer.safe_s, default=None)

    async def infer(self, decision: Cloud, request: InferenceRequest, model: str) -> Answer | None:
        """Send a request to the endpoint the router chose; None when it failed."""
        try:
            return await self.endpoints[decision.endpoint].infer(decision, request, model)
        except AiosEdgeError as error:
            log.warning("cloud %s: %s", decision.endpoint, error)
            return None
