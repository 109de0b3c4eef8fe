"""A worker's share of the cores, beside the other models' workers: given by the kernel's scheduler, by weight.

A niceness is worth a quarter of processor time a step (sched(7)), so weights become nicenesses: 0 of the heaviest
model, more of the others; nobody needs a privilege to have less. A worker has a session of its own, and where the
kernel groups tasks by session (autogroup, as most distributions have it) a task's niceness counts within its group
only, and the group's between workers, so both are set.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

STEP = 1.25  # of processor time, between two nicenesses
MOST = 19
TRIES, PAUSE_S = 20, 0.11
AUTOGROUP = Path("/proc/self/autogroup")


def niceness(weight: float, heaviest: float) -> int:
    """Of a model with that weight, where the heaviest has the other."""
    return min(max(round(math.log(heaviest / weight) / math.log(STEP)), 0), MOST)


def take(nice: int, autogroup: Path = AUTOGROUP) -> None:
    """What a worker process does to itself, before it starts threads: they have what it has then."""
    if nice:
        os.nice(nice)
        _take_in_group(lambda: autogroup.write_text(str(nice), encoding="ascii"))


def _take_in_group(write: Callable[[], object], pause: Callable[[float], None] = time.sleep) -> None:
    for _ in range(TRIES):
        try:
            write()
        except FileNotFoundError:  # a kernel that doesn't group
            return
        except BlockingIOError:  # whoever has no privilege may write once in 100 ms, all processes together
            pause(PAUSE_S)
            continue
        except OSError as error:
            print(f"the weights of bundles have no effect here: {AUTOGROUP}: {error.strerror}", file=sys.stderr)
            return
        return
    print(f"the weights of bundles have no effect here: {AUTOGROUP} was always busy", file=sys.stderr)
