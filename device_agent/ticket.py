"""A request while a model host has it: what changes as it waits, runs, and is judged again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from device_agent.answer import Answer
from device_agent.cloud_choice import Wanted
from device_agent.device_state import DeviceState
from device_agent.router import Question
from device_agent.scheduler import Pending
from device_agent.trace import Opinion
from device_agent.values import Cloud, Decision, InferenceRequest, Reason, Shed
from device_agent.worker_pool import WorkerHandle

CLOUD_TRIES = 2


@dataclass(frozen=True)
class Arrival:
    """What a request was decided by when it came, and how the device was; kept for a trace."""

    question: Question
    decision: Decision
    device: DeviceState
    sampled_at: float | None


Verdict = Answer | Cloud | Shed


class Ticket(msgspec.Struct, eq=False):
    """A request in the host's hands.

    ``on_verdict`` is called with what becomes of it here: its answer, or a decision that replaces the one it waits
    under; whoever took the request in follows that. ``waits``: it is in the queue or with the worker.
    """

    request: InferenceRequest
    pending: Pending
    on_verdict: Callable[[Ticket, Verdict], None]
    on_answer: Callable[[Answer], None]
    reason: Reason = Reason.IDLE
    waits: bool = False
    held_by: Running | None = None  # the batch that it waits in; an older one may still have it
    promised: bool = False  # it was let in because it was safe to be in time
    answered: bool = False  # or its client has gone
    asking: asyncio.Task[None] | None = None  # the cloud
    failed_at: tuple[str, ...] = ()  # cloud endpoints that were asked and gave no answer
    taken_at: float = 0.0
    arrival: Arrival | None = None  # what is traced of it
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

    def resolve(self, verdict: Verdict) -> None:
        """Tell whoever waits; of one that has gone nobody does."""
        if self.waits:
            self.waits, self.held_by = False, None
            self.on_verdict(self, verdict)


class Running(msgspec.Struct, eq=False):
    """The batch that a worker has, since when, how long it was predicted to take, and whose it is."""

    tickets: list[Ticket] = []
    since: float = 0.0
    expected_s: float = 0.0
    worker: WorkerHandle | None = None
