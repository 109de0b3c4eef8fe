"""The cloud: any Open Inference Protocol v2 servers over HTTP(S). Nothing here decides; the router does."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from aios_edge.errors import AiosEdgeError
from device_agent.answer import Answer
from device_agent.budget_book import BudgetBook
from device_agent.cloud_account import limits_of
from device_agent.cloud_choice import Candidate, Wanted, choose, soonest
from device_agent.cloud_endpoint import Endpoint
from device_agent.cloud_fit import ModelShape
from device_agent.cloud_health import Emit
from device_agent.cloud_settings import CloudEndpoint
from device_agent.router import There
from device_agent.settings import Policy
from device_agent.values import Cloud, InferenceRequest, Reason

log = logging.getLogger("device_agent.cloud")


class CloudPool:
    """All endpoints. With none, every method says so."""

    def __init__(
        self,
        endpoints: tuple[CloudEndpoint, ...],
        policy: Policy,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._draw = draw
        self._book = BudgetBook({settings.name: limits_of(settings) for settings in endpoints}, clock)
        self.endpoints: Mapping[str, Endpoint] = {
            settings.name: Endpoint(settings, policy, self._book, emit, clock) for settings in endpoints
        }

    def add(self, shape: ModelShape) -> None:
        """Make a model known to every endpoint."""
        for endpoint in self.endpoints.values():
            endpoint.add(shape)

    def start(self, state_dir: Path | None = None) -> None:
        """Start the background checks, with what was spent according to the folder."""
        if state_dir is not None:
            self._book.open(state_dir)
        for endpoint in self.endpoints.values():
            endpoint.watch.start()

    async def stop(self) -> None:
        """Stop them, close connections, and write down what was spent."""
        for endpoint in self.endpoints.values():
            await endpoint.stop()
        await self._book.close()

    def choose(self, model: str, wanted: Wanted, now: float) -> There | None:
        """The endpoint that may take a request."""
        return choose(self._candidates(model, wanted, now, affordable=True), now, wanted.deadline_at, self._draw())

    def soonest(self, model: str, wanted: Wanted, now: float) -> There | None:
        """The one of them that is predicted to answer first."""
        return soonest(self._candidates(model, wanted, now, affordable=True))

    def unaffordable(self, model: str, wanted: Wanted, now: float) -> There | None:
        """The soonest of those that only their budgets keep from being asked."""
        return soonest(self._candidates(model, wanted, now, affordable=False))

    def _candidates(self, model: str, wanted: Wanted, now: float, *, affordable: bool) -> list[Candidate]:
        return [
            Candidate(there=offer, weight=endpoint.weight)
            for name, endpoint in self.endpoints.items()
            if name not in wanted.without
            and endpoint.account.affords(wanted.request_bytes) is affordable
            and (offer := endpoint.offer(model, now, natural=wanted.natural))
        ]

    async def infer(self, decision: Cloud, request: InferenceRequest, model: str) -> Answer | Reason:
        """Send a request to the endpoint the router chose. The answer, or why there is none: ``cloud_failed``,
        ``budget``."""
        try:
            return await self.endpoints[decision.endpoint].infer(decision, request, model)
        except AiosEdgeError as error:
            log.warning("cloud %s: %s", decision.endpoint, error)
            return Reason.CLOUD_FAILED
