"""What the router decided by, request by request: the lines of a trace. Values only.

A line is a JSON object with ``type`` ``begin`` (an agent started to write), ``policy`` (what a digest in the lines
behind it stands for) or ``request``. No line has anything of a request's content. Every time is of the device's
monotonic clock, in seconds; absent keys have their default.
"""

from __future__ import annotations

import msgspec

from aios_edge.telemetry import Scalar
from device_agent.device_state import DeviceState
from device_agent.router import Question, There
from device_agent.scheduler import Forecast
from device_agent.values import Cloud, Decision, Local, Reason

TRACE_VERSION = 1


class Began(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """The head of what one start of the agent wrote."""

    version: int = TRACE_VERSION
    ts: str
    agent_version: str


class InForce(msgspec.Struct, frozen=True, kw_only=True, tag="policy"):
    """A policy, before the first request that names its ``digest``. ``since``: wall time (RFC 3339)."""

    digest: str
    since: str
    values: dict[str, Scalar]


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """A route (``local``, ``cloud``, ``shed``) and its reason code."""

    route: str
    reason: str


class Opinion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was known when this device had answered, at ``at``: how sure it was, and who could be asked again."""

    at: float
    confidence: float
    there: There | None = None


class Traced(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="request"):
    """One request that was answered or refused.

    ``at`` is when it came to the router, ``queued`` how many waited then, ``crowded`` whether that was too many for it;
    ``forecast``, ``there``, ``dear`` (its budget was spent) and ``device`` (as sampled at ``sampled_at``) what the
    router saw; ``policy`` is the digest of the one in force then. ``decided`` is what it said then, or when this device
    had answered and wasn't sure. ``outcome``,
    ``status`` and ``latency_s``, from ``at``, are what became of it.
    """

    model: str
    at: float
    deadline_at: float | None = None
    local_only: bool = False
    queued: int = 0
    crowded: bool = False
    worker_ready: bool = True
    away: Reason = Reason.WORKER_LOST
    forecast: Forecast | None = None
    there: There | None = None
    dear: There | None = None
    device: DeviceState | None = None
    sampled_at: float | None = None
    policy: str | None = None
    opinion: Opinion | None = None
    decided: Decided
    outcome: Decided
    status: int
    latency_s: float


Line = Began | InForce | Traced


def decided(decision: Decision) -> Decided:
    """A decision as a trace has it."""
    route = "local" if isinstance(decision, Local) else "cloud" if isinstance(decision, Cloud) else "shed"
    return Decided(route=route, reason=decision.reason.value)


def traced(
    model: str,
    question: Question,
    decision: Decision,
    *,
    device: DeviceState,
    sampled_at: float | None,
    opinion: Opinion | None,
    outcome: Decided,
    status: int,
    now: float,
) -> Traced:
    """The line of one request that ended ``now``."""
    here = question.here
    return Traced(
        model=model,
        at=question.now,
        deadline_at=question.deadline_at,
        local_only=question.local_only,
        queued=question.queued,
        crowded=question.crowded,
        worker_ready=here.worker_ready,
        away=here.away,
        forecast=here.forecast,
        there=question.there,
        dear=question.dear,
        device=None if sampled_at is None else device,
        sampled_at=sampled_at,
        policy=question.policy,
        opinion=opinion,
        decided=decided(decision),
        outcome=outcome,
        status=status,
        latency_s=round(now - question.now, 6),
    )
