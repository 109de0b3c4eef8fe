"""How much of the time work stood still for want of memory: the kernel's pressure stall information (PSI).

``/proc/pressure/memory``, line ``some``, ``avg10``: percent of the last ten seconds in which at least one task waited
for memory. It rises before the OOM killer comes, and unlike free memory it says whether anybody suffers.
"""

from __future__ import annotations

import re
from pathlib import Path

from device_agent.power.reading import Skipped
from device_agent.power.sysfs import read_text

_SOME = re.compile(r"^some avg10=(\d+(?:\.\d+)?) ", re.MULTILINE)


def read_memory_pressure(proc_root: Path) -> float | Skipped:
    """Percent, 0 to 100; why not where the kernel was built or started without PSI."""
    path = proc_root / "pressure/memory"
    text = read_text(path)
    if isinstance(text, Skipped):
        if text.reason == "no such file":
            return Skipped(path=text.path, reason="this kernel has no pressure stall information (CONFIG_PSI, psi=1)")
        return text
    percent = parse_memory_pressure(text)
    return Skipped(path=str(path), reason=f"is not pressure information: {text[:40]!r}") if percent is None else percent


def parse_memory_pressure(text: str) -> float | None:
    """The percent in the content of such a file; None when it isn't one."""
    found = _SOME.search(text)
    return float(found[1]) if found else None
