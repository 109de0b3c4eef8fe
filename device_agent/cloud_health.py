"""An endpoint's breaker, and who is told when it opens and closes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import msgspec

from device_agent.breaker import Breaker, BreakerRule

log = logging.getLogger("device_agent.cloud")

Emit = Callable[..., None]


class Health:
    """Told how requests and checks went. ``on_open`` is called when the breaker opens."""

    def __init__(
        self, name: str, rule: BreakerRule, emit: Emit, clock: Callable[[], float], on_open: Callable[[], None]
    ) -> None:
        self.breaker = Breaker(rule=rule)
        self._name = name
        self._emit = emit
        self._clock = clock
        self._on_open = on_open

    def follow(self, rule: BreakerRule) -> None:
        """Count by another rule from the next failure on; an open breaker's pause stays as it is. That failure may open
        it, those before it don't."""
        failures = min(self.breaker.failures, rule.failures - 1)
        self.breaker = msgspec.structs.replace(self.breaker, rule=rule, failures=failures)

    def sent(self) -> None:
        """A request is on its way."""
        self.breaker = self.breaker.sent()

    def succeeded(self) -> None:
        """A request was answered."""
        before = self.breaker.state
        self.breaker = self.breaker.succeeded()
        if before != "closed" and self.breaker.state == "closed":
            self._emit("breaker_closed", endpoint=self._name)
            log.info("cloud %s answers again: breaker closed", self._name)

    def abandoned(self) -> None:
        """A request ended without telling anything about the endpoint."""
        self.breaker = self.breaker.abandoned()

    def failed(self, why: str) -> None:
        """A request failed there."""
        before = self.breaker
        self.breaker = before.failed(self._clock(), random.random())
        log.warning("cloud %s failed: %s", self._name, why)
        if self.breaker.state == "open" and self.breaker is not before:
            if before.state == "closed":
                self._emit("breaker_opened", endpoint=self._name, why=why, failures=before.failures + 1)
                log.warning("cloud %s: breaker open", self._name)
            self._on_open()

    def check_failed(self) -> None:
        """The background check of an open breaker found nobody."""
        self.breaker = self.breaker.failed(self._clock(), random.random())

    def checked(self) -> None:
        """The background check succeeded: one request may try."""
        self.breaker = self.breaker.checked()
        self._emit("breaker_half_open", endpoint=self._name)
        log.info("cloud %s is reachable: breaker half-open", self._name)
