"""When a model whose workers die one after the other is no longer started by itself: pure.

A restart costs what others could use, and a model that dies at every one of them serves nobody. So after some crashes
in a row, failed starts included, it is left alone: quarantined. An answered batch ends the row, so neither a model that
serves between its crashes nor one whose client sends poison among good requests gets there. After a long pause there is
one try: the first answered batch makes all well, the first crash begins the pause anew.
"""

from __future__ import annotations

import msgspec

from device_agent.settings import Policy


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """``crashed_at``: the crashes of the row, those that are long past left out. ``until``: when the next try is; None:
    it isn't quarantined. ``on_trial``: it was, and nothing was answered since."""

    crashed_at: tuple[float, ...] = ()
    until: float | None = None
    on_trial: bool = False

    def crashed(self, now: float, policy: Policy) -> Quarantine:
        """A worker died, or didn't start."""
        recent = (*(at for at in self.crashed_at if now - at < policy.quarantine_window_s), now)
        enough = 0 < policy.quarantine_crashes <= len(recent)
        if policy.quarantine_crashes and (self.on_trial or enough):
            return Quarantine(crashed_at=recent, until=now + policy.quarantine_pause_s)
        return Quarantine(crashed_at=recent)

    def tried(self) -> Quarantine:
        """The pause is over: the next start is the try."""
        return Quarantine(crashed_at=self.crashed_at, on_trial=True)

    def served(self) -> Quarantine:
        """A batch was answered."""
        return Quarantine() if self.crashed_at or self.on_trial else self
