"""How many cores this agent may use: those that its affinity mask and the profile leave it, and no more than the
processor time that its control groups grant (``cpu.max``; version 1 ``cpu.cfs_quota_us`` by ``cpu.cfs_period_us``)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from device_agent.control_group import folders
from device_agent.power.reading import Skipped
from device_agent.power.sysfs import read_int, read_text


def cores_allowed(pinned: Collection[int] = (), proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> int:
    """At least one; ``pinned``: the CPUs that the profile keeps workers to, empty for any."""
    cpus = os.sched_getaffinity(0)
    usable = len(cpus.intersection(pinned)) if pinned else len(cpus)
    return max(int(min([float(usable), *_granted(proc_root, sys_root)])), 1)


def _granted(proc_root: Path, sys_root: Path) -> Iterator[float]:
    """Processor time per second of each group that limits it."""
    for folder, version in folders("cpu", proc_root, sys_root):
        if version == 1:
            quota, period = read_int(folder / "cpu.cfs_quota_us"), read_int(folder / "cpu.cfs_period_us")
            if not isinstance(quota, Skipped) and not isinstance(period, Skipped) and quota > 0 and period > 0:
                yield quota / period
            continue
        text = read_text(folder / "cpu.max")
        words = [] if isinstance(text, Skipped) else text.split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            yield int(words[0]) / int(words[1])
