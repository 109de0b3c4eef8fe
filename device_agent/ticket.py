"""A request while a model host has it: what changes as it waits, runs, and is judged again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from device_agent.answer import Answer
from device_agent.cloud_choice import Wanted
from device_agent.scheduler import Pending
from device_agent.trace import Opinion
from device_agent.values import Cloud, InferenceRequest, Reason, Shed

CLOUD_TRIES = 2


@dataclass(eq=False)
class Ticket:
    """A request in the host's hands. ``verdict`` is resolved with its answer, or with a decision that replaces the
    one it waits under."""

    request: InferenceRequest
    pending: Pending
    reason: Reason
    verdict: asyncio.Future[Answer | Cloud | Shed]
    failed_at: tuple[str, ...] = ()  # cloud endpoints that were asked and gave no answer
    taken_at: float = 0.0
    opinion: Opinion | None = None  # what was known when it was answered here
    unsure: Cloud | None = None  # who was asked again then

    @property
    def no_cloud(self) -> bool:
        """Two endpoints are tried, no more: what failed there is then this request's, or everybody's, trouble."""
        return len(self.failed_at) >= CLOUD_TRIES

    @property
    def wanted(self) -> Wanted:
        """What it asks of a cloud endpoint."""
        request = self.request
        return Wanted(
            natural=request.natural,
            request_bytes=len(request.body),
            deadline_at=request.deadline_at,
            without=self.failed_at,
        )

    def resolve(self, verdict: Answer | Cloud | Shed) -> None:
        """Tell whoever waits; a cancelled one has nobody waiting."""
        if not self.verdict.done():
            self.verdict.set_result(verdict)


@dataclass
class Running:
    """The batch that the worker has, since when, and how long it was predicted to take."""

    tickets: list[Ticket] = field(default_factory=list)
    since: float = 0.0
    expected_s: float = 0.0
