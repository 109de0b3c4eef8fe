"""Power where nothing measures it: linear in CPU utilisation, marked ``estimated``, with the source of its figures.

    P = idle_w + (busy_w - idle_w) * utilisation

The linear model is that of Fan, Weber and Barroso, "Power provisioning for a warehouse-sized computer" (ISCA 2007).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from aios_edge.profile import PowerEstimate
from device_agent.power.reading import Total
from device_agent.power.sysfs import read_text

NAME = "estimate"


class CpuTimes(msgspec.Struct, frozen=True):
    """Clock ticks since boot, all cores."""

    busy: int
    total: int


def read_cpu_times(proc_root: Path) -> CpuTimes | None:
    """From the first line of ``stat``; None when it can't be read. Time stolen by a hypervisor is not ours."""
    text = read_text(proc_root / "stat")
    if not isinstance(text, str) or not text.startswith("cpu "):
        return None
    try:
        user, nice, system, idle, iowait, irq, softirq = (int(field) for field in text.split()[1:8])
    except ValueError:
        return None
    busy = user + nice + system + irq + softirq
    return CpuTimes(busy, busy + idle + iowait)


def utilisation(before: CpuTimes | None, after: CpuTimes | None) -> tuple[float | None, str | None]:
    """The busy share, 0 to 1, of all cores between two samples; or None and why."""
    if after is None:
        return None, "/proc/stat can't be read"
    if before is None:
        return None, "CPU time becomes utilisation between two samples"
    total = after.total - before.total
    if total <= 0:
        return None, "no CPU time passed between the samples"
    return min(1.0, max(0.0, (after.busy - before.busy) / total)), None


def estimate(model: PowerEstimate | None, busy_share: float | None, reason: str | None) -> Total:
    """The estimated total, or why there is none."""
    if model is None:
        return Total(reason="the device profile has no coefficients for an estimate")
    source = f"CPU time; coefficients: {model.source}"
    if busy_share is None:
        return Total(source=source, reason=reason)
    watts = model.idle_w + (model.busy_w - model.idle_w) * busy_share
    return Total(total_w=round(watts, 6), method="estimated", source=source)
