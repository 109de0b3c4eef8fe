"""The resident set that a worker tells of after every batch."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from device_agent.worker_memory import READ_EVERY_S, ResidentSet, resident_bytes

BLOCK_BYTES = 64_000_000
NEAR_BYTES = 2_000_000


def read_directly() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_it_is_read_anew_and_is_a_forks_own() -> None:
    before = resident_bytes()
    block = mmap.mmap(-1, BLOCK_BYTES)  # new pages, also where others were given back
    for start in range(0, BLOCK_BYTES, mmap.PAGESIZE):
        block[start] = 1
    assert resident_bytes() - before > BLOCK_BYTES / 2
    if (pid := os.fork()) == 0:
        more = block[:] * 2  # pages of its own, which its parent never has
        os._exit(abs(resident_bytes() - read_directly()) > NEAR_BYTES or len(more) == 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert abs(resident_bytes() - read_directly()) < NEAR_BYTES


def test_between_quick_batches_it_is_not_read_again() -> None:
    now, readings = 0.0, iter((100, 200, 300))
    resident = ResidentSet(clock=lambda: now, read=lambda: next(readings))
    assert [resident.bytes(), resident.bytes()] == [100, 100]
    now = READ_EVERY_S / 2
    assert resident.bytes() == 100
    now = READ_EVERY_S
    assert [resident.bytes(), resident.bytes()] == [200, 200]
