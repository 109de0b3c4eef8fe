"""When a swapped bundle has to give its place back."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from device_agent.learning import Learning
from device_agent.probation import (
    LEAST_BATCHES,
    LEAST_ERRORS,
    LEAST_SLOW,
    MOST_ERRORS,
    SLACK_S,
    SLOWER,
    WINDOW,
    Batch,
    Conduct,
    breach,
)
from device_agent.rehearsal import rehearsal_batch
from device_agent.service_time import ServiceTime
from device_agent.track_record import TrackRecord

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
    record.lost(3)
    assert record.conduct.failures == 3
    record.watch((ServiceTime.prior(0.01),), lambda: told.append(record.conduct.failures))
    assert record.conduct == FLAWLESS, "what was before is another bundle's business"
    record.lost(2)
    record.lost(1)
    record.unwatch()
    record.lost(1)
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
