"""What the agent gives to each of its models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.device_state import DeviceState
from device_agent.memory_room import Room, read_room
from device_agent.policy_in_force import PolicyInForce
from device_agent.settings import Policy
from device_agent.tenants import Tenant
from device_agent.trace import Traced
from device_agent.values import Reason

Emit = Callable[..., None]  # emit(kind, **detail)
STALE_S = 10.0  # a sample of the device that is older tells nothing; they come every second


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Rules, the way out, who hears of events, what energy costs, why the device is to be spared, who takes traces, who
    may ask, how the device was when it was sampled last, the time, and the memory that is left; the same for every
    model."""

    rules: PolicyInForce
    cloud: CloudPool
    emit: Emit
    energy: Callable[[float, int], Energy]  # (compute_s, batch_size) -> energy of one request
    strain: Callable[[], Reason | None] = lambda: None
    trace: Callable[[Traced], None] | None = None
    tenants: tuple[Tenant, ...] = ()
    device: Callable[[], tuple[DeviceState, float | None]] = lambda: (DeviceState(), None)
    clock: Callable[[], float] = time.monotonic
    room: Callable[[], Room] = read_room

    @property
    def policy(self) -> Policy:
        """The one in force at this moment: not to be kept."""
        return self.rules.policy

    def slowed(self) -> tuple[bool, float | None]:
        """Whether the device was too hot to run as it can when it was sampled last, and when: None where nobody
        knows: it never was, or not for a while, because a sensor hangs."""
        state, sampled_at = self.device()
        if sampled_at is None or self.clock() - sampled_at > STALE_S:
            return False, None
        return state.throttled is True or self.strain() in (Reason.HOT, Reason.THROTTLED), sampled_at
