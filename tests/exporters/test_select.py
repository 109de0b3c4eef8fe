"""The choice: properties that hold for every set of candidates."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.profile import Budgets
from exporters.select import MIN_AGREEMENT, TIE, Figures, apart, select

share = st.one_of(st.none(), st.floats(0, 1))
size = st.one_of(st.none(), st.integers(1, 1000))
seconds = st.one_of(st.none(), st.floats(0.001, 1))


@st.composite
def candidates(draw: st.DrawFn) -> list[Figures]:
    brought = draw(st.sampled_from([(None,), (True, False)]))  # of one profile, some are brought or none is
    return [
        Figures(
            name=f"c{index}",
            is_fp32=draw(st.booleans()),
            drop=draw(st.one_of(st.none(), st.floats(-0.1, 0.1))),
            agreement=draw(share),
            size_bytes=draw(size),
            bundle_size_bytes=draw(size),
            latency_p50_s=draw(seconds),
            latency_p95_s=draw(seconds),
            speedup=draw(st.one_of(st.none(), st.floats(0.2, 8))),
            rss_bytes=draw(size),
            brought=draw(st.sampled_from(brought)),
        )
        for index in range(draw(st.integers(0, 5)))
    ]


budgets = st.builds(
    Budgets,
    latency_p95_s=st.one_of(st.none(), st.floats(0.001, 1)),
    memory_bytes=size,
    bundle_size_bytes=size,
)


def figures(name: str, **changes: object) -> Figures:
    base: dict[str, object] = {
        "is_fp32": False,
        "drop": 0.0,
        "agreement": 1.0,
        "size_bytes": 10,
        "bundle_size_bytes": 20,
    }
    timed = {"latency_p50_s": 0.01, "latency_p95_s": 0.01, "speedup": 2.0, "rss_bytes": 5}
    return Figures(name=name, **{**base, **timed, **changes})  # type: ignore[arg-type]


@given(candidates(), budgets, st.floats(0, 0.05), st.booleans())
def test_every_candidate_has_a_reason_and_the_winner_keeps_every_rule(
    found: list[Figures], limits: Budgets, max_drop: float, on_target: bool
) -> None:
    choice = select(found, limits, max_drop=max_drop, on_target=on_target)
    assert set(choice.reasons) == {c.name for c in found}
    if choice.chosen is None:
        assert choice.remedy
        assert choice.nearest in {c.name for c in found} or not found
        return
    winner = next(c for c in found if c.name == choice.chosen)
    assert winner.drop is not None and winner.drop <= max_drop + 1e-9
    assert winner.agreement is not None and winner.agreement >= MIN_AGREEMENT
    assert winner.size_bytes is not None and winner.bundle_size_bytes is not None
    assert limits.bundle_size_bytes is None or winner.bundle_size_bytes <= limits.bundle_size_bytes
    if on_target and winner.brought is False:
        assert "unmeasured on target" in choice.reasons[winner.name]
        assert all(c.brought is False or "keeps" not in choice.reasons[c.name] for c in found)
    elif on_target:
        assert winner.speedup is not None or winner.brought
        assert winner.is_fp32 or winner.speedup is None or winner.speedup >= 1
        assert winner.latency_p95_s is not None
        assert limits.latency_p95_s is None or winner.latency_p95_s <= limits.latency_p95_s
        assert limits.memory_bytes is None or (winner.rss_bytes is not None and winner.rss_bytes <= limits.memory_bytes)
    else:
        assert "unmeasured on target" in choice.reasons[choice.chosen]


@given(candidates(), budgets, st.floats(0, 0.05))
def test_off_target_speed_and_memory_play_no_part(found: list[Figures], limits: Budgets, max_drop: float) -> None:
    blind = [figures(c.name, is_fp32=c.is_fp32, drop=c.drop, agreement=c.agreement, size_bytes=c.size_bytes,
                     bundle_size_bytes=c.bundle_size_bytes, speedup=None) for c in found]  # fmt: skip
    one = select(found, limits, max_drop=max_drop, on_target=False)
    assert one.chosen == select(blind, limits, max_drop=max_drop, on_target=False).chosen


def test_the_fastest_wins_on_target_and_preference_elsewhere() -> None:
    found = [figures("first", latency_p50_s=0.02), figures("second", latency_p50_s=0.01)]
    assert select(found, Budgets(), max_drop=0.01, on_target=True).chosen == "second"
    assert select(found, Budgets(), max_drop=0.01, on_target=False).chosen == "first"


def test_a_tie_goes_to_the_smaller() -> None:
    close = 0.01 * (1 + TIE / 2)
    found = [figures("fast", size_bytes=20), figures("small", size_bytes=10, latency_p50_s=close)]
    assert select(found, Budgets(), max_drop=0.01, on_target=True).chosen == "small"


def test_slower_than_fp32_never_wins_but_fp32_may() -> None:
    found = [figures("int8", speedup=0.9), figures("fp32", is_fp32=True, speedup=0.95, latency_p50_s=0.012)]
    choice = select(found, Budgets(), max_drop=0.01, on_target=True)
    assert choice.chosen == "fp32"
    assert "slower than fp32" in choice.reasons["int8"]


def test_a_missing_metric_never_wins() -> None:
    found = [figures("blind", drop=None, agreement=None), figures("seen", drop=0.009)]
    assert select(found, Budgets(), max_drop=0.01, on_target=False).chosen == "seen"
    assert select(found[:1], Budgets(), max_drop=0.01, on_target=False).chosen is None


def test_when_none_is_left_the_nearest_says_what_would_have_to_give() -> None:
    found = [figures("far", drop=0.2), figures("near", drop=0.0137)]
    choice = select(found, Budgets(), max_drop=0.01, on_target=False)
    assert choice.chosen is None
    assert choice.nearest == "near"
    assert choice.remedy == "near misses max_drop by 0.37 pt; allow max_drop = 0.014"


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"drop": 0.02}, "accuracy_drop"),
        ({"drop": None}, "accuracy_drop"),
        ({"agreement": 0.5}, "agreement"),
        ({"size_bytes": None}, "size_bytes"),
        ({"bundle_size_bytes": 2000}, "bundle_size_bytes"),
        ({"latency_p95_s": 2.0}, "latency_p95_s"),
        ({"latency_p95_s": None}, "latency_p95_s"),
        ({"speedup": 0.5}, "speedup"),
        ({"rss_bytes": 2000}, "memory_bytes"),
        ({"rss_bytes": None}, "memory_bytes"),
        ({"drop": 0.02, "rss_bytes": 2000}, "accuracy_drop"),
    ],
)
def test_the_promise_that_the_nearest_candidate_breaks_is_named(changes: dict[str, object], promise: str) -> None:
    limits = Budgets(latency_p95_s=1.0, memory_bytes=1000, bundle_size_bytes=1000)
    found = [figures("near", **changes), figures("far", drop=0.9, agreement=0.1, rss_bytes=10**9)]
    choice = select(found, limits, max_drop=0.01, on_target=True)
    assert (choice.nearest, choice.broken) == ("near", promise)


def test_what_is_proposed_suffices() -> None:
    choice = select([figures("a", drop=0.0137)], Budgets(), max_drop=0.014, on_target=False)
    assert choice.chosen == "a"


@given(
    st.floats(1e-9, 0.5),
    st.floats(1e-6, 100),
    st.integers(2, 10**10),
    st.integers(2, 10**10),
)
def test_following_what_is_proposed_makes_the_candidate_eligible(
    drop: float, latency_s: float, rss_bytes: int, bundle_bytes: int
) -> None:
    found = [figures("a", drop=drop, latency_p95_s=latency_s, rss_bytes=rss_bytes, bundle_size_bytes=bundle_bytes)]
    tight = Budgets(latency_p95_s=latency_s / 2, memory_bytes=rss_bytes // 2, bundle_size_bytes=bundle_bytes // 2)
    remedy = select(found, tight, max_drop=0.0, on_target=True).remedy or ""
    asked = dict(re.findall(r"raise budgets\.(\w+) to ([0-9.]+)(?=,|$)", remedy))
    assert set(asked) == {"latency_p95_s", "memory_bytes", "bundle_size_bytes"}
    assert asked["memory_bytes"] == str(rss_bytes) and asked["bundle_size_bytes"] == str(bundle_bytes)
    raised = Budgets(
        latency_p95_s=float(asked["latency_p95_s"]),
        memory_bytes=int(asked["memory_bytes"]),
        bundle_size_bytes=int(asked["bundle_size_bytes"]),
    )
    (allowed,) = re.findall(r"allow max_drop = ([0-9.]+)", remedy)
    assert select(found, raised, max_drop=float(allowed), on_target=True).chosen == "a"
    assert float(asked["latency_p95_s"]) <= latency_s * 1.001  # no more than is needed


@pytest.mark.parametrize("figure", [float("inf"), float("nan")])
def test_a_figure_that_is_no_number_is_not_measured(figure: float) -> None:
    choice = select([figures("a", latency_p95_s=figure)], Budgets(latency_p95_s=0.1), max_drop=0.0, on_target=True)
    assert (choice.chosen, choice.broken) == (None, "latency_p95_s")
    assert choice.remedy == "a has no p95 latency measured; find out why"


def test_figures_of_numpy_are_numbers_like_others() -> None:
    found = [figures("a", latency_p95_s=np.float64(0.123456), rss_bytes=np.int64(123_456_789))]
    tight = Budgets(latency_p95_s=0.1, memory_bytes=1000)
    remedy = select(found, tight, max_drop=0.0, on_target=True).remedy or ""
    assert "raise budgets.latency_p95_s to 0.1235, raise budgets.memory_bytes to 123456789" in remedy


def test_a_limit_of_zero_reads_as_zero() -> None:
    assert apart(0.0025, 0.0, digits=4) == ("0.0025", "0.0000")
    assert apart(0.01004, 0.01, digits=4) == ("0.01004", "0.01000")


@pytest.mark.parametrize(
    ("bundle_bytes", "budget_bytes", "said"),
    [
        (208_949, 1000, "0.209 of 0.001 MB"),
        (208_949, 208_900, "0.20895 of 0.20890 MB"),
        (20_040_000, 20_000_000, "20.04 of 20.00 MB"),
        (31_234_567, 30_000_000, "31.2 of 30.0 MB"),
    ],
)
def test_two_figures_that_differ_never_read_alike(bundle_bytes: int, budget_bytes: int, said: str) -> None:
    found = [figures("a", bundle_size_bytes=bundle_bytes)]
    choice = select(found, Budgets(bundle_size_bytes=budget_bytes), max_drop=0.0, on_target=False)
    assert choice.reasons["a"] == f"misses the bundle size budget ({said})"


def test_brought_figures_choose_among_those_that_have_them() -> None:
    slow, quick = figures("slow", brought=True, latency_p50_s=0.02), figures("quick", brought=True, latency_p50_s=0.01)
    unknown = figures("unknown", brought=False, latency_p50_s=None, latency_p95_s=None, speedup=None, rss_bytes=None)
    choice = select([unknown, slow, quick], Budgets(), max_drop=0.01, on_target=True)
    assert choice.chosen == "quick" and "measured on the target" in choice.reasons["quick"]
    assert choice.reasons["unknown"].startswith("is unmeasured on target")
    late = [unknown, figures("late", brought=True, latency_p95_s=9.0)]
    assert select(late, Budgets(latency_p95_s=0.1), max_drop=0.01, on_target=True).chosen == "unknown"


def test_a_speed_up_that_was_not_brought_is_no_reason_to_lose_and_one_below_1_is() -> None:
    alone = figures("alone", brought=True, speedup=None)
    choice = select([alone], Budgets(), max_drop=0.01, on_target=True)
    assert choice.chosen == "alone" and choice.reasons["alone"].endswith("fp32 was not measured there")
    assert select([figures("here", speedup=None)], Budgets(), max_drop=0.01, on_target=True).chosen is None
    slower = select([figures("slower", brought=True, speedup=0.9)], Budgets(), max_drop=0.01, on_target=True)
    assert slower.chosen is None and slower.broken == "speedup"
