"""Which candidates a profile gets: those that it prefers and those that the recipe asks for, in the types that its CPU
multiplies well. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

from aios_edge.errors import ProfileError
from aios_edge.manifest import CANDIDATES, VARIANTS, Precision
from aios_edge.profile import DeviceProfile
from exporters.recipe import SearchSection

#: Not built by us: it starts from torch and needs a package that may not be there (:mod:`exporters.inc`).
STATIC: Precision = "static-s8"
TUNED = "tuned-s8"  # the same, its configuration chosen on validation rows
_NAMES: dict[str, str] = {STATIC: "inc-static-s8", TUNED: "inc-tuned-s8"}  # named after who makes them
#: Bits of a table's rows that training didn't look up, the most first.
_RARE_ROW_BITS = {"dynamic-s8-e4": 4, "dynamic-s8-e2": 2}
#: u8 activations x s8 weights, by operators that onnxruntime's CPU provider alone has.
_U8_S8 = ("dynamic-s8", "qdq-u8s8", STATIC)
_MIXED = "qdq-u8s8-mixed"
_FIXED_RANGES = ("qdq-u8s8", "qdq-s8-sym")
_NO_WISHES = SearchSection()
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Plan:
    """A candidate to build. ``name`` tells variants of one precision apart: ``dynamic-s8-r7`` has 7-bit weights
    (``reduce_range``), ``dynamic-s8-e4`` and ``-e2`` fewer bits for the embeddings of words that training didn't see
    (``rare_row_bits``), ``qdq-u8s8-mixed`` the most harmful products in float (``mixed``), ``inc-tuned-s8`` a
    configuration that was looked for (``tuned``)."""

    name: str
    precision: Precision
    reduce_range: bool = False
    rare_row_bits: int = 8
    mixed: bool = False
    tuned: bool = False

    @property
    def counts_rows(self) -> bool:
        """Whether it matters which words occur in training."""
        return self.rare_row_bits < 8

    @property
    def fixes_ranges(self) -> bool:
        """Whether calibration decides for good how far activations reach."""
        return self.precision in _FIXED_RANGES


def plans_for(profile: DeviceProfile, search: SearchSection = _NO_WISHES) -> tuple[Plan, ...]:
    """The candidates of a profile in its order of preference, then those that ``search`` asks for and its first
    provider can run; raises :class:`ProfileError` for an unknown one."""
    preferred = profile.precision_preference
    for wanted in preferred:
        if wanted not in CANDIDATES:
            where, remedy = f"profile {profile.name}", f"Known are: {', '.join(CANDIDATES)}"
            raise ProfileError(f"unknown precision '{wanted}'", where=where, remedy=remedy)
    more = (*search.candidates, *((STATIC, TUNED) if search.neural_compressor else ()))
    asked = [wanted for wanted in more if _runs(wanted, profile)]
    return tuple(_plan(wanted, profile) for wanted in dict.fromkeys((*preferred, *asked)))


def not_for(profile: DeviceProfile, search: SearchSection) -> tuple[str, ...]:
    """What the recipe asks for and the profile's first provider can't run."""
    return tuple(wanted for wanted in search.candidates if not _runs(wanted, profile))


def of_pruned(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """What is built of a pruned network: each precision of these plans, in their order, and of each the largest first.
    Who prunes wants it small: rare rows take 4 bits, or 2, no product stays in float, and fp32 is only for who has
    nothing else."""
    first = {plan.precision: plan for plan in reversed(plans) if plan.precision != STATIC}
    kept = list(dict.fromkeys(first[plan.precision] for plan in plans if plan.precision in first))
    small = [plan for plan in kept if plan.precision != "fp32"] or kept
    return tuple(smaller for plan in small for smaller in _smaller(plan))


def by_precision(plans: Sequence[Plan]) -> tuple[tuple[Plan, ...], ...]:
    """Plans of one precision together, as :func:`of_pruned` lists them."""
    return tuple(tuple(group) for _, group in groupby(plans, key=lambda plan: plan.precision))


def _smaller(plan: Plan) -> tuple[Plan, ...]:
    suffix = "-r7" if plan.reduce_range else ""
    if plan.mixed:
        return (replace(plan, name=plan.precision + suffix, mixed=False),)
    if plan.precision != "dynamic-s8":
        return (plan,)
    found = {bits: name for name, bits in _RARE_ROW_BITS.items() if bits <= plan.rare_row_bits}
    return tuple(replace(plan, name=name + suffix, rare_row_bits=bits) for bits, name in found.items())


def _plan(wanted: str, profile: DeviceProfile) -> Plan:
    precision = _precision(wanted)
    narrow = precision in _U8_S8 and profile.weights_in_7_bits
    name = _NAMES.get(wanted, wanted)
    return Plan(
        name=f"{name}-r7" if narrow else name,
        precision=precision,
        reduce_range=narrow,
        rare_row_bits=_RARE_ROW_BITS.get(wanted, 8),
        mixed=wanted == _MIXED,
        tuned=wanted == TUNED,
    )


def _runs(wanted: str, profile: DeviceProfile) -> bool:
    return _precision(wanted) not in _U8_S8 or on_cpu(profile)


def _precision(wanted: str) -> Precision:
    return VARIANTS.get(wanted, cast(Precision, wanted))


def on_cpu(profile: DeviceProfile) -> bool:
    """Whether the model runs on the CPU, as far as the profile has its way."""
    return bool(profile.providers) and profile.providers[0].name == _CPU
