"""Which event loop the agent runs on: uvloop where it is installed (the extra ``fast``), else asyncio's own.

uvloop does the same in C; a small request costs a fifth less with it (docs/measurements.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from aios_edge.errors import MissingExtra

Wanted = Literal["auto", "uvloop", "asyncio"]
_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T], wanted: Wanted = "auto") -> _T:
    """Run a coroutine to its end, as :func:`asyncio.run` does. Raises :class:`MissingExtra` where uvloop is ``wanted``
    and isn't there."""
    if wanted == "asyncio":
        return asyncio.run(main)
    try:
        import uvloop
    except ImportError as error:
        if wanted == "uvloop":
            main.close()
            raise MissingExtra("uvloop", "fast", why='device.event_loop = "uvloop"') from error
        return asyncio.run(main)
    result: _T = uvloop.run(main)
    return result


def running_on() -> str:
    """``uvloop`` or ``asyncio``: what this is called on; ``none`` outside of any."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return "none"
    return "uvloop" if type(loop).__module__.startswith("uvloop") else "asyncio"
