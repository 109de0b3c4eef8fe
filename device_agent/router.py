"""Where a request runs: pure, from values, always with a reason.

A request without a deadline stays here. One with a deadline stays while its predicted completion, margin included, is
in time, and it takes nobody's place who waits already; else it goes to the cloud if the cloud is predicted to be in
time, or at least sooner than this device. Without a usable cloud it is refused, unless the worker is idle and expected
to make it: trying costs nobody anything then. A device that is to be spared (hot, throttled, on its last charge, short
of memory) keeps only what the cloud can't surely answer in time.

The same function decides again. One that waits keeps its place until its turn, whatever is predicted, unless a cloud
makes it; at its turn it runs if it is expected in time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from device_agent.scheduler import Forecast, Pending
from device_agent.values import Cloud, Decision, Local, Reason, Shed

LEAST_RETRY_S = 0.05
KEPT_ANSWER_S = 0.01  # before a deadline: what it takes to give the answer that was kept


class Stage(str, enum.Enum):
    """How far a request has come here: it was let in or not, and the worker would take it now."""

    NEW = "new"
    WAITING = "waiting"
    NEXT = "next"


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """This device's side. ``forecast`` None: the model's worker is down, and nobody is to wait for it. ``away``: why
    there is no worker while there is none; ``back_in_s``: when to ask again where there is no forecast. ``strain``: why
    the device is to be spared, None when it isn't."""

    stage: Stage = Stage.NEW
    forecast: Forecast | None
    worker_ready: bool
    away: Reason = Reason.WORKER_LOST
    back_in_s: float = 5.0
    queue_full: bool = False
    strain: Reason | None = None

    def knows_enough(self, deadline_at: float | None) -> bool:
        """Whether :func:`route` needs neither a forecast, whose cost grows with the queue, nor a cloud."""
        return deadline_at is None and self.worker_ready and not self.queue_full and self.strain is None


class There(msgspec.Struct, frozen=True, kw_only=True):
    """A cloud endpoint that may be used now. ``safe_s``: round trip, margin included."""

    endpoint: str
    expected_s: float
    safe_s: float


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """All that :func:`route` decides by. ``queued``: how many waited, and ``crowded``: that was too many for this one;
    ``here.queue_full`` comes from both. ``dear``: the endpoint that could be asked if its budget weren't spent.
    ``policy``: which one is in force, by its digest."""

    now: float
    deadline_at: float | None
    local_only: bool
    here: Here
    there: There | None
    queued: int = 0
    crowded: bool = False
    dear: There | None = None
    policy: str | None = None

    def decide(self) -> Decision:
        """What the router says to it."""
        if self.dear is None:
            return route(
                now=self.now,
                deadline_at=self.deadline_at,
                local_only=self.local_only,
                here=self.here,
                there=self.there,
            )
        ask = partial(route, now=self.now, deadline_at=self.deadline_at, local_only=self.local_only, here=self.here)
        return or_for_budget(ask, there=self.there, dear=self.dear)


def route(*, now: float, deadline_at: float | None, local_only: bool, here: Here, there: There | None) -> Decision:
    """Local, Cloud or Shed; see the module's docstring."""
    if local_only:
        there = None
    forecast = here.forecast
    if deadline_at is not None and deadline_at <= now:
        return Shed(Reason.DEADLINE_PASSED, _retry_after(now, here))
    if here.queue_full:
        if there is not None and (deadline_at is None or now + there.expected_s <= deadline_at):
            return Cloud(Reason.QUEUE_FULL, there.endpoint)
        return Shed(Reason.QUEUE_FULL, _retry_after(now, here))
    if not here.worker_ready:
        return _without_worker(now, deadline_at, local_only, here, there)
    if here.strain is not None and there is not None and (deadline_at is None or now + there.safe_s <= deadline_at):
        return Cloud(here.strain, there.endpoint)
    if deadline_at is None:
        return Local(Reason.LOCAL_ONLY if local_only else Reason.NO_DEADLINE)
    if forecast is None:
        return _without_worker(now, deadline_at, local_only, here, there)
    if forecast.safe_at <= deadline_at and not forecast.delays:
        in_time = Reason.IDLE if forecast.idle else Reason.IN_TIME
        return Local(Reason.LOCAL_ONLY if local_only else in_time, safe=True)
    here_makes_it = forecast.expected_at <= deadline_at and not forecast.delays
    if there is not None and now + there.expected_s <= deadline_at:
        if now + there.safe_s <= deadline_at or not here_makes_it:
            return Cloud(Reason.PREDICTED_LATE, there.endpoint)
        # Neither is safe: the one with more room.
        if now + there.expected_s < forecast.expected_at:
            return Cloud(Reason.PREDICTED_LATE, there.endpoint)
        return Local(Reason.IN_TIME)
    if here.stage is Stage.WAITING or (here_makes_it and (here.stage is Stage.NEXT or forecast.idle)):
        return Local(Reason.LOCAL_ONLY if local_only else Reason.CLOUD_UNAVAILABLE)
    late_s = forecast.safe_at - deadline_at
    return Shed(Reason.LOCAL_ONLY if local_only else Reason.CLOUD_UNAVAILABLE, max(late_s, LEAST_RETRY_S))


