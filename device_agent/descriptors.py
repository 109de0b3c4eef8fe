"""File descriptors: a flood of connections leaves enough of them for the agent's own work.

Workers that restart, long payloads, the outbox and the cloud need some too. So connections beyond a limit are refused
(503) before the system has none left; and where that comes first all the same, it is said once, not at every attempt.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from typing import Any

from device_agent.seldom import Seldom

log = logging.getLogger("device_agent.http")

#: Kept back from connections; at most half of what there is.
RESERVE = 256
_ACCEPT_FAILED = "socket.accept() out of system resource"  # asyncio's words


def connection_limit() -> int:
    """How many connections there may be at once, by the process's limit now (``RLIMIT_NOFILE``)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    return soft - min(RESERVE, soft // 2)


def accept_errors(
    seldom: Seldom, otherwise: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler for the loop. asyncio tries to accept again a second later, and reports each failure, up to
    a thousand at once; everything that is something else goes ``otherwise``."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") == _ACCEPT_FAILED:
            seldom.warn(
                "accept",
                "new connections wait: %s. Raise the limit of file descriptors (ulimit -n, LimitNOFILE of systemd)",
                context.get("exception"),
            )
        elif otherwise is not None:
            otherwise(loop, context)
        else:
            loop.default_exception_handler(context)

    return handle
