"""A worker's share of the cores, beside the other models' workers: given by the kernel's scheduler, by weight.

A niceness is worth a quarter of processor time a step (sched(7)), so weights become nicenesses: 0 of the heaviest
model, more of the others; nobody needs a privilege to have less. A worker has a session of its own, and where the
kernel groups tasks by session (autogroup, as most distributions have it) a task's niceness counts within its group
only, and the group's between workers, so both are set.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

STEP = 1.25  # of processor time, between two nicenesses
MOST = 19
AUTOGROUP = Path("/proc/self/autogroup")


def niceness(weight: float, heaviest: float) -> int:
    """Of a model with that weight, where the heaviest has the other."""
    return min(max(round(math.log(heaviest / weight) / math.log(STEP)), 0), MOST)


def take(nice: int, autogroup: Path = AUTOGROUP) -> None:
    """What a worker process does to itself, before it starts threads: they have what it has then."""
    if nice:
        os.nice(nice)
        with contextlib.suppress(OSError):  # a kernel that doesn't group, or lets nobody say how
            autogroup.write_text(str(nice), encoding="ascii")
