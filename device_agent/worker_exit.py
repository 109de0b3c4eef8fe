"""How a worker process ended, and what it wrote while it lived. For the supervisor's event loop: nothing blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from typing import IO

log = logging.getLogger("device_agent.worker")

MAX_LINE_BYTES = 4096
DEATH_S = 2.0  # after SIGKILL; the kernel may hold a process longer (a device, a frozen group), and nobody waits for it
_FIRST_POLL_S = 0.001


async def exit_status(process: subprocess.Popen[bytes], *, grace_s: float, else_what: str) -> str:
    """Wait for a process that has closed its connection, kill it after ``grace_s``, and describe how it ended.

    ``else_what`` describes one that had to be killed because it lingered.
    """
    lingered = not await _exits_within(process, grace_s)
    if lingered:
        process.kill()
        if not await _exits_within(process, DEATH_S):
            return f"{else_what} and does not end though it was killed"
    if lingered:
        return f"{else_what} and was killed"
    return describe(process.returncode)


def describe(returncode: int) -> str:
    """``was killed by SIGSEGV`` or ``exited with code 3``, from Popen's return code."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


async def _exits_within(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + limit_s
    try:
        pidfd = os.pidfd_open(process.pid) if process.poll() is None else -1
    except (OSError, AttributeError):  # Linux before 5.3, or a Python built for one
        return await _polled(process, give_up_at)
    if pidfd < 0:
        return True
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await asyncio.wait_for(exited.wait(), limit_s)
    except asyncio.TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    process.wait()
    return True


async def _polled(process: subprocess.Popen[bytes], give_up_at: float) -> bool:
    """The same without pidfd; only ever for the moment between end-of-file and exit."""
    loop = asyncio.get_running_loop()
    pause_s = _FIRST_POLL_S
    while process.poll() is None:
        if loop.time() >= give_up_at:
            return False
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)
    return True


def log_lines(loop: asyncio.AbstractEventLoop, stream: IO[bytes], prefix: str) -> None:
    """Log each line that arrives on a pipe, until its end; over-long ones in pieces."""
    fd = stream.fileno()
    os.set_blocking(fd, False)
    rest = b""

    def on_readable() -> None:
        nonlocal rest
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(fd, 1 << 16)
            if not data:
                loop.remove_reader(fd)
                stream.close()
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES or not data:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                log.info("%s: %s", prefix, line.decode(errors="replace").rstrip())

    loop.add_reader(fd, on_readable)
