"""How much memory a process holds: this one, and any other of the same user."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

READ_EVERY_S = 0.002
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(proc_root: Path = Path("/proc")) -> int:
    """This process's resident set (proc(5), second field of ``statm``, in pages)."""
    return int(os.pread(_statm(proc_root), 128, 0).split()[1]) * _PAGE_BYTES


class ResidentSet:
    """:func:`resident_bytes`, read no more often than every :data:`READ_EVERY_S`: of a quick model's batch reading it
    would be a part of what it costs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, read: Callable[[], int] = resident_bytes) -> None:
        self._clock = clock
        self._read = read
        self._read_at = -math.inf
        self._bytes = 0

    def bytes(self) -> int:
        """Now, or a moment ago."""
        now = self._clock()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at, self._bytes = now, self._read()
        return self._bytes


def proportional_bytes(pid: int, proc_root: Path = Path("/proc")) -> int | None:
    """A process's proportional set: what it shares counts by its share, so that those of several may be added up
    (proc(5), ``Pss`` of ``smaps_rollup``, since Linux 4.14). None where that can't be read."""
    return _rolled_up(pid, "Pss:", proc_root)


def own_bytes(pid: int, proc_root: Path = Path("/proc")) -> int | None:
    """What a process holds that no file backs (``Anonymous`` there): so much another of its kind adds, which shares
    the rest with it. None where that can't be read."""
    return _rolled_up(pid, "Anonymous:", proc_root)


def _rolled_up(pid: int, field: str, proc_root: Path) -> int | None:
    try:
        lines = (proc_root / str(pid) / "smaps_rollup").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


@functools.cache
def _statm(proc_root: Path) -> int:
    """The open file. It is read after most batches, and opening it would cost a tenth of a small one; what it says is
    of the process that opened it, so a fork opens its own."""
    return os.open(proc_root / "self" / "statm", os.O_RDONLY | os.O_CLOEXEC)


os.register_at_fork(after_in_child=_statm.cache_clear)
