"""The demo judges itself by pure functions; these say how."""

from __future__ import annotations

import dataclasses
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.cli.demo import dataset, processes
from aios_edge.cli.demo.acts import Workshop, make_bundles, with_pruned
from aios_edge.cli.demo.dataset import TEST_ROWS, VALIDATION_ROWS, Row, split
from aios_edge.cli.demo.load import Outcome, poisson_schedule
from aios_edge.cli.demo.plan import FAST
from aios_edge.cli.demo.score import emulation_slowdown, quantile, score
from aios_edge.cli.demo.summary import Summary, misses, remedy
from aios_edge.errors import AiosEdgeError

OFFLINE = {"local": ("positive", "negative"), "cloud": ("positive", "positive")}


def answered(text: int, route: str, label: str, latency_s: float = 0.1) -> Outcome:
    return Outcome(text=text, status="answered", latency_s=latency_s, label=label, route=route, reason="idle")


def test_every_kind_of_miss_counts_against_all_offered() -> None:
    outcomes = [
        answered(0, "local", "positive"),
        answered(1, "cloud", "positive"),
        answered(1, "local", "positive"),  # offline, the local model says negative here
        answered(0, "local", "positive", latency_s=0.6),
        Outcome(text=0, status="shed", latency_s=0.01),
        Outcome(text=0, status="failed", latency_s=0.01, reason="boom"),
        answered(0, "nowhere", "positive"),  # a route nobody knows is not a hit
    ]
    result = score(outcomes, 0.5, OFFLINE)
    assert (result.offered, result.admitted, result.shed, result.failed) == (7, 6, 1, 1)
    assert (result.late, result.wrong, result.hit) == (1, 2, 2)
    assert result.hit_rate == pytest.approx(2 / 7)
    assert result.cloud_share == pytest.approx(1 / 7)


@given(st.floats(5, 200), st.integers(0, 1000))
def test_poisson_departures_are_ordered_within_the_run_and_repeatable(rate: float, seed: int) -> None:
    schedule = poisson_schedule(rate, 2.0, seed)
    assert schedule == poisson_schedule(rate, 2.0, seed)
    assert all(0 <= earlier <= later < 2.0 for earlier, later in itertools.pairwise(schedule))


def test_poisson_rate_is_the_one_asked_for() -> None:
    assert len(poisson_schedule(50.0, 200.0, 1)) == pytest.approx(10_000, rel=0.05)


def test_split_has_no_sentence_on_two_sides_and_ignores_order() -> None:
    rows = [Row(f"Sentence number {i}", "positive") for i in range(TEST_ROWS + VALIDATION_ROWS + 50)]
    rows.append(Row("sentence  NUMBER 3", "positive"))  # the same but for case and white space
    splits = split(rows)
    assert {row.text.lower().split()[2] for row in splits.test} == {
        row.text.lower().split()[2] for row in split(rows[::-1]).test
    }
    folded = [
        " ".join(row.text.lower().split()) for part in (splits.train, splits.validation, splits.test) for row in part
    ]
    assert len(folded) == len(set(folded)) == TEST_ROWS + VALIDATION_ROWS + 50
    assert (len(splits.test), len(splits.validation), len(splits.train)) == (TEST_ROWS, VALIDATION_ROWS, 50)


def test_emulated_device_leaves_the_cloud_room() -> None:
    slowdown = emulation_slowdown(local_per_s=120.0, cloud_per_s=60.0, overflow_factor=3.0, utilisation=0.35)
    overflow = (3.0 - 0.9) * 120.0 / slowdown
    assert overflow <= 0.35 * 60.0 * 1.001
    assert emulation_slowdown(10.0, 1000.0, 3.0, 0.35) == 2.0


@given(st.lists(st.floats(0, 1), min_size=1), st.floats(0, 1))
def test_quantile_is_one_of_the_values(values: list[float], share: float) -> None:
    assert quantile(values, share) in values


