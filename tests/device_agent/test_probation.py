"""When a swapped bundle has to give its place back."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.device_state import DeviceState
from device_agent.learning import Learning
from device_agent.policy_in_force import PolicyInForce
from device_agent.probation import (
    LEAST_BATCHES,
    LEAST_ERRORS,
    LEAST_OTHERS,
    LEAST_SLOW,
    MOST_ERRORS,
    SLACK_S,
    SLOWER,
    WINDOW,
    Batch,
    Conduct,
    Part,
    breach,
)
from device_agent.rehearsal import rehearsal_batch
from device_agent.service_time import ServiceTime
from device_agent.settings import Policy
from device_agent.surroundings import STALE_S, Surroundings
from device_agent.track_record import TrackRecord
from device_agent.values import InferenceRequest, Reason
from device_agent.wire import Done, DoneItem
from device_agent.worker_pool import BatchResult

GOOD = Batch(answers=1, failures=0, busy_s=0.01, expected_s=0.01)
FAILED = Batch(answers=1, failures=1, busy_s=0.01, expected_s=0.01)
LOST = Batch(answers=1, failures=1, busy_s=None, expected_s=0.0)
SLOW = Batch(answers=1, failures=0, busy_s=0.2, expected_s=0.01)
FLAWLESS = Conduct()


def test_errors_break_it_when_they_are_more_than_one_clients_odd_inputs() -> None:
    few = [FAILED] * (LEAST_ERRORS - 1)
    assert breach(Conduct.of(few), FLAWLESS) is None
    assert "error rate: 5 of 5 answers failed (100%)" in str(breach(Conduct.of([*few, FAILED]), FLAWLESS))
    many_good = [GOOD] * 120
    assert breach(Conduct.of([*many_good, *few, FAILED]), FLAWLESS) is None, "less than the allowed share"


def test_a_worker_that_dies_is_an_error_and_no_measurement_of_time() -> None:
    conduct = Conduct.of([LOST] * LEAST_ERRORS)
    assert "error rate" in str(breach(conduct, FLAWLESS))
    assert (conduct.timed, conduct.p95_s) == (0, None)


def test_slowness_breaks_it_at_the_95th_percentile() -> None:
    for slow, verdict in ((5, False), (6, True)):
        now = Conduct.of([*[GOOD] * (100 - slow), *[SLOW] * slow])
        assert (breach(now, FLAWLESS) is not None) is verdict
    reason = str(breach(Conduct.of([SLOW] * LEAST_BATCHES), FLAWLESS))
    assert reason.startswith("p95 of compute time: 200 ms, where 10 ms was expected; 20 of 20 batches")


def test_of_few_batches_most_must_be_slow() -> None:
    """Who has a deadline is soon predicted late and sent elsewhere: a twentieth batch may never run."""
    some, more = [SLOW] * (LEAST_SLOW - 1), [SLOW] * LEAST_SLOW
    assert breach(Conduct.of(some), FLAWLESS) is None
    assert breach(Conduct.of(more), FLAWLESS) is not None
    assert breach(Conduct.of([*more, *[GOOD] * LEAST_SLOW]), FLAWLESS) is None, "half of them is not most"
    assert breach(Conduct.of([*some, *[GOOD] * (LEAST_BATCHES - len(some))]), FLAWLESS) is None


def test_what_should_take_long_may() -> None:
    long = Batch(answers=32, failures=0, busy_s=1.0, expected_s=0.6)
    assert breach(Conduct.of([long] * WINDOW), FLAWLESS) is None


def test_what_the_previous_bundle_did_no_better_does_not_count() -> None:
    before = Conduct.of([*[GOOD] * 60, *[FAILED] * 20, *[SLOW] * 20])
    assert breach(Conduct.of([*[GOOD] * 40, *[FAILED] * 40, *[SLOW] * 20]), before) is None
    assert breach(Conduct.of([*[GOOD] * 59, *[FAILED] * 41]), before) is not None


def test_only_the_last_batches_count() -> None:
    assert breach(Conduct.of([*[FAILED] * 50, *[GOOD] * WINDOW]), FLAWLESS) is None


@given(
    st.lists(
        st.builds(
            Batch,
            answers=st.just(4),
            failures=st.integers(0, 4),
            busy_s=st.none() | st.floats(0.0001, 2.0),
            expected_s=st.floats(0.0001, 2.0),
        ),
        max_size=300,
    )
)
def test_a_breach_is_always_beyond_a_threshold(batches: list[Batch]) -> None:
    last = batches[-WINDOW:]
    failures, answers = sum(batch.failures for batch in last), 4 * len(last)
    timed = [(batch.busy_s, batch.expected_s) for batch in last if batch.busy_s is not None]
    slow = sum(busy > SLOWER * expected + SLACK_S for busy, expected in timed)
    errors = failures >= LEAST_ERRORS and failures / answers > MOST_ERRORS
    slowness = slow >= LEAST_SLOW and slow / len(timed) > (0.05 if len(timed) >= LEAST_BATCHES else 0.5)
    assert (breach(Conduct.of(batches), FLAWLESS) is not None) == (errors or slowness)


def test_a_record_tells_of_bad_batches_only_while_it_is_watched() -> None:
    told: list[int] = []
    record = TrackRecord(Learning())
    asked = rehearsal_batch("tiny", (4, 4), pair=False, now=0.0)
    record.lost(asked)
    assert record.conduct.failures == 2
    record.watch((ServiceTime.prior(0.01),), lambda: told.append(record.conduct.failures))
    assert record.conduct == FLAWLESS, "what was before is another bundle's business"
    record.lost(asked)
    record.lost()
    record.unwatch()
    record.lost()
    assert told == [2, 3]


def test_what_a_slow_model_keeps_from_running_counts_where_it_would_have_been_in_time() -> None:
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=0.0)
    learning, frozen = Learning(), ServiceTime.prior(0.001)
    learning.begin(1.0)
    record = TrackRecord(learning)

    def turned_away(timeout_s: float) -> int:
        record.watch((frozen,), lambda: None)
        record.turned_away(msgspec.structs.replace(made, deadline_at=10.0 + timeout_s), 10.0)
        return record.conduct.slow

    assert turned_away(0.05) == 1
    assert turned_away(0.0001) == 0, "nobody would be in time"
    assert turned_away(2.0) == 0, "it was turned away for another reason"
    record.unwatch()
    record.turned_away(msgspec.structs.replace(made, deadline_at=10.05), 10.0)
    assert record.conduct.slow == 0


def of_tenants(*parts: Part, busy_s: float | None = 0.01) -> Batch:
    answers, failures = sum(part.answers for part in parts), sum(part.failures for part in parts)
    return Batch(answers=answers, failures=failures, busy_s=busy_s, expected_s=0.01, parts=parts)


def test_one_tenants_failures_alone_do_not_count_where_the_others_say_otherwise() -> None:
    odd, fine = of_tenants(Part("odd", 1, 1)), of_tenants(Part("fine", 1, 0))
    assert breach(Conduct.of([odd] * 50), FLAWLESS) is not None, "nobody else asks"
    assert breach(Conduct.of([*[odd] * 50, *[fine] * (LEAST_OTHERS - 1)]), FLAWLESS) is not None, "who else asks?"
    assert breach(Conduct.of([*[odd] * 50, *[fine] * LEAST_OTHERS]), FLAWLESS) is None
    second = of_tenants(Part("second", 1, 1))
    both = Conduct.of([*[odd] * 50, *[second] * 5, *[fine] * LEAST_OTHERS])
    assert "5 of 25 answers to all tenants but one failed (20%)" in str(breach(both, FLAWLESS))


def test_a_worker_that_one_tenant_kills_takes_others_along_whose_failures_do_not_count() -> None:
    killed = of_tenants(Part("odd", 1, 1), Part("fine", 3, 3), busy_s=None)
    fine = of_tenants(Part("fine", 4, 0))
    assert breach(Conduct.of([killed, of_tenants(Part("odd", 1, 1), busy_s=None), fine] * 20), FLAWLESS) is None
    assert breach(Conduct.of([of_tenants(Part("fine", 1, 1), busy_s=None), killed, fine] * 20), FLAWLESS) is not None


@given(
    st.lists(
        st.builds(
            of_tenants,
            st.sampled_from("abc").flatmap(
                lambda tenant: st.integers(1, 4).flatmap(
                    lambda count: st.integers(0, count).map(lambda failed: Part(tenant, count, failed))
                )
            ),
        ),
        max_size=120,
    )
)
def test_without_the_worst_tenant_nobody_is_worse(batches: list[Batch]) -> None:
    conduct = Conduct.of(batches)
    failed = dict.fromkeys("abc", 0)
    for batch in batches:
        for part in batch.parts:
            failed[part.tenant] += part.failures
    assert conduct.other_failures == sum(failed.values()) - max(failed.values())
    assert 0 <= conduct.other_failures <= conduct.other_answers <= conduct.answers


def answered(requests: list[InferenceRequest], status: int, busy_s: float = 0.01) -> BatchResult:
    items = tuple(DoneItem(request_id=request.request_id, status=status) for request in requests)
    return BatchResult(
        done=Done(batch_id=1, generation=1, busy_s=busy_s, rss_bytes=0, items=items), payload=memoryview(b"")
    )


def test_what_a_request_is_refused_for_is_no_failure_of_the_model() -> None:
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=0.0)
    own_tensors = msgspec.structs.replace(made, natural=False)

    def failures(request: InferenceRequest, status: int, *, copies: bool = False) -> int:
        record = TrackRecord(Learning())
        if copies:
            record.watch((ServiceTime.prior(0.01),), lambda: None, strict=True)
        record.answered([request], answered([request], status), 0.01)
        return record.conduct.failures

    assert [failures(made, status) for status in (200, 400, 422, 500, 504)] == [0, 0, 1, 1, 0]
    assert failures(own_tensors, 422) == 0, "its numbers may have been none before"
    assert failures(own_tensors, 500) == 1
    assert failures(made, 400, copies=True) == 1, "the other bundle answered the same"


def test_a_device_that_was_too_hot_says_nothing_about_time() -> None:
    requests = rehearsal_batch("tiny", (4,), pair=False, now=0.0)
    state: tuple[bool, float | None] = (False, 1.0)
    told: list[int] = []
    record = TrackRecord(Learning(), lambda: state)
    record.watch((ServiceTime.prior(0.001),), lambda: told.append(record.conduct.slow))

    def slow_batch() -> None:
        record.answered(requests, answered(requests, 200, busy_s=1.0), 0.001)

    slow_batch()
    assert record.conduct.slow == 0, "nobody knows yet"
    state = (True, 2.0)
    slow_batch()
    assert (record.conduct.slow, record.conduct.timed) == (0, 0), "it was hot all along"
    state = (False, 3.0)
    slow_batch()
    state = (False, 4.0)
    slow_batch()
    assert (record.conduct.slow, record.conduct.timed) == (1, 1) and told[-1] == 1
    record.lost(requests)
    assert record.conduct.failures == 1, "errors are errors"


def test_what_the_device_was_like_is_known_by_fresh_samples_only() -> None:
    state, at, reason, now = DeviceState(throttled=True), 5.0, None, 6.0
    around = Surroundings(
        rules=PolicyInForce(Policy()),
        cloud=CloudPool((), Policy(), lambda *_, **__: None),
        emit=lambda *_, **__: None,
        energy=lambda *_: Energy(energy_j=None, method="x"),
        strain=lambda: reason,
        device=lambda: (state, at),
        clock=lambda: now,
    )
    assert around.slowed() == (True, 5.0)
    state, reason = DeviceState(), Reason.HOT
    assert around.slowed() == (True, 5.0)
    reason = Reason.MEMORY_PRESSURE
    assert around.slowed() == (False, 5.0), "a model that needs more memory is not held back, it holds others back"
    state, now = DeviceState(throttled=True), 5.0 + STALE_S + 0.1
    assert around.slowed() == (False, None), "a sensor that hangs keeps nobody from being judged"
