"""Device profiles: what a class of device can do and what a model on it may cost.

One TOML file each under ``profiles/``; ``profiles/README.md`` explains every field. The values here are frozen;
reading, checking and matching a profile to this machine live in :mod:`aios_edge.profile_files` and
:mod:`aios_edge.profile_detect`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Isolation = Literal["process", "thread"]
Scalar = str | int | float | bool
#: x86 with any of these adds four u8 x s8 products in 32 bits; without, two in 16, which saturate (vpmaddubsw).
_WIDE_SUMS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
_ADDS_WIDE = ("aarch64", "armv7l")  # with or without dot products: NEON widens before it adds


class Provider(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX Runtime execution provider of the chain, in order of preference, with its options."""

    name: str
    options: dict[str, Scalar] = {}


class Threads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a worker uses the CPU. ``spinning`` trades CPU time for latency and is off on anything shared.
    ``workers``: how many a model has; auto: as many as there are cores for. ``cpu_affinity``: the CPUs all threads of a
    model keep to, of several workers each to its part; empty: any."""

    intra_op: int = 1
    inter_op: int = 1
    spinning: bool = False
    workers: int | Literal["auto"] = 1
    cpu_affinity: tuple[int, ...] = ()


class PowerEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients of the linear CPU-time power model, in watts for the whole device; ``source`` says whose."""

    idle_w: float
    busy_w: float  # all cores busy
    source: str


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Power sources to try in order (``rapl``, ``ina3221``, ``ina238``, ``pmic``, ``estimate``)."""

    sources: tuple[str, ...] = ()
    estimate: PowerEstimate | None = None


class Budgets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle for this profile may cost. ``None`` means no promise is made, never zero.

    Latency is the p95 of one request at ``latency_batch`` x ``latency_length`` (tokens for text) on
    ``threads.intra_op`` threads. Memory is the worker's resident set with the model loaded.
    """

    latency_p95_s: float | None = None
    latency_batch: int = 1
    latency_length: int = 32
    memory_bytes: int | None = None
    bundle_size_bytes: int | None = None
    power_w: float | None = None
    max_drop: float = 0.01


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``detect`` looks for beyond architecture and CPU flags.

    ``device_tree``: any of these appears in /proc/device-tree/compatible. ``max_memory_bytes``: the machine has
    at most that much. ``without_cpu_flags``: a CPU with any of these is of another class; it runs the same model at
    another speed, so its figures would not be this class's. ``rank`` breaks ties: the more specific profile has the
    higher one; negative: never proposed by itself (the cloud profiles).
    """

    device_tree: tuple[str, ...] = ()
    max_memory_bytes: int | None = None
    without_cpu_flags: tuple[str, ...] = ()
    gpu: bool = False
    rank: int = 0


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of devices. ``precision_preference`` ranks the candidates that are built for it, best first.

    ``quantization`` is the scheme the hardware runs fast: ``dynamic-s8`` (u8 activations x s8 weights),
    ``symmetric-s8`` (TensorRT: every zero point 0), ``none``. ``cpu_flags`` must all be present on a host that matches.
    ``reduce_range``: whether weights keep to 7 bits; None leaves it to them (:attr:`weights_in_7_bits`).
    """

    schema: str
    name: str
    title: str
    arch: str
    providers: tuple[Provider, ...]
    precision_preference: tuple[str, ...]
    quantization: Literal["dynamic-s8", "symmetric-s8", "none"]
    reduce_range: bool | None = None
    cpu_flags: tuple[str, ...] = ()
    isolation: Isolation = "process"
    strict_providers: bool = False
    threads: Threads = Threads()
    power: Power = Power()
    budgets: Budgets = Budgets()
    match: Match = Match()

    @property
    def weights_in_7_bits(self) -> bool:
        """Whether 8-bit weights could overflow on the class's CPUs: unless the profile says it, on all that aren't ARM
        and whose flags don't promise sums of 32 bits."""
        if self.reduce_range is not None:
            return self.reduce_range
        promised = any(set(flags.split("|")) <= _WIDE_SUMS for flags in self.cpu_flags)
        return self.arch not in _ADDS_WIDE and not promised
