"""The breaker, by its promises, under any history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from device_agent.breaker import Breaker, BreakerRule

RULE = BreakerRule(failures=3, backoff_s=1.0, backoff_max_s=8.0)


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(rule=RULE)
    for _ in range(3):
        breaker = breaker.failed(at, 0.5)
    return breaker


def test_opens_after_the_configured_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker(rule=RULE).failed(0.0, 0.5).failed(0.0, 0.5)
    assert breaker.allows()
    assert breaker.succeeded().failed(0.0, 0.5).failed(0.0, 0.5).allows(), "a success starts the count anew"
    assert not breaker.failed(0.0, 0.5).allows()


def test_half_open_lets_one_request_through_at_a_time() -> None:
    breaker = opened().checked()
    assert breaker.allows()
    assert not breaker.sent().allows()
    assert breaker.sent().abandoned().allows()
    assert breaker.sent().succeeded().state == "closed"


def test_pauses_double_up_to_the_limit_until_a_request_succeeds() -> None:
    breaker, pauses, now = opened(), [], 0.0
    for _ in range(6):
        assert breaker.check_at is not None
        pauses.append(breaker.check_at - now)
        now = breaker.check_at
        breaker = breaker.failed(now, 0.5)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert breaker.checked().sent().succeeded() == Breaker(rule=RULE)


def test_stragglers_do_not_prolong_the_pause() -> None:
    breaker = opened()
    assert breaker.failed(0.1, 0.9) is breaker


@given(st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "checked", "sent", "abandoned"]), st.floats(0, 5))))
def test_any_history_keeps_the_invariants(history: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(rule=RULE), 0.0
    for action, pause in history:
        now += pause
        if action == "sent" and not breaker.allows():
            continue
        before = breaker
        breaker = breaker.failed(now, 0.3) if action == "failed" else getattr(breaker, action)()
        assert (breaker.check_at is not None) == (breaker.state == "open")
        assert breaker.allows() or breaker.state != "closed"
        assert not (breaker.state == "open" and breaker.allows())
        if before.state == "open" and breaker.state == "closed":
            raise AssertionError("an open breaker closed without a half-open request")
