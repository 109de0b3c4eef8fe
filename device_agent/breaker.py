"""A circuit breaker as a value: pure, the clock and the jitter are passed in.

    closed --N failures in a row--> open --a background check succeeds--> half-open --a request succeeds--> closed
                                      ^------------- a check or the one probing request fails ---------------'

While open, nothing is sent. When the back-off has passed the owner checks the endpoint in the background
(``check_at``), so that no user's request is spent on a server that isn't there. Half-open admits one
request at a time; only an answered inference closes the breaker and resets the back-off.
"""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["closed", "open", "half_open"]


class BreakerRule(msgspec.Struct, frozen=True, kw_only=True):
    """When to open, and how long to stay away: ``backoff_s`` doubles per failure up to ``backoff_max_s``."""

    failures: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 30.0


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """State of one endpoint's breaker. Every method returns a new breaker."""

    rule: BreakerRule = BreakerRule()
    state: State = "closed"
    failures: int = 0  # in a row, while closed
    openings: int = 0  # in a row, without an answered request between: the exponent of the back-off
    check_at: float | None = None  # while open: when the next background check is due
    probing: bool = False  # half-open: the one request is on its way

    def allows(self) -> bool:
        """Whether a request may be sent now."""
        return self.state == "closed" or (self.state == "half_open" and not self.probing)

    def sent(self) -> Breaker:
        """A request is on its way."""
        return self._with(probing=True) if self.state == "half_open" else self

    def succeeded(self) -> Breaker:
        """A request was answered. A late answer from before the opening proves the endpoint alive: half-open."""
        if self.state == "open":
            return self._with(state="half_open", check_at=None, probing=False)
        return Breaker(rule=self.rule)

    def abandoned(self) -> Breaker:
        """A request ended without telling anything about the endpoint (its client went away)."""
        return self._with(probing=False)

    def checked(self) -> Breaker:
        """The background check succeeded: one request may try."""
        return self._with(state="half_open", check_at=None, probing=False) if self.state == "open" else self

    def failed(self, now: float, jitter: float) -> Breaker:
        """A request or a background check failed; ``jitter`` in [0, 1) spreads the back-off over ±25 %."""
        if self.state == "closed" and self.failures + 1 < self.rule.failures:
            return self._with(failures=self.failures + 1)
        if self.state == "open" and self.check_at is not None and now < self.check_at:
            return self  # a straggler sent before the opening says nothing new
        pause = min(self.rule.backoff_s * 2.0 ** min(self.openings, 30), self.rule.backoff_max_s)
        return self._with(
            state="open",
            failures=0,
            openings=self.openings + 1,
            check_at=now + pause * (0.75 + 0.5 * jitter),
            probing=False,
        )

    def _with(self, **changes: object) -> Breaker:
        return msgspec.structs.replace(self, **changes)
