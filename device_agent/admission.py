"""The first decision about a request, before any queue: pure.

Only what no route could mend is refused here: the agent is stopping, the deadline has passed, memory for bodies is
spent. Everything else is the router's.
"""

from __future__ import annotations

import msgspec

from device_agent.router import LEAST_RETRY_S
from device_agent.values import InferenceRequest, Reason, Shed


class Admit(msgspec.Struct, frozen=True, tag=True):
    """The request may go on to the router."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What admission looks at, for the whole agent. ``crowded``: the tenant has no room for it among the others."""

    draining: bool
    in_flight_bytes: int
    in_flight_limit_bytes: int
    crowded: bool = False


def admit(request: InferenceRequest, now: float, load: Load) -> Admit | Shed:
    """Admit a request, or shed it with the reason and when to come back."""
    if load.draining:
        return Shed(Reason.DRAINING, 5.0)
    if request.deadline_at is not None and request.deadline_at <= now:
        return Shed(Reason.DEADLINE_PASSED, LEAST_RETRY_S)
    over = load.in_flight_bytes + len(request.body) > load.in_flight_limit_bytes
    if load.in_flight_bytes and (over or load.crowded):
        return Shed(Reason.QUEUE_FULL, 1.0)
    return Admit()
