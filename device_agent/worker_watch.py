"""Looks at one worker's process, once in a while, and gives up one that stands still (:mod:`device_agent.heartbeat`).

It costs a request nothing: a timer reads what the connection counted anyway, and only a worker that said nothing since
the last look is looked for in /proc, or asked.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from device_agent import heartbeat
from device_agent.heartbeat import Pulse, Seen

PROC = Path("/proc")


class Watched(Protocol):
    """A connection to a worker's process. ``heard`` counts the messages that came."""

    loop: asyncio.AbstractEventLoop
    heard: int

    @property
    def busy(self) -> bool: ...

    def ping(self) -> None: ...

    def give_up(self, why: str) -> None: ...


class WorkerWatch:
    """From now until :meth:`end`."""

    def __init__(self, worker: Watched, pid: int) -> None:
        self._worker = worker
        self._pid = pid
        self._pulse = Pulse(at=worker.loop.time())
        self._timer = worker.loop.call_later(heartbeat.LOOK_S, self._look)

    def end(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        worker = self._worker
        seen = Seen(
            at=worker.loop.time(),
            heard=worker.heard,
            busy=worker.busy,
            stopped=worker.heard == self._pulse.heard and is_stopped(self._pid),
        )
        self._pulse, ask = heartbeat.beat(self._pulse, seen)
        if (why := self._pulse.verdict) is not None:
            worker.give_up(why)
            return
        if ask:
            worker.ping()
        self._timer = worker.loop.call_later(heartbeat.LOOK_S, self._look)


def is_stopped(pid: int, proc_root: Path = PROC) -> bool:
    """Whether the kernel says ``T``, stopped by a signal (proc(5), third field of ``stat``); a debugger's stop is not
    that."""
    try:
        stat = (proc_root / str(pid) / "stat").read_bytes()
    except OSError:  # it has gone: its socket tells
        return False
    return stat[stat.rfind(b")") + 2 : stat.rfind(b")") + 3] == b"T"
