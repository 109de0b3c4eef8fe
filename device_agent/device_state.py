"""How the device is, and which of the policy's limits that passes: pure.

A trigger goes on at its limit. It goes off when the figure has been clear of the limit, by a gap, for ``HOLD_S``: a
processor at its limit is throttled on and off by the second, and requests would be sent here and there with it. A
figure that isn't known passes no limit.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from device_agent.power.reading import PowerReading
from device_agent.settings import Policy
from device_agent.values import Reason

HOLD_S = 5.0
GAP_C = 5.0
GAP_PERCENT = 5.0
#: Why a device may be spared.
STRAINS = (Reason.HOT, Reason.THROTTLED, Reason.BATTERY_LOW, Reason.MEMORY_PRESSURE)


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of what a trigger looks at; None: not known. ``temperature_c`` is the hottest zone's."""

    temperature_c: float | None = None
    throttled: bool | None = None
    battery_percent: float | None = None
    discharging: bool | None = None
    memory_pressure_percent: float | None = None

    @classmethod
    def of(cls, reading: PowerReading) -> DeviceState:
        """What a reading says of it."""
        battery = reading.battery
        return cls(
            temperature_c=max((zone.temperature_c for zone in reading.thermal), default=None),
            throttled=reading.throttled,
            battery_percent=battery.percent if battery else None,
            discharging=battery.discharging if battery else None,
            memory_pressure_percent=reading.memory_pressure_percent,
        )


class Trigger(msgspec.Struct, frozen=True, kw_only=True):
    """A limit that is passed, since when; ``clear_since``: the figure is back and the trigger about to go off."""

    reason: Reason
    since: float
    clear_since: float | None = None


class _Look(msgspec.Struct, frozen=True, kw_only=True):
    """One limit and one sample: ``beyond`` it, or ``clear`` of it; between the two is the gap."""

    reason: Reason
    beyond: bool
    clear: bool


def next_triggers(before: tuple[Trigger, ...], state: DeviceState, policy: Policy, now: float) -> tuple[Trigger, ...]:
    """The triggers that are on after a sample, those that came first in front."""
    looks = {look.reason: look for look in _looks(state, policy)}
    kept: list[Trigger] = []
    for trigger in before:
        look = looks.pop(trigger.reason, None)
        if look is None:  # the policy has no such limit any more
            continue
        if not look.clear:
            kept.append(msgspec.structs.replace(trigger, clear_since=None))
        elif trigger.clear_since is None:
            kept.append(msgspec.structs.replace(trigger, clear_since=now))
        elif now - trigger.clear_since < HOLD_S:
            kept.append(trigger)
    kept += [Trigger(reason=look.reason, since=now) for look in looks.values() if look.beyond]
    return tuple(kept)


def _looks(state: DeviceState, policy: Policy) -> Iterator[_Look]:
    if policy.max_temperature_c is not None:
        yield _rising(Reason.HOT, state.temperature_c, policy.max_temperature_c, GAP_C)
    if policy.avoid_when_throttled:
        yield _Look(reason=Reason.THROTTLED, beyond=state.throttled is True, clear=state.throttled is not True)
    if policy.min_battery_percent is not None:
        # On mains a low battery is a full one tomorrow.
        spent = None if state.discharging is False else state.battery_percent
        limit = policy.min_battery_percent
        yield _Look(
            reason=Reason.BATTERY_LOW,
            beyond=spent is not None and spent <= limit,
            clear=spent is None or spent >= min(limit + GAP_PERCENT, 100.0),
        )
    if policy.max_memory_pressure_percent is not None:
        limit = policy.max_memory_pressure_percent
        yield _rising(Reason.MEMORY_PRESSURE, state.memory_pressure_percent, limit, min(GAP_PERCENT, limit / 2))


def _rising(reason: Reason, figure: float | None, limit: float, gap: float) -> _Look:
    """A limit from below."""
    return _Look(
        reason=reason,
        beyond=figure is not None and figure >= limit,
        clear=figure is None or figure <= limit - gap,
    )
