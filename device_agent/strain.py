"""Keeps what the sensors' loop saw of the device: its state, which triggers are on, and tells when one changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from device_agent.device_state import DeviceState, Trigger, next_triggers
from device_agent.power.reading import PowerReading
from device_agent.settings import Policy
from device_agent.values import Reason

log = logging.getLogger("device_agent")


class Strain:
    """:meth:`look` is called with each reading, :attr:`reason` by every decision; both on the event loop."""

    def __init__(self, policy: Policy, emit: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self.state = DeviceState()
        self.sampled_at: float | None = None
        self.triggers: tuple[Trigger, ...] = ()
        self.reason: Reason | None = None  # why requests had better leave, None: they needn't
        self._policy = policy
        self._emit = emit
        self._clock = clock

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every trigger that is on, by its reason."""
        return tuple(trigger.reason.value for trigger in self.triggers)

    def follow(self, policy: Policy) -> None:
        """Judge what was seen last by other limits."""
        self._policy = policy
        if self.sampled_at is not None:
            self._judge(self._clock())

    def look(self, reading: PowerReading) -> None:
        """Take in a sample."""
        self.state = DeviceState.of(reading)
        self.sampled_at = now = self._clock()
        self._judge(now)

    def _judge(self, now: float) -> None:
        before = set(self.reasons)
        self.triggers = next_triggers(self.triggers, self.state, self._policy, now)
        self.reason = self.triggers[0].reason if self.triggers else None
        after = set(self.reasons)
        for reason in sorted(after - before):
            self._tell("device_strained", reason)
        for reason in sorted(before - after):
            self._tell("device_recovered", reason)

    def _tell(self, kind: str, reason: str) -> None:
        state = self.state
        self._emit(
            kind,
            reason=reason,
            temperature_c=state.temperature_c,
            throttled=state.throttled,
            battery_percent=state.battery_percent,
            memory_pressure_percent=state.memory_pressure_percent,
        )
        log.info("%s: %s", kind.replace("_", " "), reason)