GOOD = Summary(
    profile="x86-gateway",
    candidate="dynamic-s8",
    test_accuracy=0.84,
    fp32_size_bytes=91_000_000,
    size_bytes=23_000_000,
    speedup=2.0,
    accuracy_drop=0.002,
    agreement=0.99,
    deadline_s=0.2,
    emulated_slowdown=10.0,
    offered=1000,
    admitted=990,
    shed=10,
    cloud_share=0.6,
    deadline_hit_rate_with_cloud=0.98,
    deadline_hit_rate_without_cloud=0.4,
    breaker_opened_s=0.3,
    worker_killed_in_flight=12,
    worker_lost_requests=0,
    worker_recovered_s=0.9,
    energy_j_per_inference=None,
    energy_method=None,
    mqtt_messages=20,
    wall_s=300.0,
    fast=False,
)


def test_a_good_run_misses_nothing() -> None:
    assert misses(GOOD) == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test_accuracy", 0.82),
        ("accuracy_drop", 0.011),
        ("size_bytes", 30_000_000),
        ("speedup", None),
        ("speedup", 0.99),
        ("cloud_share", 0.39),
        ("cloud_share", 0.91),
        ("deadline_hit_rate_with_cloud", 0.96),
        ("shed", 31),
        ("deadline_hit_rate_without_cloud", 0.9),
        ("breaker_opened_s", None),
        ("worker_recovered_s", 3.2),
        ("worker_lost_requests", 1),
    ],
)
def test_each_promise_of_the_demo_can_be_missed(field: str, value: float | None) -> None:
    (miss,) = misses(dataclasses.replace(GOOD, **{field: value}))
    assert miss.promise == field


def test_a_cpu_with_8_bit_dot_products_is_held_to_more_speed() -> None:
    vnni = dataclasses.replace(GOOD, profile="x86-vnni")
    (miss,) = misses(dataclasses.replace(vnni, speedup=2.4))
    assert miss.promise == "speedup" and "2.5 was promised on x86-vnni" in miss.said
    assert misses(dataclasses.replace(vnni, speedup=2.6)) == ()
    assert misses(dataclasses.replace(vnni, speedup=2.0, fast=True)) == ()  # it may have shipped fp32


PRUNED = dataclasses.replace(GOOD, candidate="l6-h4-f512-v30522+dynamic-s8-e4", structured=True, pruned=True)
WHY = "l6-h4-f512-v30522+dynamic-s8-e4 misses max_drop by 0.4 pt"
NOT_PRUNED = dataclasses.replace(GOOD, structured=True, not_pruned=WHY)


def test_who_asks_for_a_pruned_network_gets_one_or_a_broken_promise() -> None:
    assert misses(PRUNED) == ()
    (miss,) = misses(NOT_PRUNED)
    assert miss.promise == "structured" and WHY in miss.said
    assert "when it is quiet" not in remedy((miss,))
    assert misses(dataclasses.replace(NOT_PRUNED, fast=True)) == ()  # it trains too little to promise that


def test_only_a_pruned_network_may_lose_more() -> None:
    worse = {"accuracy_drop": 0.015, "test_accuracy": 0.825}
    assert misses(dataclasses.replace(PRUNED, **worse)) == ()
    for fast, missed in ((False, ["structured", "test_accuracy", "accuracy_drop"]), (True, ["accuracy_drop"])):
        found = misses(dataclasses.replace(NOT_PRUNED, fast=fast, **worse))
        assert [miss.promise for miss in found] == missed


def exported(*candidates: tuple[str, str]) -> dict[str, Any]:
    """A report in which the first of (name, reason) is chosen."""
    entries = [
        {"name": name, "chosen": not at, "reason": reason, "structure": {"heads": 4} if "+" in name else None}
        for at, (name, reason) in enumerate(candidates)
    ]
    return {"profiles": {"x86-gateway": {"candidates": entries}}}


