"""The contract of a bundle: promises, each with the conditions under which it holds and when it is checked."""

from __future__ import annotations

from typing import Literal

import msgspec

CONTRACT_SCHEMA = "1.1"  # 1.1: measured

#: Names of promises; a contract may carry others, which are shown and not checked.
ACCURACY = "accuracy"
ACCURACY_DROP = "accuracy_drop"
AGREEMENT = "agreement"
LATENCY_P95 = "latency_p95_s"
MEMORY = "memory_bytes"
SIZE = "size_bytes"
BUNDLE_SIZE = "bundle_size_bytes"

Op = Literal["<=", ">="]


class Conditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Under which circumstances a value holds; what isn't stated isn't fixed."""

    batch: int | None = None
    length: int | None = None
    threads: int | None = None
    provider: str | None = None
    method: str | None = None
    host: str | None = None
    samples: int | None = None


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """``name op value unit``: measured by the exporter, or the budget of the profile.

    ``check``: ``activation`` before the bundle goes live on a device, ``live`` while it serves, ``export-only``
    where the device has no labelled data to check it with (golden samples stand for it there).
    """

    name: str
    op: Op
    value: float
    unit: str
    basis: Literal["measured", "budget"]
    check: Literal["activation", "live", "export-only"]
    conditions: Conditions = Conditions()

    def kept_by(self, measured: float) -> bool:
        """Whether a measured value keeps this promise."""
        return measured <= self.value if self.op == "<=" else measured >= self.value


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that was measured on the target, with the circumstances."""

    value: float
    unit: str
    conditions: Conditions


class GoldenSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How golden samples are judged on a device.

    ``tolerance`` maps an execution provider to the largest absolute difference allowed between an output of the
    device and the shipped model's recorded output; ``min_agreement`` is the least share of equal argmax.
    """

    count: int
    min_agreement: float
    tolerance: dict[str, float]
    file: str = "golden.npz"


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """contract.json. ``measured`` has the figures that were measured on the target, beside the budgets they keep;
    ``unmeasured`` says which were not, and why."""

    schema: str
    profile: str
    promises: tuple[Promise, ...]
    golden: GoldenSpec
    unmeasured: dict[str, str] = {}
    measured: dict[str, Observed] = {}

    def promise(self, name: str) -> Promise | None:
        """The promise of that name, or None."""
        return next((p for p in self.promises if p.name == name), None)
