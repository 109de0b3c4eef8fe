"""A request while a model host has it: what changes as it waits, runs, and is judged again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from device_agent.answer import Answer
from device_agent.scheduler import Pending
from device_agent.trace import Opinion
from device_agent.values import Cloud, InferenceRequest, Reason, Shed


@dataclass(eq=False)
class Ticket:
    """A request in the host's hands. ``verdict`` is resolved with its answer, or with a decision that replaces the
    one it waits under."""

    request: InferenceRequest
    pending: Pending
    reason: Reason
    verdict: asyncio.Future[Answer | Cloud | Shed]
    no_cloud: bool = False
    taken_at: float = 0.0
    opinion: Opinion | None = None  # what was known when it was answered here
    unsure: Cloud | None = None  # who was asked again then

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
