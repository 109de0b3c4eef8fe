"""How tenants share a model: by weight, room in its queue, turns, and the time of its worker. Pure.

*Turns*, of requests without a deadline within a priority: start-time fair queueing. Each tenant has a line of its own
in virtual time, in which a request takes its estimated service time divided by the tenant's weight; who begins first
goes first, and nobody begins before what is being served. While two have something waiting they get time as their
weights are, and one that comes back after a pause goes before what another has piled up.

*Room*: of a queue's places, and of the memory for bodies, half of each tenant's share is its own, used or not; the rest
is for who comes first.

*Time*, of requests with a deadline: they run by deadline, so shares are kept when they are let in. Whoever asks for
more than its share lately is let in only where what the others ask for, up to their shares, would still fit before its
deadline; time that they don't ask for is anybody's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

OWN_PART = 0.5  # of a tenant's share of the places, kept for it
MEMORY_S = 5.0  # what was asked for fades by e in this time
PATIENT = ""  # stands for all requests without a deadline where time is shared
PATIENT_SHARE = 0.25  # of the worker's time, while both kinds wait: one of four in a queue
_NOTHING = 1e-4  # of the worker's time: nobody who asks for so little needs a place kept
_SIGMAS = 4.0  # that others ask for more than they did lately, by chance


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Each tenant's part of a whole."""
    total = sum(weights.values())
    return {tenant: weight / total for tenant, weight in weights.items()}


def has_room(tenant: str, held: Mapping[str, int], parts: Mapping[str, float], places: int, wanted: int = 1) -> bool:
    """Whether that tenant may take so many more of so many places (or bytes), of which each has ``held`` some."""
    own = {name: math.floor(part * OWN_PART * places) for name, part in parts.items()}
    mine = held.get(tenant, 0) + wanted
    if mine <= own.get(tenant, 0):
        return True
    others = sum(max(held.get(name, 0), own.get(name, 0)) for name in {*held, *own} if name != tenant)
    return others + mine <= places


class Turns(msgspec.Struct, frozen=True, kw_only=True):
    """Start-time fair queueing: where virtual time is, and where each tenant's line ends."""

    now: float = 0.0
    ends: dict[str, float] = {}

    def join(self, tenant: str, cost: float) -> tuple[Turns, float]:
        """Someone joins a line with a cost (service time / weight); its turn: who has the lowest goes first."""
        begin = max(self.now, self.ends.get(tenant, 0.0))
        return msgspec.structs.replace(self, ends={**self.ends, tenant: begin + cost}), begin

    def served(self, turn: float) -> Turns:
        """The one with that turn is being served. Lines that end before it are no longer remembered."""
        now = max(self.now, turn)
        return Turns(now=now, ends={tenant: end for tenant, end in self.ends.items() if end > now})


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asked for lately, let in or not, as a part of the worker's time: ``part`` at ``at``."""

    part: float = 0.0
    at: float = 0.0

    def asks(self, cost_s: float, now: float) -> Demand:
        """A request came that would take so long."""
        return Demand(part=self.now(now) + cost_s / MEMORY_S, at=max(now, self.at))

    def now(self, now: float) -> float:
        """What is left of it."""
        return self.part * math.exp(-max(now - self.at, 0.0) / MEMORY_S)


def reserve(
    tenant: str,
    demands: Mapping[str, Demand],
    parts: Mapping[str, float],
    waiting_s: Mapping[str, float],
    *,
    cost_s: float,
    now: float,
) -> Reserve:
    """What one of that tenant with a deadline leaves to others; ``waiting_s`` of theirs waits already, and whoever
    reckons with a queue has counted it. ``cost_s``: what one of theirs takes alone, more or less."""
    asked = {name: demand.now(now) for name, demand in demands.items()}
    limits = {PATIENT: PATIENT_SHARE}
    if asked.get(tenant, 0.0) > parts.get(tenant, 1.0):
        limits |= {name: part for name, part in parts.items() if name != tenant}
    claims = tuple(
        Claim(rate=rate, limit=limit, waiting_s=waiting_s.get(who, 0.0))
        for who, limit in limits.items()
        if (rate := asked.get(who, 0.0)) > _NOTHING
    )
    return Reserve(claims=claims, cost_s=cost_s) if claims else NO_RESERVE


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asks for of the worker's time, what part of it is his at most, and what of his waits already."""

    rate: float
    limit: float
    waiting_s: float


class Reserve(msgspec.Struct, frozen=True, kw_only=True):
    """Time that is to be left for others."""

    claims: tuple[Claim, ...] = ()
    cost_s: float = 0.0

    def of(self, within_s: float) -> float:
        """How much of the next ``within_s``: what they'll ask for if they go on so and chance isn't too unkind."""
        reserved_s = 0.0
        for claim in self.claims:
            mean_s = claim.rate * within_s
            likely_s = mean_s + _SIGMAS * math.sqrt(mean_s * self.cost_s)
            reserved_s += max(min(likely_s, claim.limit * within_s) - claim.waiting_s, 0.0)
        return reserved_s


NO_RESERVE = Reserve()
