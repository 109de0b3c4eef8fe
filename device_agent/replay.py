"""A trace under another policy: where each request would have gone. Pure.

The router is asked again with what it saw then: queue, forecasts, clouds and the device are those of the recording. A
policy that had sent more away would also have shortened the queue; that is not pretended to be known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial

import msgspec

from device_agent.device_state import DeviceState, Trigger, next_triggers
from device_agent.router import Here, or_for_budget, route, second_opinion
from device_agent.settings import Policy
from device_agent.trace import Began, Decided, Line, Traced, decided
from device_agent.values import Decision, Local


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """How many went, or would have gone, somewhere for a reason."""

    route: str
    reason: str
    count: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """How many would have gone another way than they did."""

    recorded: Decided
    replayed: Decided
    count: int


class Under(msgspec.Struct, frozen=True, kw_only=True):
    """How many were recorded under a policy, by its digest; None: the trace doesn't say."""

    digest: str | None
    requests: int


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """``unsure_unknown``: requests that would have stayed here, where the recording can't tell how sure their answers
    would have been; only counted under a policy with ``min_confidence``. ``policies``: those of the recording."""

    requests: int
    span_s: float
    recorded: tuple[Count, ...]
    replayed: tuple[Count, ...]
    moved: tuple[Move, ...]
    unsure_unknown: int
    policies: tuple[Under, ...] = ()


def replay(lines: Iterable[Line], policy: Policy) -> Replay:
    """Decide every request of a trace again."""
    recorded: Counter[Decided] = Counter()
    replayed: Counter[Decided] = Counter()
    moved: Counter[tuple[Decided, Decided]] = Counter()
    policies: Counter[str | None] = Counter()
    span_s = 0.0
    unknown = 0
    for start in _starts(lines):
        triggers: tuple[Trigger, ...] = ()
        sampled_at: float | None = None
        span_s += start[-1].at - start[0].at
        for line in start:
            if line.sampled_at is not None and line.sampled_at != sampled_at:
                sampled_at = line.sampled_at
                triggers = next_triggers(triggers, line.device or DeviceState(), policy, sampled_at)
            decision = _again(line, policy, triggers)
            unknown += isinstance(decision, Local) and line.opinion is None and policy.min_confidence is not None
            new = decided(decision)
            policies[line.policy] += 1
            recorded[line.decided] += 1
            replayed[new] += 1
            if new != line.decided:
                moved[line.decided, new] += 1
    return Replay(
        requests=sum(recorded.values()),
        span_s=round(span_s, 3),
        recorded=_counts(recorded),
        replayed=_counts(replayed),
        moved=tuple(Move(recorded=a, replayed=b, count=n) for (a, b), n in moved.most_common()),
        unsure_unknown=unknown,
        policies=tuple(Under(digest=digest, requests=n) for digest, n in policies.most_common()),
    )


def _starts(lines: Iterable[Line]) -> list[list[Traced]]:
    """The requests of each start of the agent, in the order they came: they were written as they ended. Each start may
    have another clock."""
    starts: list[list[Traced]] = [[]]
    for line in lines:
        if isinstance(line, Began):
            starts.append([])
        elif isinstance(line, Traced):
            starts[-1].append(line)
    return [sorted(start, key=lambda line: line.at) for start in starts if start]


def _again(line: Traced, policy: Policy, triggers: tuple[Trigger, ...]) -> Decision:
    """What the router says now, and, where this device answered, whether it would ask the cloud too."""
    deadline_at = line.deadline_at
    if deadline_at is None and policy.default_deadline_s is not None:
        deadline_at = line.at + policy.default_deadline_s
    ask = partial(
        route,
        now=line.at,
        deadline_at=deadline_at,
        local_only=line.local_only,
        here=Here(
            forecast=line.forecast,
            worker_ready=line.worker_ready,
            away=line.away,
            queue_full=line.crowded or line.queued >= policy.queue_limit,
            strain=triggers[0].reason if triggers else None,
        ),
    )
    decision = or_for_budget(ask, there=line.there, dear=line.dear)
    opinion = line.opinion
    if isinstance(decision, Local) and opinion is not None:
        asked = second_opinion(
            now=opinion.at,
            deadline_at=deadline_at,
            local_only=line.local_only,
            confidence=opinion.confidence,
            least=policy.min_confidence,
            there=opinion.there,
        )
        return asked or decision
    return decision


def _counts(found: Counter[Decided]) -> tuple[Count, ...]:
    return tuple(Count(route=each.route, reason=each.reason, count=n) for each, n in found.most_common())
