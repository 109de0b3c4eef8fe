"""Budgets of an endpoint, counted by the server that was asked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from cloud_server import ANSWER, GO, Server, drive, http, request, until, usable

from device_agent import budget_file
from device_agent.answer import Answer, Unanswered
from device_agent.cloud import CloudPool
from device_agent.cloud_choice import Wanted
from device_agent.values import Reason

Outcomes = list["Answer | Unanswered"]
SPENT = Unanswered(reason=Reason.BUDGET, endpoints=("c",))


async def ask(pool: CloudPool, times: int) -> Outcomes:
    return list(await asyncio.gather(*(pool.infer(GO, request(), "m") for _ in range(times))))


def answered(outcomes: Outcomes) -> int:
    assert all(isinstance(outcome, Answer) or outcome == SPENT for outcome in outcomes)
    return sum(isinstance(outcome, Answer) for outcome in outcomes)


def inferences(server: Server) -> list[bytes]:
    return [body for first, _, body in server.seen if first.startswith("POST")]


def test_requests_and_cost_end_with_their_budget_say_so_once_and_stay_spent(tmp_path: Path) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        assert answered(await ask(pool, 30)) == 7 and len(inferences(server)) == 7
        assert not usable(pool) and events.count("budget_exhausted") == 1
        kept = pool.unaffordable("m", Wanted(request_bytes=1), time.monotonic())
        assert kept is not None and kept.endpoint == "c"
        status = pool.endpoints["c"].status(time.monotonic())
        assert status.spent.requests == 7 and status.spent.cost == pytest.approx(0.7)
        assert status.budgets["requests"].left == 0 and status.budgets["cost"].left == pytest.approx(0.3)
        assert pool.endpoints["c"].breaker.failures == 0

    async def after_a_restart(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: pool.endpoints["c"].models["m"].usable)
        assert not usable(pool) and answered(await ask(pool, 3)) == 0 and not inferences(server)

    limits = {"requests_per_day": 7, "cost_per_request": 0.1, "cost_per_day": 1.0}
    drive(scenario, Server(), state_dir=tmp_path, **limits)
    drive(after_a_restart, Server(), state_dir=tmp_path, **limits)


def test_bytes_are_those_of_requests_and_answers_and_never_more() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        answer_bytes = len(http(200, ANSWER).partition(b"\r\n\r\n")[2])
        outcomes = await ask(pool, 5)
        while usable(pool):
            outcomes += await ask(pool, 2)
        sent = inferences(server)
        spent = pool.endpoints["c"].status(time.monotonic()).spent
        assert answered(outcomes) == len(sent) == spent.requests > 5
        assert (spent.sent_bytes, spent.received_bytes) == (sum(map(len, sent)), len(sent) * answer_bytes)
        assert 3_500 < spent.sent_bytes + spent.received_bytes <= 5_000
        assert events.count("budget_exhausted") == 1

    drive(scenario, Server(), bytes_per_day=5_000)


def test_room_that_is_set_aside_for_answers_is_not_written_down_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writings = []
    write = budget_file.write
    monkeypatch.setattr(budget_file, "write", lambda path, saved: (writings.append(saved), write(path, saved)))

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        for _ in range(10):
            assert answered(await ask(pool, 5)) == 5
        assert len(writings) < 8
        written = writings[-1].endpoints["c"]["bytes"]
        spent = pool.endpoints["c"].account.spent()
        counted = written.ahead + sum(gone.amount for gone in written.spendings)
        assert 0 <= counted - spent.sent_bytes - spent.received_bytes < 200_000, "nor lost with a kill"

    drive(scenario, Server(), state_dir=tmp_path, bytes_per_day=10_000_000, requests_per_day=10_000)


def test_an_answer_beyond_the_budget_is_cut_off_and_is_no_fault_of_the_endpoint() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: http(200, {**ANSWER, "more": "x" * 4_000})
        assert await ask(pool, 1) == [SPENT]
        assert pool.endpoints["c"].breaker.failures == 0
        spent = pool.endpoints["c"].status(time.monotonic()).spent
        assert spent.received_bytes > 4_000, "what was read is paid for all the same"

    drive(scenario, Server(), bytes_per_day=5_000)


def test_the_first_answer_may_be_long_while_there_is_room() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: http(200, {**ANSWER, "more": "x" * 20_000})
        assert answered(await ask(pool, 1)) == 1
        assert answered(await ask(pool, 2)) == 2, "what the first one needed is set aside for the next"

    drive(scenario, Server(), bytes_per_day=100_000)


def test_who_goes_away_has_paid_for_the_request_only() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: None
        task = asyncio.ensure_future(pool.infer(GO, request(), "m"))
        await until(lambda: inferences(server))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = pool.endpoints["c"].status(time.monotonic()).budgets["bytes"].left
        assert left == 100_000 - len(inferences(server)[0])

    drive(scenario, Server(), bytes_per_day=100_000)
