"""Energy counters of x86 packages (Linux powercap, ``intel-rapl``; AMD's appear under the same name)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device_agent.power.boards import plausible
from device_agent.power.reading import Collected, EnergyCounter, Rail, Skipped, Total
from device_agent.power.sysfs import in_order, read_int, read_text

NAME = "rapl"
MAX_PACKAGE_W = 1500.0
NEEDS_TWO = "energy counters become watts between two samples"


def read_counters(sys_root: Path) -> tuple[tuple[EnergyCounter, ...], tuple[Skipped, ...]]:
    """Every zone's counter. ``intel-rapl-mmio`` repeats the packages and is left out."""
    counters: list[EnergyCounter] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    base = sys_root / "class/powercap"
    # In the class directory sub-zones lie beside their package; in the device tree, below it.
    for zone in in_order([*base.glob("intel-rapl:*"), *base.glob("intel-rapl:*/intel-rapl:*")]):
        if zone.name in seen:
            continue
        seen.add(zone.name)
        name = read_text(zone / "name")
        energy_uj = read_int(zone / "energy_uj")
        wrap_uj = read_int(zone / "max_energy_range_uj")
        if isinstance(energy_uj, Skipped):
            skipped.append(energy_uj)
            continue
        counters.append(
            EnergyCounter(
                name=name if isinstance(name, str) else zone.name,
                energy_j=energy_uj / 1e6,
                source=str(zone),
                wraps_at_j=None if isinstance(wrap_uj, Skipped) else wrap_uj / 1e6,
            )
        )
    return tuple(counters), tuple(skipped)


def used_j(before: EnergyCounter, after: EnergyCounter) -> float | None:
    """Joules between two readings of one counter; across a wrap, after + range - before. None when the counter
    went back and its range is unknown."""
    if after.energy_j >= before.energy_j:
        return after.energy_j - before.energy_j
    return None if after.wraps_at_j is None else after.energy_j + after.wraps_at_j - before.energy_j


def collect(
    before: Sequence[EnergyCounter], after: Sequence[EnergyCounter], skipped: tuple[Skipped, ...], elapsed_s: float
) -> Collected:
    """Watts between two readings. The total is that of the packages: cores, GPU and DRAM zones lie inside them."""
    packages = [counter for counter in after if _is_package(counter)]
    if not packages:
        reason = skipped[0].reason if skipped else "no package zone"
        total = Total(source=NAME, reason=reason) if after or skipped else None
        return Collected(energy=tuple(after), skipped=skipped, total=total)
    label = f"{NAME}: {' + '.join(counter.name for counter in packages)} (processor only, not the whole board)"
    earlier = {counter.source: counter for counter in before}
    rails: list[Rail] = []
    watts: dict[str, float] = {}
    for counter in after:
        joules = used_j(earlier[counter.source], counter) if counter.source in earlier else None
        if joules is not None and elapsed_s > 0:
            watts[counter.source] = joules / elapsed_s
            rails.append(Rail(name=counter.name, power_w=joules / elapsed_s, source=counter.source))
    if any(counter.source not in watts for counter in packages):
        return Collected(energy=tuple(after), skipped=skipped, total=Total(source=label, reason=NEEDS_TWO))
    unreadable = [gap for gap in skipped if Path(gap.path).parent.name.count(":") == 1]
    if unreadable:
        total = Total(source=label, reason=f"a package is missing: {unreadable[0].path} {unreadable[0].reason}")
        return Collected(rails=tuple(rails), energy=tuple(after), skipped=skipped, total=total)
    total, rejected = plausible(
        sum(watts[counter.source] for counter in packages),
        method="measured" if len(packages) == 1 else "sum_of_rails",
        source=label,
        max_w=MAX_PACKAGE_W * len(packages),
        path=packages[0].source,
    )
    return Collected(rails=tuple(rails), energy=tuple(after), skipped=skipped + rejected, total=total)


def _is_package(counter: EnergyCounter) -> bool:
    # psys, a top-level zone too, covers the packages again and isn't wired on many boards.
    return Path(counter.source).name.count(":") == 1 and counter.name.startswith("package")
