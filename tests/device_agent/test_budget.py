"""Budgets: never more than a day's worth in a day, whatever is spent, given back, saved, killed and restored."""

from __future__ import annotations

import asyncio
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent import budget_file
from device_agent.budget import DAY_S, GRAIN_S, Budget, Spending
from device_agent.budget_book import AHEAD, BudgetBook, Limit
from device_agent.budget_file import SavedBudget, SavedBudgets, restore

STEPS = st.lists(
    st.tuples(
        st.sampled_from(("spend", "spend", "give back", "restart")),
        st.floats(0.01, 60.0),
        st.one_of(st.just(0.0), st.floats(0.0, 3 * GRAIN_S), st.floats(0.0, 1.2 * DAY_S)),
    ),
    max_size=60,
)


def within_a_day(spent: list[tuple[float, float]]) -> float:
    """The most that was spent in any 24 hours: one begins with each spending."""
    return max((sum(amount for at, amount in spent if start <= at < start + DAY_S) for start, _ in spent), default=0.0)


@given(STEPS, st.floats(-1e6, 1e6))
def test_no_24_hours_see_more_than_a_days_worth(steps: list[tuple[str, float, float]], now: float) -> None:
    budget, spent = Budget(per_day=100.0), []
    for what, amount, wait_s in steps:
        now += wait_s
        if what == "spend" and budget.affords(amount, now):
            budget = budget.spend(amount, now)
            spent.append((now, amount))
        elif what == "give back" and spent:
            at, of_it = spent.pop()
            unused = min(amount, of_it)
            budget = budget.give_back(unused, at, now)
            spent.append((at, of_it - unused))
        assert within_a_day(spent) <= 100.0 * (1 + 1e-6)
        assert len(budget.spendings) <= DAY_S / GRAIN_S + 1
    assert budget.affords(100.0, now + DAY_S + GRAIN_S), "a day later all of it is there again"


@given(
    st.integers(1, 1000),
    st.floats(0, 1e7),
    st.lists(st.tuples(st.integers(0, 600), st.floats(0, DAY_S / 3)), min_size=1, max_size=60),
)
def test_tokens_come_back_when_it_was_said_and_within_a_day_and_a_quarter(
    limit: int, now: float, steps: list[tuple[int, float]]
) -> None:
    budget = Budget(per_day=limit)
    for amount, gap in steps:
        now += gap
        wait_s = budget.wait_s(amount, now)
        if amount > limit:
            assert wait_s == math.inf
            continue
        assert wait_s <= DAY_S + GRAIN_S
        if wait_s > 1:
            assert budget.wait_s(amount, now + wait_s - 1) > 0, "not sooner than said"
        now += wait_s + 1e-3
        assert budget.wait_s(amount, now) == 0 and budget.affords(amount, now)
        budget = budget.spend(amount, now)


def test_a_whole_days_worth_may_go_at_once_and_fractions_add_up() -> None:
    budget = Budget(per_day=0.3)
    for _ in range(3):
        assert budget.affords(0.1, 5.0)
        budget = budget.spend(0.1, 5.0)
    assert not budget.affords(0.1, DAY_S) and budget.affords(0.3, DAY_S + GRAIN_S)


def test_over_a_reboot_the_wall_clock_tells_how_long_it_was_and_never_runs_backwards() -> None:
    gone = (Spending(back_at=90_000.0, amount=7.0),)
    endpoints = {"c": {"requests": SavedBudget(spendings=gone)}}
    saved = SavedBudgets(boot_id="a", saved_at=10_000.0, saved_unix_s=1e9, endpoints=endpoints)

    def back_in(boot_id: str, now: float, unix_s: float) -> float | None:
        spendings = restore(saved, boot_id=boot_id, now=now, unix_s=unix_s)["c"]["requests"].spendings
        return spendings[0].back_at - now if spendings else None

    assert back_in("a", 20_000.0, 0.0) == 70_000.0, "the same boot: whatever the wall clock says"
    assert back_in("b", 5.0, 1e9 + 10_000.0) == 70_000.0
    assert back_in("b", 5.0, 5.0) == 80_000.0, "a clock that was set back: as if no time had passed"
    assert back_in("b", 5.0, 1e9 + 90_000.0) is None


