"""Thermal zones of the kernel, and how often an x86 processor was throttled."""

from __future__ import annotations

from pathlib import Path

from device_agent.power.reading import Skipped, Zone
from device_agent.power.sysfs import in_order, read_int, read_text

LOWEST_C, HIGHEST_C = -40.0, 150.0  # what silicon is specified for; a switched-off sensor reads outside
_CONSTANT = ("PMIC-Die",)  # reads 100 °C whatever happens


def read_zones(sys_root: Path) -> tuple[tuple[Zone, ...], tuple[Skipped, ...]]:
    """Zones with a believable temperature, and the others with the reason."""
    zones: list[Zone] = []
    skipped: list[Skipped] = []
    for directory in in_order(sys_root.glob("class/thermal/thermal_zone*")):
        kind = read_text(directory / "type")
        name = kind if isinstance(kind, str) else directory.name
        path = directory / "temp"
        millidegrees = read_int(path)
        if isinstance(millidegrees, Skipped):
            skipped.append(Skipped(path=millidegrees.path, reason=f"{name}: {millidegrees.reason}"))
        elif name in _CONSTANT:
            skipped.append(Skipped(path=str(path), reason=f"{name} is a constant, not a measurement"))
        elif not LOWEST_C < millidegrees / 1e3 < HIGHEST_C:
            skipped.append(Skipped(path=str(path), reason=f"{name}: {millidegrees / 1e3:g} °C is not believable"))
        else:
            zones.append(Zone(name=name, temperature_c=millidegrees / 1e3))
    return tuple(zones), tuple(skipped)


def throttle_count(sys_root: Path) -> int | None:
    """How often any core or package was throttled since boot; None where the processor doesn't count."""
    counts = [
        count
        for path in sys_root.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
        if isinstance(count := read_int(path), int)
    ]
    return sum(counts) if counts else None
