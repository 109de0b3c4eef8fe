"""The policy by which this agent decides now: one holder, which every decision reads, so that it can be replaced
between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.telemetry import PolicyFigures, Scalar, rfc3339
from device_agent.settings import Policy

DIGEST_CHARS = 16
#: What an agent does beside deciding: it opens its trace when it starts.
AT_START = ("trace", "trace_bytes")

Follow = Callable[[Policy], None]


class PolicyInForce:
    """``policy`` is a value: who reads two of its limits in one decision reads them of one policy.

    Belongs to the event loop's thread. ``since`` is wall time (RFC 3339), at first that of the start.
    """

    def __init__(self, policy: Policy, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._followers: list[Follow] = []
        self._set(policy)

    def follow(self, follower: Follow) -> None:
        """Have it called with each new policy: for what is made of a policy and lasts longer than a decision."""
        self._followers.append(follower)

    def replace(self, policy: Policy) -> None:
        """From here on. Without a wait in between, so no decision sees half of it."""
        self._set(policy)
        for follower in self._followers:
            follower(policy)

    def figures(self) -> PolicyFigures:
        """What is told of it."""
        return PolicyFigures(digest=self.digest, since=self.since)

    def _set(self, policy: Policy) -> None:
        self.policy = policy
        self.digest = policy_digest(policy)
        self.since = rfc3339(self._wall())


def policy_values(policy: Policy) -> dict[str, Scalar]:
    """What it decides by, defaults included."""
    return {name: getattr(policy, name) for name in Policy.__struct_fields__ if name not in AT_START}


def policy_digest(policy: Policy) -> str:
    """What tells policies apart: the first hex digits of a SHA-256 over their values. Two agents of one version with
    the same values have the same digest, however their files are written."""
    return sha256_bytes(canonical_json(msgspec.to_builtins(policy_values(policy))))[:DIGEST_CHARS]