class Clock:
    """Time that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def book(clock: Clock, **limits: float) -> BudgetBook:
    each = {name: Limit(per_day=limit) for name, limit in limits.items()}
    return BudgetBook({"c": each}, clock, wall=lambda: 1e9 + clock.now)


async def spend(of: BudgetBook, times: int, amount: float = 1.0) -> int:
    return sum([await of.spend("c", {"requests": amount}) for _ in range(times)])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((0, 1, 40, 250)), st.booleans(), st.floats(0, DAY_S / 2)), max_size=4))
def test_an_agent_that_is_killed_or_stopped_goes_on_with_what_is_left(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, bool, float]]
) -> None:
    folder, clock, spent = tmp_path_factory.mktemp("state"), Clock(), []

    async def main() -> None:
        for tries, killed, wait_s in lives:
            clock.now += wait_s
            agent = book(clock, requests=250)
            agent.open(folder)
            before = agent.left("c", "requests")
            done = 0
            for _ in range(tries):
                clock.now += wait_s / 40  # what is spent long after the file was written is gone as long
                if await agent.spend("c", {"requests": 1.0}):
                    spent.append((clock.now, 1.0))
                    done += 1
            assert before is not None and done >= min(tries, int(before + 1e-6))
            if not killed:
                await agent.close()
        assert within_a_day(spent) <= 250

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # a killed process leaves its pages to the kernel
        asyncio.run(main())


def test_a_kill_loses_a_hundredth_at_most_and_little_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writings: list[SavedBudgets] = []
    write = budget_file.write
    monkeypatch.setattr(budget_file, "write", lambda path, saved: (writings.append(saved), write(path, saved)))

    async def main() -> None:
        agent = book(clock := Clock(), requests=10_000)
        agent.open(tmp_path)
        assert await spend(agent, 5_000) == 5_000
        after_kill, stopped = book(clock, requests=10_000), book(clock, requests=10_000)
        after_kill.open(tmp_path)
        left = after_kill.left("c", "requests")
        assert left is not None and 5_000 - AHEAD * 10_000 <= left <= 5_000
        assert len(writings) <= 102
        await agent.close()
        stopped.open(tmp_path)
        assert stopped.left("c", "requests") == 5_000

    asyncio.run(main())


def test_a_kill_takes_nothing_from_a_budget_that_is_written_with_every_request(tmp_path: Path) -> None:
    async def main() -> None:
        for _ in range(3):
            agent = book(Clock(), requests=3)
            agent.open(tmp_path)
            assert await spend(agent, 1) == 1
        assert await spend(agent, 1) == 0

    asyncio.run(main())


def test_at_once_no_more_than_there_is_and_none_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[float] = []
    write = budget_file.write

    def seen(path: Path, saved: SavedBudgets) -> None:
        write(path, saved)
        on_disk.append(sum(gone.amount for gone in saved.endpoints["c"]["requests"].spendings))

    monkeypatch.setattr(budget_file, "write", seen)
    sent = 0

    async def one(agent: BudgetBook) -> bool:
        nonlocal sent
        paid = await agent.spend("c", {"requests": 1.0})
        sent += paid
        assert not paid or sent <= on_disk[-1], "what left is in the file"
        return paid

    async def main() -> None:
        agent = book(Clock(), requests=20)
        agent.open(tmp_path)
        assert sum(await asyncio.gather(*(one(agent) for _ in range(100)))) == 20
        await agent.close()

    asyncio.run(main())


def test_a_damaged_file_counts_as_all_spent_and_a_full_disk_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        (tmp_path / budget_file.NAME).write_bytes(b"{")
        agent = book(clock := Clock(), requests=5)
        agent.open(tmp_path)
        assert await spend(agent, 1) == 0 and "delete the file" in caplog.text
        clock.now += DAY_S + GRAIN_S
        assert await spend(agent, 1) == 1
        (tmp_path / budget_file.NAME).unlink()
        (tmp_path / budget_file.NAME).mkdir()  # can't be replaced
        caplog.clear()
        assert await spend(agent, 9) == 4
        assert caplog.text.count("can't be written") == 1

    with caplog.at_level(logging.ERROR, "device_agent.cloud"):
        asyncio.run(main())


def test_an_endpoint_that_is_taken_out_for_a_while_finds_its_spendings_again(tmp_path: Path) -> None:
    async def main() -> None:
        agent = book(clock := Clock(), requests=5)
        agent.open(tmp_path)
        await spend(agent, 5)
        await agent.close()
        other = BudgetBook({"other": {"requests": Limit(per_day=1.0)}}, clock)
        other.open(tmp_path)
        await other.spend("other", {"requests": 1.0})
        await other.close()
        again = book(clock, requests=6, bytes=10)
        again.open(tmp_path)
        assert again.left("c", "requests") == 1 and again.left("c", "bytes") == 10

    asyncio.run(main())
