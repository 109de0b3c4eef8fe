"""The resident set that a worker tells of after every batch."""

from __future__ import annotations

import os

from device_agent.worker_memory import resident_bytes

BLOCK_BYTES = 64_000_000


def test_it_is_read_anew_and_is_a_forks_own() -> None:
    before = resident_bytes()
    block = b"x" * BLOCK_BYTES
    after = resident_bytes()
    assert after - before > BLOCK_BYTES / 2
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        more = bytearray(block)  # pages of its own
        os.write(writing, str(resident_bytes()).encode())
        os._exit(len(more) == 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert int(os.read(reading, 32)) - after > BLOCK_BYTES / 2
    assert resident_bytes() - after < BLOCK_BYTES / 2
    os.close(reading)
    os.close(writing)
