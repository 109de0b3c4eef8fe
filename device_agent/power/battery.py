"""The batteries this device runs on, from the kernel's power supply class (``Documentation/power/power_supply_class``).

Several are one: their mean charge. What hangs on the device with a battery of its own (scope ``Device``: a keyboard)
isn't the device's.
"""

from __future__ import annotations

from pathlib import Path

from device_agent.power.reading import Battery, Skipped
from device_agent.power.sysfs import in_order, read_int, read_text

_TYPES = ("Battery", "UPS")
_HELD = ("Charging", "Full", "Not charging")  # something else feeds the device


def read_battery(sys_root: Path) -> tuple[Battery | None, tuple[Skipped, ...]]:
    """Charge and whether it is being spent; None where no battery tells its charge. Never raises."""
    charges: list[float] = []
    states: list[str] = []
    skipped: list[Skipped] = []
    for directory in in_order(sys_root.glob("class/power_supply/*")):
        if read_text(directory / "type") not in _TYPES or read_text(directory / "scope") == "Device":
            continue
        if read_text(directory / "present") == "0":  # an empty bay
            continue
        charge = _charge_percent(directory)
        if isinstance(charge, Skipped):
            skipped.append(charge)
            continue
        charges.append(charge)
        state = read_text(directory / "status")
        states.append(state if isinstance(state, str) else "Unknown")
    if not charges:
        return None, tuple(skipped)
    spent = True if "Discharging" in states else False if all(state in _HELD for state in states) else None
    return Battery(percent=sum(charges) / len(charges), discharging=spent), tuple(skipped)


def _charge_percent(directory: Path) -> float | Skipped:
    """``capacity``, or what is left of a full charge where the gauge tells that only."""
    told = read_int(directory / "capacity")
    if isinstance(told, int):
        if 0 <= told <= 100:
            return float(told)
        return Skipped(path=str(directory / "capacity"), reason=f"{told} % is not believable")
    for kind in ("energy", "charge"):
        now, full = read_int(directory / f"{kind}_now"), read_int(directory / f"{kind}_full")
        if isinstance(now, int) and isinstance(full, int) and full > 0 and now >= 0:
            return min(100.0, 100.0 * now / full)
    return told
