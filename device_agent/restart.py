"""When a dead worker is started again: pure. At once after the first crash, then with a growing pause."""

from __future__ import annotations

import msgspec

from aios_edge.errors import BundleRefused

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
PATIENCE = 3  # crashes and failed starts in a row until nobody is kept waiting for the next


class RestartPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``crashes``: in a row, without a served batch between. ``start_s``: how long a start takes, as last seen."""

    crashes: int = 0
    start_s: float = 1.0

    @property
    def pause_s(self) -> float:
        """Wait that long before the next start: 0 for the first and second crash in a row, then doubling.

        The second is free because a request that kills workers is tried twice: what else waits shouldn't pay.
        """
        if self.crashes <= 2:
            return 0.0
        return float(min(FIRST_PAUSE_S * 2.0 ** min(self.crashes - 3, 10), LONGEST_PAUSE_S))

    @property
    def expected_s(self) -> float:
        """From the crash until a worker is ready again."""
        return self.pause_s + self.start_s

    def crashed(self) -> RestartPlan:
        """A worker died, or didn't start."""
        return msgspec.structs.replace(self, crashes=self.crashes + 1)

    def started(self, took_s: float) -> RestartPlan:
        """A worker became ready after that long."""
        return msgspec.structs.replace(self, start_s=took_s)

    def served(self) -> RestartPlan:
        """A batch was answered: the crashes before it are history."""
        return self if self.crashes == 0 else msgspec.structs.replace(self, crashes=0)

    def hopeless(self, failure: Exception) -> bool:
        """Whether nobody should be kept waiting for the next start, after the failure of the last."""
        return isinstance(failure, BundleRefused) or self.crashes > PATIENCE
