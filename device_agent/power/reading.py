"""The values of power measurement, all frozen. ``None`` means not measured, and a reason stands beside it."""

from __future__ import annotations

from typing import Literal

import msgspec

Method = Literal["measured", "sum_of_rails", "estimated", "unknown"]


class Rail(msgspec.Struct, frozen=True, kw_only=True):
    """One supply rail as its sensor gives it, however implausible."""

    name: str
    power_w: float
    source: str


class EnergyCounter(msgspec.Struct, frozen=True, kw_only=True):
    """A counter of joules since some moment in the past, where it wraps to 0 beyond ``wraps_at_j``."""

    name: str
    energy_j: float
    source: str
    wraps_at_j: float | None = None


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """One thermal zone."""

    name: str
    temperature_c: float


class Battery(msgspec.Struct, frozen=True, kw_only=True):
    """The device's own batteries taken together. ``discharging`` None: none says."""

    percent: float
    discharging: bool | None


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is there and gave no usable figure."""

    path: str
    reason: str


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """The power of the whole device (or of what ``source`` names), or why there is none."""

    total_w: float | None = None
    method: Method = "unknown"
    source: str | None = None
    reason: str | None = None


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What one source gave. ``total`` is None when the device has no such source at all."""

    rails: tuple[Rail, ...] = ()
    energy: tuple[EnergyCounter, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    total: Total | None = None


class PowerReading(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of everything. ``at_s`` is the meter's monotonic clock.

    ``total_w`` is a mean since the sample before for counters and estimates, a momentary value for sensors.
    ``idle_w`` is the baseline (``idle_method``: ``lowest_seen`` or ``profile``); ``active_w`` what is above it.
    ``throttled`` is about now; ``throttled_flags`` also names what happened since boot, where the board tells.
    """

    at_s: float
    total_w: float | None
    total_method: Method
    total_source: str | None
    reason: str | None
    rails: tuple[Rail, ...] = ()
    energy: tuple[EnergyCounter, ...] = ()
    thermal: tuple[Zone, ...] = ()
    thermal_reason: str | None = None  # why there is none
    throttled: bool | None = None
    throttled_flags: tuple[str, ...] = ()
    throttled_reason: str | None = None
    skipped: tuple[Skipped, ...] = ()
    cpu_utilisation: float | None = None
    cpu_utilisation_reason: str | None = None
    idle_w: float | None = None
    idle_method: str | None = None
    active_w: float | None = None
    active_reason: str | None = None
    battery: Battery | None = None
    battery_reason: str | None = None  # why there is none
    memory_pressure_percent: float | None = None  # of the last ten seconds, some task waiting for memory
    memory_pressure_reason: str | None = None