def _without_worker(
    now: float, deadline_at: float | None, local_only: bool, here: Here, there: There | None
) -> Decision:
    """The worker is starting or lost; the forecast counts its restart. That it comes back from a crash is a hope, and a
    cloud is preferred; a model that was unloaded for others is loaded for whom that is in time."""
    forecast = here.forecast
    back_in_time = forecast is not None and (deadline_at is None or forecast.expected_at <= deadline_at)
    if here.away is Reason.LOADING and back_in_time:
        return Local(Reason.LOCAL_ONLY if local_only else Reason.LOADING)
    if there is not None and (deadline_at is None or now + there.expected_s <= deadline_at):
        return Cloud(here.away, there.endpoint)
    if back_in_time:
        return Local(Reason.LOCAL_ONLY if local_only else here.away)
    return Shed(here.away, _retry_after(now, here))


def _retry_after(now: float, here: Here) -> float:
    return max(here.forecast.expected_at - now, LEAST_RETRY_S) if here.forecast else here.back_in_s


def or_for_budget(ask: Callable[..., Decision], *, there: There | None, dear: There | None) -> Decision:
    """What ``ask`` says to the cloud there is; with the reason ``budget`` where it would have chosen ``dear``, which
    only its spent budget keeps from being asked."""
    decision = ask(there=there)
    if dear is None or isinstance(decision, Cloud) or not isinstance(ask(there=dear), Cloud):
        return decision
    return for_want_of_cloud(decision, Reason.BUDGET)


def second_opinion(
    *,
    now: float,
    deadline_at: float | None,
    local_only: bool,
    confidence: float | None,
    least: float | None,
    there: There | None,
) -> Cloud | None:
    """Whom to ask again when this device has answered, and isn't sure; None: its answer stands."""
    if least is None or confidence is None or confidence >= least or local_only or there is None:
        return None
    if deadline_at is not None and now + there.safe_s > deadline_at - KEPT_ANSWER_S:
        return None
    return Cloud(Reason.LOW_CONFIDENCE, there.endpoint)


def for_want_of_cloud(decision: Decision, why: Reason) -> Decision:
    """The decision made without a cloud that would have taken it, saying why it didn't."""
    if isinstance(decision, Local):
        return msgspec.structs.replace(decision, reason=why)
    if isinstance(decision, Shed) and decision.reason is not Reason.DEADLINE_PASSED:
        return Shed(why, decision.retry_after_s)
    return decision


def after_worker_lost(
    now: float,
    deadline_at: float | None,
    there: There | None,
    back_in_s: float,
    away: Reason = Reason.WORKER_LOST,
) -> Cloud | Shed:
    """Where a request goes that a dead worker had, or that waits for one that doesn't come back."""
    if there is not None and (deadline_at is None or now + there.expected_s <= deadline_at):
        return Cloud(away, there.endpoint)
    return Shed(away, back_in_s)


def next_review_at(queue: Sequence[Pending], there: There | None, now: float) -> float | None:
    """When a waiting request should be judged again: at its last chances in the cloud, and when its deadline passes."""
    moments = [
        at
        for pending in queue
        if pending.deadline_at is not None
        for at in (
            *((pending.deadline_at - there.safe_s, pending.deadline_at - there.expected_s) if there else ()),
            pending.deadline_at,
        )
        if at > now
    ]
    return min(moments, default=None)
