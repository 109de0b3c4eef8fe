"""Where requests go, and the one property that matters: nobody is sent where the deadline can't be met, needlessly."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from device_agent.admission import Admit, Load, admit
from device_agent.router import LEAST_RETRY_S, Here, There, route
from device_agent.scheduler import Forecast
from device_agent.values import Cloud, InferenceRequest, Local, Reason, Shed

NOW = 100.0


def here(expected: float = 0.01, safe: float | None = None, idle: bool = False, ready: bool = True) -> Here:
    safe = expected * 1.3 if safe is None else safe
    return Here(
        forecast=Forecast(expected_at=NOW + expected, safe_at=NOW + safe, idle=idle),
        worker_ready=ready,
        queue_full=False,
    )


def there(expected: float = 0.02) -> There:
    return There(endpoint="c", expected_s=expected, safe_s=expected * 1.5)


def decide(within: float | None, at: Here, cloud: There | None = None, local_only: bool = False) -> object:
    deadline = None if within is None else NOW + within
    return route(now=NOW, deadline_at=deadline, local_only=local_only, here=at, there=cloud)


def test_reasons_of_the_common_cases() -> None:
    assert decide(None, here(9.0), there()) == Local(Reason.NO_DEADLINE)
    assert decide(0.1, here(0.01, idle=True), there()) == Local(Reason.IDLE)
    assert decide(0.1, here(0.05), there()) == Local(Reason.IN_TIME)
    assert decide(0.1, here(0.2), there()) == Cloud(Reason.PREDICTED_LATE, "c")
    assert isinstance(decide(0.1, here(0.2), there(), local_only=True), Shed)
    assert isinstance(decide(0.1, here(0.2), None), Shed)
    assert decide(0.1, here(0.09, safe=0.11), None) == Local(Reason.CLOUD_UNAVAILABLE)
    assert decide(0.1, here(ready=False), there()) == Cloud(Reason.WORKER_LOST, "c")
    assert decide(0.1, here(0.05, ready=False), None) == Local(Reason.WORKER_LOST)
    assert isinstance(decide(0.1, here(0.5, ready=False), None), Shed)
    assert decide(None, here(0.5, ready=False), None) == Local(Reason.WORKER_LOST)
    assert decide(-1.0, here(0.5), there()) == Shed(Reason.DEADLINE_PASSED, 0.5), "when it would be worth asking again"


def test_a_slow_cloud_takes_nothing_it_would_miss_as_well() -> None:
    assert decide(0.1, here(0.09, safe=0.12), there(0.5)) == Local(Reason.CLOUD_UNAVAILABLE)
    assert isinstance(decide(0.1, here(0.2), there(0.5)), Shed)


def test_a_full_queue_overflows_and_is_shed_without_a_cloud() -> None:
    full = Here(forecast=Forecast(expected_at=NOW + 5, safe_at=NOW + 6, idle=False), worker_ready=True, queue_full=True)
    assert decide(None, full, there()) == Cloud(Reason.QUEUE_FULL, "c")
    shed = decide(None, full, None)
    assert isinstance(shed, Shed) and shed.reason is Reason.QUEUE_FULL and shed.retry_after_s == 5.0


@given(
    within=st.floats(0.001, 1.0),
    expected=st.floats(0.0, 1.0),
    margin=st.floats(0.0, 0.5),
    cloud_s=st.none() | st.floats(0.0, 1.0),
    ready=st.booleans(),
    local_only=st.booleans(),
)
def test_decisions_follow_from_the_predictions(
    within: float, expected: float, margin: float, cloud_s: float | None, ready: bool, local_only: bool
) -> None:
    at = here(expected, expected + margin, ready=ready)
    cloud = None if cloud_s is None else There(endpoint="c", expected_s=cloud_s, safe_s=cloud_s * 1.5)
    decision = decide(within, at, cloud, local_only)
    cloud_makes_it = cloud_s is not None and not local_only and NOW + cloud_s <= NOW + within
    here_makes_it = NOW + expected <= NOW + within
    if isinstance(decision, Cloud):
        assert cloud_makes_it
    if isinstance(decision, Local):
        assert here_makes_it
    if isinstance(decision, Shed):
        assert not cloud_makes_it and not here_makes_it
        assert decision.retry_after_s > 0
    if local_only:
        assert not isinstance(decision, Cloud)


@given(
    within=st.none() | st.floats(-1.0, 1.0),
    expected=st.floats(0.0, 1.0),
    cloud_s=st.floats(0.0, 1.0),
    ready=st.booleans(),
    full=st.booleans(),
    local_only=st.booleans(),
)
def test_where_nothing_more_is_asked_nothing_more_would_matter(
    within: float | None, expected: float, cloud_s: float, ready: bool, full: bool, local_only: bool
) -> None:
    blind = Here(forecast=None, worker_ready=ready, queue_full=full)
    if blind.knows_enough(None if within is None else NOW + within):
        seeing = msgspec.structs.replace(blind, forecast=here(expected).forecast)
        assert decide(within, blind, None, local_only) == decide(within, seeing, there(cloud_s), local_only)
        assert isinstance(decide(within, blind, None, local_only), Local)
    else:
        assert within is not None or full or not ready


def request(deadline_at: float | None, size: int = 10) -> InferenceRequest:
    return InferenceRequest(
        request_id=1,
        model="m",
        body=b"x" * size,
        json_length=None,
        client_id=None,
        priority=0,
        deadline_at=deadline_at,
        local_only=False,
        arrived_at=NOW,
        cost_hint_bytes=size,
    )


def test_admission_refuses_only_what_no_route_could_mend() -> None:
    quiet = Load(draining=False, in_flight_bytes=0, in_flight_limit_bytes=100)
    assert admit(request(None), NOW, quiet) == Admit()
    assert admit(request(None, 1000), NOW, quiet) == Admit(), "one request alone may exceed the limit"
    assert admit(request(NOW - 1), NOW, quiet) == Shed(Reason.DEADLINE_PASSED, LEAST_RETRY_S)
    busy = Load(draining=False, in_flight_bytes=95, in_flight_limit_bytes=100)
    assert isinstance(refused := admit(request(None), NOW, busy), Shed) and refused.reason is Reason.QUEUE_FULL
    stopping = Load(draining=True, in_flight_bytes=0, in_flight_limit_bytes=100)
    assert isinstance(refused := admit(request(None), NOW, stopping), Shed) and refused.reason is Reason.DRAINING
