"""How much memory this process holds."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes(proc_root: Path = Path("/proc")) -> int:
    """This process's resident set (proc(5), second field of ``statm``, in pages)."""
    pages = int((proc_root / "self" / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
