"""Which models stay in memory when they don't all fit: pure. The least recently used goes first, a pinned one never."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A model that has a worker, or is about to: what that takes, what of it those workers do that it could do without,
    and when it was last of use (infinity: it is now). ``stays``: it is pinned, or is being loaded."""

    model: str
    held_bytes: int
    spare_bytes: int = 0
    used_at: float
    stays: bool = False


def to_thin_out(residents: Sequence[Resident], budget_bytes: int) -> str | None:
    """Which model gives up one of the workers that it can do without, before any model has to go; None: the budget is
    kept, or nobody has one to spare. A model that stays keeps all of its own."""
    if sum(each.held_bytes for each in residents) <= budget_bytes:
        return None
    able = [each for each in residents if each.spare_bytes and not each.stays]
    return min(able, key=lambda each: each.used_at).model if able else None


def to_unload(residents: Sequence[Resident], budget_bytes: int, *, asking: str | None = None) -> tuple[str, ...]:
    """Who makes room, in that order, until the rest is within the budget.

    The model that asks stays, and if none does the one that was used last: a model alone above the budget would come
    and go with every request. So it may be that the budget is not kept though all that may go has gone.
    """
    movable = sorted((each for each in residents if not each.stays), key=lambda each: each.used_at)
    if asking is None and movable:
        asking = movable[-1].model
    over = sum(each.held_bytes for each in residents) - budget_bytes
    leaving = []
    for each in movable:
        if over <= 0:
            break
        if each.model != asking:
            leaving.append(each.model)
            over -= each.held_bytes
    return tuple(leaving)
