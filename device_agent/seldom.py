"""A log that a flood can't fill: what clients can make happen thousands of times a second is said once a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

PERIOD_S = 60.0


class Seldom:
    """Warnings by kind: the first at once, the next no sooner than ``PERIOD_S`` later, with how many were left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # when it was said, and how often it happened since

    def warn(self, kind: str, text: str, *values: object) -> None:
        """Say it, or count it. ``kind`` is one of a few words of ours, never a client's."""
        now = self._clock()
        said_at, left_out = self._said.get(kind, (None, 0))
        if said_at is not None and now - said_at < PERIOD_S:
            self._said[kind] = said_at, left_out + 1
            return
        self._said[kind] = now, 0
        self._log.warning(text + (f" ({left_out} times more since it was last said)" if left_out else ""), *values)
