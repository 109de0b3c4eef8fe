"""Jetson's three-channel power monitors: hwmon since JetPack 5, NVIDIA's own iio driver in JetPack 4."""

from __future__ import annotations

from pathlib import Path

from device_agent.power.boards import board_total
from device_agent.power.reading import Collected, Rail, Skipped, Total
from device_agent.power.sysfs import in_order, read_int, read_text

NAME = "ina3221"


def collect(sys_root: Path) -> Collected:
    """Every connected rail in watts, and the board's total from them."""
    rails: list[Rail] = []
    skipped: list[Skipped] = []
    # One pass each; hwmon numbers move between boots, so the directory is searched, not named.
    for monitor in _monitors(sys_root):
        for channel in (1, 2, 3):  # in4 to in7 and curr4 are shunt values and sums of currents, not rails
            _keep(_hwmon_rail(monitor, channel), rails, skipped)
    if not rails:
        for device in in_order(sys_root.glob("bus/i2c/drivers/ina3221x/*/iio[:_]device*")):
            for channel in (0, 1, 2):
                _keep(_iio_rail(device, channel), rails, skipped)
    total: Total | None = None
    if rails:
        total, rejected = board_total(rails, NAME)
        skipped.extend(rejected)
    elif skipped:
        total = Total(source=NAME, reason="no channel could be read")
    return Collected(rails=tuple(rails), skipped=tuple(skipped), total=total)


def _monitors(sys_root: Path) -> list[Path]:
    """Each monitor once: it appears on its bus and in the class, by a number that no other has, and a captured tree
    may have only one of them. At the addresses that Jetsons give it, it may be captured without its name."""
    found: dict[str, Path] = {}
    for pattern in ("bus/i2c/devices/*/hwmon/hwmon*", "class/hwmon/hwmon*"):
        for monitor in in_order(sys_root.glob(pattern)):
            name = read_text(monitor / "name")
            unnamed = isinstance(name, Skipped) and monitor.match("*-004[01]/hwmon/*")
            if name == NAME or unnamed:
                found.setdefault(monitor.name, monitor)
    return list(found.values())


def _hwmon_rail(monitor: Path, channel: int) -> Rail | Skipped | None:
    label = _label(monitor / f"in{channel}_label")
    if not isinstance(label, str):
        return label
    enabled = read_text(monitor / f"in{channel}_enable")
    if enabled == "0":
        return Skipped(path=str(monitor / f"in{channel}_enable"), reason=f"{label}: channel is switched off")
    millivolts = read_int(monitor / f"in{channel}_input")
    milliamperes = read_int(monitor / f"curr{channel}_input")
    if isinstance(millivolts, Skipped):
        return millivolts
    if isinstance(milliamperes, Skipped):
        return milliamperes
    return Rail(name=label, power_w=millivolts * milliamperes / 1e6, source=str(monitor / f"curr{channel}_input"))


def _iio_rail(device: Path, channel: int) -> Rail | Skipped | None:
    label = _label(device / f"rail_name_{channel}")
    if not isinstance(label, str):
        return label
    path = device / f"in_power{channel}_input"
    milliwatts = read_int(path)
    if isinstance(milliwatts, Skipped):
        return milliwatts
    return Rail(name=label, power_w=milliwatts / 1e3, source=str(path))


def _label(path: Path) -> str | Skipped | None:
    if not path.exists():
        return None
    label = read_text(path)
    if isinstance(label, str) and label.upper() in ("", "NC"):
        return Skipped(path=str(path), reason="channel is not connected (NC)")
    return label


def _keep(found: Rail | Skipped | None, rails: list[Rail], skipped: list[Skipped]) -> None:
    if isinstance(found, Rail):
        rails.append(found)
    elif found is not None:
        skipped.append(found)
