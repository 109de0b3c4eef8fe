"""A client that has ended its direction of a connection: it may wait for its answer, or be gone for good.

TCP tells both with the same packet. It does tell when it is asked: to an interim answer (100), which every HTTP/1.1
client skips, a socket that is closed replies with a reset. A Unix socket knows at once.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_LOOK_S = 0.01
_LONGEST_PAUSE_S = 1.0


class HalfClosed:
    """Looks now and then whether the other end is still there, and calls ``on_gone`` once when it isn't."""

    def __init__(self, fileno: int, on_gone: Callable[[], None]) -> None:
        self._poll = select.poll()
        self._poll.register(fileno, 0)  # hang-up and error are always told
        self._on_gone = on_gone
        self._pause_s = _FIRST_LOOK_S
        self._timer: asyncio.TimerHandle | None = None

    def gone(self) -> bool:
        """Whether nobody can read an answer any more, as far as the kernel knows."""
        return bool(self._poll.poll(0))

    def watch(self) -> None:
        """Look from now on."""
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._look)

    def end(self) -> None:
        """Look no more: the descriptor is about to be closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if self.gone():
            self._timer = None
            self._on_gone()
            return
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self.watch()