def test_the_pruned_network_is_served_where_it_was_chosen_and_else_the_whole_one_of_the_stricter_export() -> None:
    plain = Workshop(
        report=exported(("dynamic-s8", "is the fastest")), profile="x86-gateway", folder=Path("export"), sentences=()
    )
    small, whole = "l6-h4-f512-v30522+dynamic-s8-e4", "dynamic-s8"
    found = with_pruned(plain, exported((small, "is the fastest"), (whole, "is slower")), Path("structured"))
    assert found.bundle("x86-gateway") == Path("structured/x86-gateway") and found.not_pruned is None
    assert found.chosen("x86-gateway")["name"] == small
    found = with_pruned(plain, exported((whole, "is the fastest"), (small, "misses [it]")), Path("structured"))
    assert found.bundle("x86-gateway") == Path("export/x86-gateway") and found.report is plain.report
    assert found.not_pruned == f"{small} misses [it]"


#: Stands for the command: the second export breaks a promise, or fails.
COMMAND = """
import json, sys
command, *arguments = sys.argv[1:]
if command == "profiles":
    print('{{"name": "x86-gateway"}}')
elif "structured.toml" in arguments[0]:
    print(json.dumps({printed}))
    sys.exit({exits})
else:
    print(json.dumps({report}))
"""


@pytest.fixture
def workshop_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], int], Workshop]:
    """The bundles of ``demo --structured`` where the export with ``[prune]`` prints a document and exits so."""
    rows = [Row(f"Sentence number {i}", "positive") for i in range(TEST_ROWS + VALIDATION_ROWS + 50)]
    monkeypatch.setattr(dataset, "read_package", lambda: rows)

    def make(printed: dict[str, Any], exits: int) -> Workshop:
        program = COMMAND.format(printed=printed, exits=exits, report=exported(("dynamic-s8", "is the fastest")))
        monkeypatch.setattr(processes, "CLI", (sys.executable, "-c", program))
        return make_bundles(FAST, tmp_path, "package:model", structured=True)

    return make


@pytest.mark.parametrize("reported", [True, False])
def test_a_pruned_network_that_breaks_a_promise_after_the_choice_leaves_the_whole_one(
    workshop_of: Callable[[dict[str, Any], int], Workshop], reported: bool
) -> None:
    """On the test split, say: there is a report then, and else what broke."""
    why = "[accuracy_drop] x86-gateway: l6-h4-f512-v30522+dynamic-s8-e4 loses 3.1 points on the test split"
    report = exported(("l6-h4-f512-v30522+dynamic-s8-e4", "is the fastest")) if reported else {"ok": False}
    found = workshop_of({**report, "error": why}, 3)
    assert found.not_pruned == why and found.structured is None
    assert found.chosen("x86-gateway")["name"] == "dynamic-s8"
    assert found.bundle("x86-gateway") == found.folder / "x86-gateway"


def test_an_export_with_pruning_that_fails_ends_the_demo(
    workshop_of: Callable[[dict[str, Any], int], Workshop],
) -> None:
    with pytest.raises(AiosEdgeError) as failed:
        workshop_of({}, 1)
    assert failed.value.exit_code == 1


def test_the_screen_says_that_nothing_was_pruned() -> None:
    console = pytest.importorskip("rich.console")
    from aios_edge.cli.demo.screen import Screen

    written = io.StringIO()
    Screen(console.Console(file=written, width=200)).not_pruned("l6-h4 misses [it]")
    assert "Not pruned: the whole network is served, though --structured asked: l6-h4 misses [it]" in written.getvalue()


def test_a_busy_machine_is_no_excuse_for_the_model() -> None:
    def said(**broken: object) -> str:
        return remedy(misses(dataclasses.replace(GOOD, **broken)))

    assert "busy" in said(worker_recovered_s=3.2) and "when it is quiet" in said(worker_recovered_s=3.2)
    assert "when it is quiet" not in said(test_accuracy=0.82)
    assert "when it is quiet" not in said(test_accuracy=0.82, worker_recovered_s=3.2)
