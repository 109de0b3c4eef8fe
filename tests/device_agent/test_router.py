"""Where requests go, and the one property that matters: nobody is sent where the deadline can't be met, needlessly."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from device_agent.admission import Admit, Load, admit
from device_agent.device_state import STRAINS
from device_agent.router import KEPT_ANSWER_S, LEAST_RETRY_S, Here, Stage, There, route, second_opinion
from device_agent.scheduler import Forecast
from device_agent.values import Cloud, InferenceRequest, Local, Reason, Shed

NOW = 100.0


def here(
    expected: float = 0.01,
    safe: float | None = None,
    idle: bool = False,
    ready: bool = True,
    strain: Reason | None = None,
    stage: Stage = Stage.NEW,
    delays: bool = False,
) -> Here:
    safe = expected * 1.3 if safe is None else safe
    return Here(
        stage=stage,
        forecast=Forecast(expected_at=NOW + expected, safe_at=NOW + safe, idle=idle, delays=delays),
        worker_ready=ready,
        queue_full=False,
        strain=strain,
    )


def there(expected: float = 0.02) -> There:
    return There(endpoint="c", expected_s=expected, safe_s=expected * 1.5)


def decide(within: float | None, at: Here, cloud: There | None = None, local_only: bool = False) -> object:
    deadline = None if within is None else NOW + within
    return route(now=NOW, deadline_at=deadline, local_only=local_only, here=at, there=cloud)


def test_reasons_of_the_common_cases() -> None:
    assert decide(None, here(9.0), there()) == Local(Reason.NO_DEADLINE)
    assert decide(0.1, here(0.01, idle=True), there()) == Local(Reason.IDLE, safe=True)
    assert decide(0.1, here(0.05), there()) == Local(Reason.IN_TIME, safe=True)
    assert decide(0.1, here(0.2), there()) == Cloud(Reason.PREDICTED_LATE, "c")
    assert isinstance(decide(0.1, here(0.2), there(), local_only=True), Shed)
    assert isinstance(decide(0.1, here(0.2), None), Shed)
    assert decide(0.1, here(0.09, safe=0.11, idle=True), None) == Local(Reason.CLOUD_UNAVAILABLE), "it costs nobody"
    assert decide(0.1, here(ready=False), there()) == Cloud(Reason.WORKER_LOST, "c")
    assert decide(0.1, here(0.05, ready=False), None) == Local(Reason.WORKER_LOST)
    assert isinstance(decide(0.1, here(0.5, ready=False), None), Shed)
    assert decide(None, here(0.5, ready=False), None) == Local(Reason.WORKER_LOST)
    assert decide(-1.0, here(0.5), there()) == Shed(Reason.DEADLINE_PASSED, 0.5), "when it would be worth asking again"


def test_a_slow_cloud_takes_nothing_it_would_miss_as_well() -> None:
    assert decide(0.1, here(0.09, safe=0.12, idle=True), there(0.5)) == Local(Reason.CLOUD_UNAVAILABLE)
    assert isinstance(decide(0.1, here(0.2), there(0.5)), Shed)


def test_behind_others_who_is_not_surely_in_time_is_not_let_in() -> None:
    assert decide(0.1, here(0.09, safe=0.11), None) == Shed(Reason.CLOUD_UNAVAILABLE, LEAST_RETRY_S)


def test_who_would_make_another_late_is_not_let_in() -> None:
    assert decide(0.1, here(0.05, delays=True), None) == Shed(Reason.CLOUD_UNAVAILABLE, LEAST_RETRY_S)
    assert decide(0.1, here(0.05, delays=True), there()) == Cloud(Reason.PREDICTED_LATE, "c")
    assert isinstance(decide(0.1, here(0.05, delays=True), there(), local_only=True), Shed)


def test_who_was_let_in_waits_for_its_turn_and_runs_if_it_is_expected_in_time() -> None:
    assert decide(0.1, here(0.2, stage=Stage.WAITING), None) == Local(Reason.CLOUD_UNAVAILABLE), "others may leave"
    assert decide(0.1, here(0.2, stage=Stage.WAITING), there()) == Cloud(Reason.PREDICTED_LATE, "c")
    assert decide(0.1, here(0.09, safe=0.11, stage=Stage.NEXT), None) == Local(Reason.CLOUD_UNAVAILABLE)
    assert isinstance(decide(0.1, here(0.2, stage=Stage.NEXT), None), Shed)
    gone = decide(-0.1, here(0.2, stage=Stage.WAITING), None)
    assert isinstance(gone, Shed) and gone.reason is Reason.DEADLINE_PASSED


def test_a_full_queue_overflows_and_is_shed_without_a_cloud() -> None:
    full = Here(forecast=Forecast(expected_at=NOW + 5, safe_at=NOW + 6, idle=False), worker_ready=True, queue_full=True)
    assert decide(None, full, there()) == Cloud(Reason.QUEUE_FULL, "c")
    shed = decide(None, full, None)
    assert isinstance(shed, Shed) and shed.reason is Reason.QUEUE_FULL and shed.retry_after_s == 5.0


def test_a_device_that_is_to_be_spared_keeps_what_the_cloud_might_miss() -> None:
    hot = here(0.01, idle=True, strain=Reason.HOT)
    assert decide(None, hot, there(9.0)) == Cloud(Reason.HOT, "c")
    assert decide(0.1, hot, there(0.02)) == Cloud(Reason.HOT, "c")
    assert decide(0.1, hot, there(0.08)) == Local(Reason.IDLE, safe=True), (
        "the cloud is expected to make it, but not surely"
    )
    assert decide(0.1, hot, None) == Local(Reason.IDLE, safe=True)
    assert decide(0.1, hot, there(), local_only=True) == Local(Reason.LOCAL_ONLY, safe=True)
    assert decide(None, hot, there(), local_only=True) == Local(Reason.LOCAL_ONLY)
    late = here(0.2, strain=Reason.BATTERY_LOW)
    assert decide(0.1, late, there(0.08)) == Cloud(Reason.PREDICTED_LATE, "c")
    assert decide(0.1, here(ready=False, strain=Reason.HOT), there()) == Cloud(Reason.WORKER_LOST, "c")


FORECASTS = st.none() | st.builds(
    lambda expected, margin, idle: Forecast(expected_at=NOW + expected, safe_at=NOW + expected + margin, idle=idle),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.5),
    st.booleans(),
)
OFFERS = st.none() | st.builds(
    lambda expected, margin: There(endpoint="c", expected_s=expected, safe_s=expected + margin),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.5),
)
CLOUD_REASONS = {Reason.PREDICTED_LATE, Reason.WORKER_LOST, Reason.QUEUE_FULL, *STRAINS}


@given(
    within=st.none() | st.floats(-0.1, 1.0),
    local_only=st.booleans(),
    at=st.builds(
        Here,
        forecast=FORECASTS,
        worker_ready=st.booleans(),
        queue_full=st.booleans(),
        strain=st.none() | st.sampled_from(STRAINS),
    ),
    cloud=OFFERS,
)
def test_the_whole_table(within: float | None, local_only: bool, at: Here, cloud: There | None) -> None:
    deadline = None if within is None else NOW + within
    decision = route(now=NOW, deadline_at=deadline, local_only=local_only, here=at, there=cloud)
    if isinstance(decision, Cloud):
        assert cloud is not None and not local_only, "never without an offer, never what must stay"
        assert decision.endpoint == cloud.endpoint and decision.reason in CLOUD_REASONS
        assert deadline is None or NOW + cloud.expected_s <= deadline
        if decision.reason in STRAINS:
            assert decision.reason is at.strain and at.worker_ready and not at.queue_full
            assert deadline is None or NOW + cloud.safe_s <= deadline
    if isinstance(decision, Local):
        assert not at.queue_full and (at.forecast is not None or (deadline is None and at.worker_ready))
        assert deadline is None or (at.forecast is not None and at.forecast.expected_at <= deadline)
        assert decision.reason not in STRAINS
    if isinstance(decision, Shed):
        assert decision.retry_after_s > 0
    calm = Here(forecast=at.forecast, worker_ready=at.worker_ready, queue_full=at.queue_full)
    unstrained = route(now=NOW, deadline_at=deadline, local_only=local_only, here=calm, there=cloud)
    if unstrained != decision:
        assert isinstance(decision, Cloud) and decision.reason is at.strain, "strain only ever sends away"
    if cloud is None or local_only:
        assert decision == unstrained
        alone = route(now=NOW, deadline_at=deadline, local_only=local_only, here=at, there=None)
        assert decision == alone


@given(
    within=st.none() | st.floats(-0.1, 1.0),
    local_only=st.booleans(),
    confidence=st.none() | st.floats(0.0, 1.0),
    least=st.none() | st.floats(0.1, 1.0),
    cloud=OFFERS,
)
def test_a_second_opinion_is_asked_for_only_when_it_can_be_given_in_time(
    within: float | None, local_only: bool, confidence: float | None, least: float | None, cloud: There | None
) -> None:
    deadline = None if within is None else NOW + within
    asked = second_opinion(
        now=NOW, deadline_at=deadline, local_only=local_only, confidence=confidence, least=least, there=cloud
    )
    unsure = confidence is not None and least is not None and confidence < least
    in_time = cloud is not None and (deadline is None or NOW + cloud.safe_s <= deadline - KEPT_ANSWER_S)
    assert asked == (Cloud(Reason.LOW_CONFIDENCE, "c") if unsure and in_time and not local_only else None)


@given(
    within=st.floats(0.001, 1.0),
    expected=st.floats(0.0, 1.0),
    margin=st.floats(0.0, 0.5),
    cloud_s=st.none() | st.floats(0.0, 1.0),
    ready=st.booleans(),
    local_only=st.booleans(),
    stage=st.sampled_from(Stage),
    idle=st.booleans(),
    delays=st.booleans(),
)
def test_decisions_follow_from_the_predictions(
    within: float,
    expected: float,
    margin: float,
    cloud_s: float | None,
    ready: bool,
    local_only: bool,
    stage: Stage,
    idle: bool,
    delays: bool,
) -> None:
    at = here(expected, expected + margin, ready=ready, stage=stage, idle=idle, delays=delays)
    cloud = None if cloud_s is None else There(endpoint="c", expected_s=cloud_s, safe_s=cloud_s * 1.5)
    decision = decide(within, at, cloud, local_only)
    cloud_makes_it = cloud_s is not None and not local_only and NOW + cloud_s <= NOW + within
    here_makes_it = NOW + expected <= NOW + within
    safe = NOW + (expected + margin) <= NOW + within and not delays
    if isinstance(decision, Cloud):
        assert cloud_makes_it
    if isinstance(decision, Local):
        assert here_makes_it or (stage is Stage.WAITING and ready and not cloud_makes_it)
        if stage is Stage.NEW and ready and not cloud_makes_it:
            assert safe or (idle and not delays)
    if isinstance(decision, Shed):
        assert not cloud_makes_it and not (ready and safe)
        assert not (stage is Stage.WAITING and ready)
        assert not (here_makes_it and not delays and (stage is Stage.NEXT or idle or not ready))
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
    crowded = Load(draining=False, in_flight_bytes=5, in_flight_limit_bytes=100, crowded=True)
    assert isinstance(refused := admit(request(None), NOW, crowded), Shed) and refused.reason is Reason.QUEUE_FULL
    stopping = Load(draining=True, in_flight_bytes=0, in_flight_limit_bytes=100)
    assert isinstance(refused := admit(request(None), NOW, stopping), Shed) and refused.reason is Reason.DRAINING
