"""The cloud: any Open Inference Protocol v2 servers over HTTP(S). Nothing here decides; the router does."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from aios_edge.errors import AiosEdgeError
from device_agent.answer import Answer, Unanswered
from device_agent.budget_book import BudgetBook
from device_agent.cloud_account import limits_of
from device_agent.cloud_choice import Candidate, Wanted, choose, soonest
from device_agent.cloud_endpoint import Endpoint
from device_agent.cloud_fit import ModelShape
from device_agent.cloud_health import Emit
from device_agent.cloud_settings import CloudEndpoint
from device_agent.hedge import HedgeAllowance, first_good
from device_agent.payload_audit import PayloadAudit
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
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._allowance = HedgeAllowance()
        self.audit = PayloadAudit()
        self._book = BudgetBook({settings.name: limits_of(settings) for settings in endpoints}, clock)
        self.endpoints: Mapping[str, Endpoint] = {
            settings.name: Endpoint(settings, policy, self._book, emit, clock, self.audit) for settings in endpoints
        }

    def add(self, shape: ModelShape, *, only_mapped: bool = False) -> None:
        """Make a model known to every endpoint; ``only_mapped``: to those whose model map names it."""
        for endpoint in self.endpoints.values():
            if not only_mapped or endpoint.maps(shape.name):
                endpoint.add(shape)

    def follow(self, policy: Policy, endpoints: tuple[CloudEndpoint, ...]) -> None:
        """Go on by other rules: the same endpoints, whose limits may be others."""
        self._policy = policy
        for settings in endpoints:
            self._book.resize(settings.name, limits_of(settings))
            self.endpoints[settings.name].follow(settings, policy)

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

    async def infer(
        self, decision: Cloud, request: InferenceRequest, model: str, *, tried: tuple[str, ...] = ()
    ) -> Answer | Unanswered:
        """Send a request to the endpoint the router chose, and to another one when that takes long and the policy wants
        it. ``tried``: endpoints that failed it before; then it isn't sent twice."""
        if not self.audit.may_leave(request):
            return Unanswered(reason=Reason.CLOUD_FAILED, endpoints=(decision.endpoint,))
        asked: list[str] = []

        async def ask(where: Cloud) -> Answer | Reason:
            asked.append(where.endpoint)
            try:
                return await self.endpoints[where.endpoint].infer(where, request, model)
            except AiosEdgeError as error:
                log.warning("cloud %s: %s", where.endpoint, error)
                return Reason.CLOUD_FAILED

        def second() -> Awaitable[Answer | Reason] | None:
            where = self._hedge(decision, request, model)
            return None if where is None else ask(where)

        self._allowance = self._allowance.earned()
        after_s = None if tried or not self._policy.hedge else self.endpoints[decision.endpoint].p95_s(model)
        if after_s is None:
            result = await ask(decision)
        else:
            result = await first_good(ask(decision), second, after_s, lambda result: isinstance(result, Answer))
        return result if isinstance(result, Answer) else Unanswered(reason=result, endpoints=tuple(asked))

    def _hedge(self, first: Cloud, request: InferenceRequest, model: str) -> Cloud | None:
        """Who else is asked, because the first endpoint takes longer than it nearly always does."""
        now = self._clock()
        wanted = Wanted(
            natural=request.natural,
            request_bytes=len(request.body),
            deadline_at=request.deadline_at,
            without=(first.endpoint,),
        )
        if not self._allowance.allows() or (there := self.choose(model, wanted, now)) is None:
            return None
        if request.deadline_at is not None and now + there.expected_s > request.deadline_at:
            return None
        self._allowance = self._allowance.used()
        return Cloud(Reason.HEDGED, there.endpoint)
