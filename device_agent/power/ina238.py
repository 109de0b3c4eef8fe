"""The power monitor at the input of Jetson Thor (hwmon, driver ina238)."""

from __future__ import annotations

from pathlib import Path

from device_agent.power.boards import board_total
from device_agent.power.reading import Collected, Rail, Skipped, Total
from device_agent.power.sysfs import in_order, read_int, read_text

NAME = "ina238"
_LABELS = ("power1_label", "in1_label", "curr1_label", "in0_label", "label")


def collect(sys_root: Path) -> Collected:
    """Every INA238 in watts; the one labelled ``VIN`` is the board's total."""
    rails: list[Rail] = []
    skipped: list[Skipped] = []
    # The same monitor appears on its bus and in the class; a captured tree may have only one of them.
    seen: set[Path] = set()
    for monitor in in_order([*sys_root.glob("bus/i2c/devices/*/hwmon/hwmon*"), *sys_root.glob("class/hwmon/hwmon*")]):
        if monitor.resolve() in seen or read_text(monitor / "name") != NAME:
            continue
        seen.add(monitor.resolve())
        found = _rail(monitor)
        if isinstance(found, Skipped):
            skipped.append(found)
        elif all(rail.name != found.name or rail.power_w != found.power_w for rail in rails):
            rails.append(found)
    total: Total | None = None
    if rails:
        total, rejected = board_total(rails, NAME)
        skipped.extend(rejected)
    elif skipped:
        total = Total(source=NAME, reason=f"the sensor could not be read: {skipped[0].reason}")
    return Collected(rails=tuple(rails), skipped=tuple(skipped), total=total)


def _rail(monitor: Path) -> Rail | Skipped:
    labels = (read_text(monitor / name) for name in _LABELS)
    name = next((label for label in labels if isinstance(label, str) and label), NAME)
    microwatts = read_int(monitor / "power1_input")
    if isinstance(microwatts, int):
        return Rail(name=name, power_w=microwatts / 1e6, source=str(monitor / "power1_input"))
    millivolts = read_int(monitor / "in1_input")  # in0 is the shunt
    milliamperes = read_int(monitor / "curr1_input")
    if isinstance(millivolts, Skipped):
        return millivolts
    if isinstance(milliamperes, Skipped):
        return milliamperes
    return Rail(name=name, power_w=millivolts * milliamperes / 1e6, source=str(monitor / "curr1_input"))
