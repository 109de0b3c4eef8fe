"""When a bundle on trial for another's place may have it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from device_agent.probation import Batch, Conduct, breach
from device_agent.trial import (
    LEAST_DISAGREED,
    LUCK,
    MAX_DISAGREEMENT,
    Seen,
    TrialRules,
    Verdict,
    allowed_disagreement,
    chance_of,
    compare,
    judge,
)

RULES = TrialRules(shadow_share=1.0, requests=200, lasts_s=60.0)
FLAWLESS = Conduct()
FAILING = Conduct.of([Batch(answers=1, failures=1, busy_s=0.01, expected_s=0.01)] * 5)
shares = st.floats(0.0, 1.0)


def seen(compared: int, disagreed: int) -> Seen:
    return Seen(answers=compared, compared=compared, disagreed=disagreed)


def test_a_phase_ends_after_its_answers_or_its_time() -> None:
    assert judge(RULES, seen(199, 0), 59.9, FLAWLESS, FLAWLESS) == Verdict()
    assert judge(RULES, seen(200, 0), 1.0, FLAWLESS, FLAWLESS) == Verdict(over=True)
    assert judge(RULES, Seen(), 60.0, FLAWLESS, FLAWLESS) == Verdict(over=True), (
        "without traffic nothing speaks against"
    )
    assert TrialRules(canary_share=0.1).phases == ("canary",)
    assert TrialRules(shadow_share=0.5, canary_share=0.1).phases == ("shadow", "canary") and not TrialRules().phases


def test_a_disagreement_that_luck_explains_waits_for_the_end() -> None:
    assert judge(RULES, seen(60, 5), 1.0, FLAWLESS, FLAWLESS) == Verdict(), "8 %, but of few"
    assert "5 of 60 rows got another label (8.3%); allowed 5.0%" in str(
        judge(RULES, seen(60, 5), 60.0, FLAWLESS, FLAWLESS).reason
    )
    assert judge(RULES, seen(10, 5), 1.0, FLAWLESS, FLAWLESS).reason is not None, "half of them is no luck"
    assert judge(RULES, seen(10, LEAST_DISAGREED - 1), 60.0, FLAWLESS, FLAWLESS).reason is None, "too few to judge by"
    assert judge(RULES, seen(200, 10), 60.0, FLAWLESS, FLAWLESS).reason is None, "just what is allowed"


def test_where_none_is_allowed_the_first_one_ends_it() -> None:
    strict = TrialRules(shadow_share=1.0, max_disagreement=0.0)
    assert judge(strict, seen(100, 1), 1.0, FLAWLESS, FLAWLESS).reason is not None


def test_it_is_held_against_the_other_bundle_of_the_same_time() -> None:
    assert "error rate" in str(judge(RULES, seen(5, 0), 1.0, FAILING, FLAWLESS).reason)
    assert judge(RULES, seen(5, 0), 1.0, FAILING, FAILING) == Verdict(), "that one did no better"


def test_what_the_contracts_allow_is_allowed() -> None:
    assert allowed_disagreement(None, ()) == MAX_DISAGREEMENT
    assert allowed_disagreement(None, (0.98, 0.99)) == MAX_DISAGREEMENT
    assert math.isclose(allowed_disagreement(None, (0.9, 0.95)), 0.15)
    assert allowed_disagreement(0.0, (0.9, 0.95)) == 0.0


def test_rows_are_compared_by_label() -> None:
    assert compare(("a", "b", "a"), ("a", "a", "a")) == (3, 1)
    assert compare(None, ("a",)) == compare(("a",), None) == compare(("a", "b"), ("a",)) == (0, 0)


@given(st.integers(0, 60), st.integers(0, 60), shares)
def test_the_chance_is_the_binomial_distributions(hits: int, more: int, share: float) -> None:
    tries = hits + more
    exact = sum(math.comb(tries, k) * share**k * (1 - share) ** (tries - k) for k in range(hits, tries + 1))
    assert math.isclose(chance_of(hits, tries, share), exact, rel_tol=1e-6, abs_tol=1e-12)


@given(
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 500),
    st.floats(0.0, 120.0),
    st.builds(TrialRules, requests=st.integers(1, 400), lasts_s=st.floats(0.1, 60.0), max_disagreement=shares),
    st.sampled_from((FLAWLESS, FAILING)),
    st.sampled_from((FLAWLESS, FAILING)),
)
def test_a_verdict_has_its_reason(
    answers: int, agreed: int, disagreed: int, elapsed_s: float, rules: TrialRules, now: Conduct, before: Conduct
) -> None:
    known = Seen(answers=answers, compared=agreed + disagreed, disagreed=disagreed)
    verdict = judge(rules, known, elapsed_s, now, before)
    over = answers >= rules.requests or elapsed_s >= rules.lasts_s
    assert verdict.over == (over or verdict.reason is not None)
    share = known.disagreement or 0.0
    broken = breach(now, before) is not None
    if verdict.reason is not None and not broken:
        assert share > rules.max_disagreement
        assert over or chance_of(disagreed, known.compared, rules.max_disagreement) < LUCK
    if broken or (over and share > rules.max_disagreement and disagreed >= LEAST_DISAGREED):
        assert verdict.reason is not None
