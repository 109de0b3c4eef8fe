"""Tasks that nobody awaits: kept going whatever goes wrong in them, and ended for sure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

FAULT_PAUSE_S = 1.0

log = logging.getLogger("device_agent")


async def kept_up(step: Callable[[], Awaitable[None]], what: str) -> None:
    """Do it again and again, until this is cancelled. A fault of one time is in the log, with ``what`` could not be
    done, and the next time comes a second later."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("%s; tried again", what)
            await asyncio.sleep(FAULT_PAUSE_S)


async def ended(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel them until they have ended: :func:`asyncio.wait_for` before Python 3.12 may swallow a cancellation."""
    while left := [task for task in tasks if task is not None and not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1.0)
