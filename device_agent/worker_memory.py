"""How much memory this process holds."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(proc_root: Path = Path("/proc")) -> int:
    """This process's resident set (proc(5), second field of ``statm``, in pages)."""
    return int(os.pread(_statm(proc_root), 128, 0).split()[1]) * _PAGE_BYTES


@functools.cache
def _statm(proc_root: Path) -> int:
    """The open file. It is read after every batch, and opening it would cost a tenth of a small one; what it says is of
    the process that opened it, so a fork opens its own."""
    return os.open(proc_root / "self" / "statm", os.O_RDONLY | os.O_CLOEXEC)


os.register_at_fork(after_in_child=_statm.cache_clear)
