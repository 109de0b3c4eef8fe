"""One request, two endpoints: when the first takes longer than nearly all of its answers did, a second one is asked.

Inference changes nothing, so asking twice is safe; the first answer wins, and the other request is given up (Dean and
Barroso, The Tail at Scale, 2013). At most one request in ten is sent twice: an endpoint that became slow for everybody
would otherwise double the load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

SHARE = 0.1
BURST = 5.0

Result = TypeVar("Result")


class HedgeAllowance(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests may be sent twice: each one that is sent earns a tenth of it. A value, pure."""

    left: float = 1.0

    def earned(self) -> HedgeAllowance:
        """A request was sent."""
        return HedgeAllowance(left=min(self.left + SHARE, BURST))

    def allows(self) -> bool:
        """Whether one may be sent twice now."""
        return self.left >= 1

    def used(self) -> HedgeAllowance:
        """One was."""
        return HedgeAllowance(left=self.left - 1)


async def first_good(
    first: Awaitable[Result],
    second: Callable[[], Awaitable[Result] | None],
    after_s: float,
    good: Callable[[Result], bool],
) -> Result:
    """What ``first`` gives, or what another gives that ``second`` names when ``after_s`` have passed without it.

    The first good result wins and the other call is cancelled; of two bad ones, that of ``first``.
    """
    tasks = [asyncio.ensure_future(first)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=after_s)
        if not done and (other := second()) is not None:
            tasks.append(asyncio.ensure_future(other))
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:  # of two at once, the first
                if task in done and good(task.result()):
                    return task.result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
