"""How much memory is left until the kernel ends somebody: the machine's, or that of this agent's own control group.

Of the machine ``MemAvailable`` of ``/proc/meminfo``; of each group from the agent's up, where the kernel lets it read
that, the limit (``memory.max``, version 1 ``memory.limit_in_bytes``) less what is used, without the part of the file
cache that can be dropped at once. The least of them counts. Pressure is the group's own where it has one
(``memory.pressure``), else the machine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from device_agent.control_group import folders
from device_agent.power.pressure import parse_memory_pressure
from device_agent.power.reading import Skipped
from device_agent.power.sysfs import read_int, read_text

NO_LIMIT_BYTES = 1 << 60  # version 1 has no word for it, only a number that nobody has


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """``available_bytes`` of ``limit_bytes`` at ``source``, the tightest place; None where nothing can be read.
    ``pressure_percent``: of the last ten seconds some task waited for memory."""

    available_bytes: int | None = None
    limit_bytes: int | None = None
    source: str | None = None
    pressure_percent: float | None = None


def read_room(proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> Room:
    """As it is now; a file that can't be read limits nothing."""
    rooms = [room for room in (_machine(proc_root), *_groups(proc_root, sys_root)) if room.available_bytes is not None]
    tightest = min(rooms, key=lambda room: room.available_bytes or 0, default=Room())
    own = next(folders("memory", proc_root, sys_root), None)
    text = Skipped(path="", reason="") if own is None else read_text(own[0] / "memory.pressure")
    if isinstance(text, Skipped):
        text = read_text(proc_root / "pressure" / "memory")
    return msgspec.structs.replace(
        tightest, pressure_percent=None if isinstance(text, Skipped) else parse_memory_pressure(text)
    )


def _machine(proc_root: Path) -> Room:
    fields = _fields(proc_root / "meminfo")
    available, total = fields.get("MemAvailable:"), fields.get("MemTotal:")
    if available is None or total is None:
        return Room()
    return Room(available_bytes=available * 1024, limit_bytes=total * 1024, source="machine")


def _groups(proc_root: Path, sys_root: Path) -> Iterator[Room]:
    for folder, version in folders("memory", proc_root, sys_root):
        new = version == 2
        limit = read_int(folder / ("memory.max" if new else "memory.limit_in_bytes"))  # "max" is no number
        used = read_int(folder / ("memory.current" if new else "memory.usage_in_bytes"))
        if isinstance(limit, Skipped) or isinstance(used, Skipped) or limit >= NO_LIMIT_BYTES:
            continue
        cache = _fields(folder / "memory.stat").get("inactive_file" if new else "total_inactive_file", 0)
        yield Room(available_bytes=max(limit - max(used - cache, 0), 0), limit_bytes=limit, source=str(folder))


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    text = read_text(path)
    words = [] if isinstance(text, Skipped) else [line.split() for line in text.splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
