"""Which cloud endpoint takes a request: pure, the chance is passed in.

Among those that are predicted to be in time, margin included, chance decides by weight, so that each is asked often
enough to be known. Weight 0 is a spare: it is asked when no other one is in time. When none is surely in time there is
no room for anything but the soonest.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from device_agent.router import There


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks of an endpoint. ``without``: endpoints that failed it."""

    natural: bool = False
    request_bytes: int = 0
    deadline_at: float | None = None
    without: tuple[str, ...] = ()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that may be asked."""

    there: There
    weight: float


def choose(candidates: Sequence[Candidate], now: float, deadline_at: float | None, draw: float) -> There | None:
    """One of them, None of none; ``draw`` in [0, 1). Without a deadline all are in time."""
    in_time = [one for one in candidates if deadline_at is None or now + one.there.safe_s <= deadline_at]
    weighed = [one for one in in_time if one.weight > 0]
    if not weighed:
        return soonest(in_time or candidates)
    at = draw * sum(one.weight for one in weighed)
    for one in weighed:
        at -= one.weight
        if at < 0:
            return one.there
    return weighed[-1].there  # the sum was rounded up


def soonest(candidates: Sequence[Candidate]) -> There | None:
    """The one that is predicted to answer first, margin included."""
    return min((one.there for one in candidates), key=lambda there: there.safe_s, default=None)
