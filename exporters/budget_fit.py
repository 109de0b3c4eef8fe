"""Whether a smaller network may keep a profile's budgets, told by arithmetic from the whole one's figures. Pure.

It decides where a search begins, never what is chosen: that is judged by what was measured. A power budget says nothing
here: a device that is kept busy draws the same with every network; a narrower one is done sooner, which saves energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_edge.profile import Budgets
from exporters.bundle import DOCUMENTS_BYTES
from exporters.plans import Plan
from exporters.structure import Shape, Structure


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is known of a candidate of the whole network: the size of its model files, p95 latency at the profile's
    conditions and resident bytes of its process, None where nothing tells of the profile's devices."""

    size_bytes: int
    p95_s: float | None
    rss_bytes: int | None


def with_room(rung: Structure, plans: Sequence[Plan], shape: Shape, budgets: Budgets) -> tuple[Plan, ...]:
    """The plans by which a smaller network may keep the budget for its size."""
    most = budgets.bundle_size_bytes

    def shipped(plan: Plan) -> int:
        return shape.shipped_bytes(rung, plan.precision, plan.rare_row_bits) + DOCUMENTS_BYTES

    return tuple(plan for plan in plans if most is None or shipped(plan) <= most)


def is_fast(rung: Structure, shape: Shape, budgets: Budgets, whole: Whole) -> bool:
    """Whether it may keep the budget of time: what is multiplied goes with it."""
    most = budgets.latency_p95_s
    if whole.p95_s is None or most is None:
        return True
    return whole.p95_s * shape.products(rung) / shape.products(shape.whole) <= most


def is_light(rung: Structure, plan: Plan, shape: Shape, budgets: Budgets, whole: Whole) -> bool:
    """Whether it may keep the budget of memory: a process takes the same beside its model."""
    most = budgets.memory_bytes
    if whole.rss_bytes is None or most is None:
        return True
    saved = whole.size_bytes - shape.size_bytes(rung, plan.precision, plan.rare_row_bits)
    return whole.rss_bytes - saved <= most
