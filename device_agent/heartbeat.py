"""Whether a worker that lives still moves: pure.

The kernel tells of a worker's death at once, but not of one that stands still: stopped by a signal, frozen, swapped
out. So it is looked at every ``LOOK_S``. One that was heard of since the last look is well, and nothing is done. An
idle one is asked, and must answer. A busy one can't answer before its batch ends, however long that is: of it only the
kernel's word counts that it is stopped; a batch that never ends has a watchdog (:mod:`device_agent.watched_run`).

Silence is counted in looks that came when they were due. One that is late says that this process stood still too (the
machine was suspended, or is so busy that nobody gets to work); then whatever the worker didn't say is no fault of its
own, and the count begins anew. Times are CLOCK_MONOTONIC, which no change of the date moves.
"""

from __future__ import annotations

import msgspec

LOOK_S = 0.5
LATE = 2.0  # times LOOK_S between two looks: this process stood still itself
STOPPED_LOOKS = 2  # in a row that find a worker stopped until it is given up
SILENT_LOOKS = 3  # in a row, after it was asked, that find it silent


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a worker: when, how many messages came from it so far, whether it owes a reply, whether the kernel
    says that it is stopped."""

    at: float
    heard: int
    busy: bool
    stopped: bool


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept from look to look. ``silent``: looks since it was asked; None: it wasn't."""

    at: float
    heard: int = 0
    silent: int | None = None
    stopped: int = 0

    @property
    def verdict(self) -> str | None:
        """Why the worker must go; None: it needn't."""
        if self.stopped >= STOPPED_LOOKS:
            return "stood still, stopped by a signal,"
        if self.silent is not None and self.silent >= SILENT_LOOKS:
            return "gave no sign of life"
        return None


def beat(pulse: Pulse, seen: Seen) -> tuple[Pulse, bool]:
    """The next pulse, and whether to ask the worker for a sign of life."""
    if not 0.0 <= seen.at - pulse.at <= LATE * LOOK_S:
        pulse = Pulse(at=pulse.at, heard=pulse.heard)
    if seen.heard != pulse.heard:
        return Pulse(at=seen.at, heard=seen.heard), False
    stopped = pulse.stopped + 1 if seen.stopped else 0
    if seen.busy:
        return Pulse(at=seen.at, heard=seen.heard, stopped=stopped), False
    silent = 0 if pulse.silent is None else pulse.silent + 1
    return Pulse(at=seen.at, heard=seen.heard, silent=silent, stopped=stopped), pulse.silent is None
