"""Asks every power source of a device, in the profile's order, and says which one the total is from.

To add a source: a file beside this one with a function that returns :class:`Collected`, a line in
``PowerMeter._collectors`` and one in ``ALL_SOURCES``, which is what a profile without sources asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from aios_edge.profile import Power
from device_agent.power import ina238, ina3221, pmic, rapl, thermal
from device_agent.power.battery import read_battery
from device_agent.power.estimate import CpuTimes, estimate, read_cpu_times, utilisation
from device_agent.power.pressure import read_memory_pressure
from device_agent.power.reading import Collected, EnergyCounter, PowerReading, Skipped, Total, Zone
from device_agent.power.sysfs import read_text

SYS, PROC = Path("/sys"), Path("/proc")
ALL_SOURCES = (ina238.NAME, ina3221.NAME, pmic.NAME, rapl.NAME, "estimate")


class PowerMeter:
    """``profile_power`` None asks every source and estimates nothing. Blocking (sensors on slow buses take
    milliseconds): call :meth:`sample` off the event loop, from one thread."""

    def __init__(
        self,
        profile_power: Power | None = None,
        sys_root: Path = SYS,
        proc_root: Path = PROC,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = (profile_power.sources if profile_power else ()) or ALL_SOURCES
        self._model = profile_power.estimate if profile_power else None
        self._sys_root, self._proc_root, self._clock = sys_root, proc_root, clock
        # A captured /sys beside this host's /proc: this host's load says nothing about that device.
        self._foreign = sys_root != SYS and proc_root == PROC
        self._before_s: float | None = None
        self._counters: tuple[EnergyCounter, ...] = ()
        self._cpu: CpuTimes | None = None
        self._throttles: int | None = None
        self._lowest_w: dict[str, float] = {}  # by method and source, which don't compare with each other

    def sample(self) -> PowerReading:
        """Read everything once. Never raises: what fails is in ``skipped``."""
        at_s = self._clock()
        elapsed_s = 0.0 if self._before_s is None else at_s - self._before_s
        self._before_s = at_s
        cpu = None if self._foreign else read_cpu_times(self._proc_root)
        busy_share, busy_reason = utilisation(self._cpu, cpu)
        if self._foreign:
            busy_reason = "not this host's device"
        self._cpu = cpu
        collected: list[Collected] = []
        for name, collect in self._collectors(elapsed_s, busy_share, busy_reason).items():
            collected.append(_isolated(name, collect))
        zones, gaps = _zones(self._sys_root)
        total = self._choose(collected)
        throttled, flags, throttled_reason = self._throttling()
        battery, unread = read_battery(self._sys_root)
        pressure, pressure_reason = self._memory_pressure()
        idle_w, idle_method, active_w, active_reason = self._baseline(total)
        return PowerReading(
            at_s=at_s,
            total_w=total.total_w,
            total_method=total.method,
            total_source=total.source,
            reason=total.reason,
            rails=tuple(rail for part in collected for rail in part.rails),
            energy=tuple(counter for part in collected for counter in part.energy),
            thermal=zones,
            thermal_reason=None if zones else _no_zone(gaps),
            throttled=throttled,
            throttled_flags=flags,
            throttled_reason=throttled_reason,
            skipped=tuple(gap for part in collected for gap in part.skipped) + gaps + unread,
            cpu_utilisation=busy_share,
            cpu_utilisation_reason=busy_reason,
            idle_w=idle_w,
            idle_method=idle_method,
            active_w=active_w,
            active_reason=active_reason,
            battery=battery,
            battery_reason=None if battery else "; ".join(gap.reason for gap in unread) or "no battery here",
            memory_pressure_percent=pressure,
            memory_pressure_reason=pressure_reason,
        )

    def _collectors(
        self, elapsed_s: float, busy_share: float | None, busy_reason: str | None
    ) -> dict[str, Callable[[], Collected]]:
        known: dict[str, Callable[[], Collected]] = {
            ina238.NAME: lambda: ina238.collect(self._sys_root),
            ina3221.NAME: lambda: ina3221.collect(self._sys_root),
            pmic.NAME: lambda: pmic.collect() if self._may_ask_firmware() else Collected(),
            rapl.NAME: lambda: self._rapl(elapsed_s),
            "estimate": lambda: self._estimate(busy_share, busy_reason),
        }
        return {name: known[name] for name in self._sources if name in known}

    def _rapl(self, elapsed_s: float) -> Collected:
        before = self._counters
        self._counters, skipped = rapl.read_counters(self._sys_root)
        return rapl.collect(before, self._counters, skipped, elapsed_s)

    def _estimate(self, busy_share: float | None, busy_reason: str | None) -> Collected:
        if self._foreign:
            return Collected(total=Total(reason="nothing is estimated from this host for another device"))
        return Collected(total=estimate(self._model, busy_share, busy_reason))

    def _may_ask_firmware(self) -> bool:
        """Not for a captured tree that says it is another board."""
        model = read_text(self._sys_root / "firmware/devicetree/base/model")
        return self._sys_root == SYS or not isinstance(model, str) or "Raspberry" in model

    @staticmethod
    def _choose(collected: list[Collected]) -> Total:
        """The first source that gives a total; else every source's reason."""
        totals = [part.total for part in collected if part.total is not None]
        for total in totals:
            if total.total_w is not None:
                return total
        reasons = list(dict.fromkeys(total.reason for total in totals if total.reason))
        return Total(reason="; ".join(reasons) if reasons else "this device has no power sensor that is known")

    def _throttling(self) -> tuple[bool | None, tuple[str, ...], str | None]:
        firmware = pmic.throttling() if self._may_ask_firmware() else None
        if isinstance(firmware, tuple):
            return firmware[0], firmware[1], None
        count, before = thermal.throttle_count(self._sys_root), self._throttles
        self._throttles = count
        if count is not None:
            if before is None:
                return None, (), "throttle counters tell between two samples"
            return count > before, (), None
        return None, (), firmware.reason if firmware else "neither vcgencmd nor throttle counters here"

    def _memory_pressure(self) -> tuple[float | None, str | None]:
        if self._foreign:
            return None, "not this host's device"
        found = read_memory_pressure(self._proc_root)
        return (None, found.reason) if isinstance(found, Skipped) else (found, None)

    def _baseline(self, total: Total) -> tuple[float | None, str | None, float | None, str | None]:
        if total.total_w is None:
            return None, None, None, "no total"
        if total.method == "estimated" and self._model is not None:
            idle_w = self._model.idle_w
            return idle_w, "profile", max(0.0, total.total_w - idle_w), None
        key = f"{total.method} {total.source}"
        first = key not in self._lowest_w
        idle_w = self._lowest_w[key] = min(total.total_w, self._lowest_w.get(key, total.total_w))
        if first:
            return idle_w, "lowest_seen", None, "one sample is no idle baseline"
        return idle_w, "lowest_seen", total.total_w - idle_w, None


def _isolated(name: str, collect: Callable[[], Collected]) -> Collected:
    try:
        return collect()
    except Exception as error:  # a source that breaks must not take the others with it
        reason = f"{type(error).__name__}: {error}"
        return Collected(skipped=(Skipped(path=name, reason=reason),), total=Total(reason=f"{name}: {reason}"))


def _zones(sys_root: Path) -> tuple[tuple[Zone, ...], tuple[Skipped, ...]]:
    try:
        return thermal.read_zones(sys_root)
    except Exception as error:
        return (), (Skipped(path="class/thermal", reason=f"{type(error).__name__}: {error}"),)


def _no_zone(gaps: tuple[Skipped, ...]) -> str:
    return "; ".join(gap.reason for gap in gaps) or "this device has no thermal zone that is known"
