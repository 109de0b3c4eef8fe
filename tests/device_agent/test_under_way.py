"""How many requests an endpoint that stops answering can take along."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from cloud_server import ANSWER, GO, Server, asking, http, request, until
from hypothesis import given
from hypothesis import strategies as st

from device_agent.answer import Answer, Unanswered
from device_agent.cloud_choice import Wanted
from device_agent.settings import Policy
from device_agent.under_way import OVERDUE, OVERDUE_LEAST_S, UnderWay
from device_agent.values import Reason

SAFE_S = 0.1


@given(
    st.lists(st.tuples(st.sampled_from(["sent", "answered", "failed", "waits"]), st.floats(0.0, 1.0)), max_size=60),
    st.floats(0.0, 0.2),
)
def test_it_is_silent_while_one_is_overdue_that_nothing_later_overtook(
    happened: list[tuple[str, float]], safe_s: float
) -> None:
    under_way, now = UnderWay(), 0.0
    sent: dict[int, float] = {}
    answered: list[int] = []
    for what, how in happened:
        if what == "sent":
            sent[under_way.sent(now, safe_s)] = now
        elif what == "waits":
            now += how
        elif sent:
            number = sorted(sent)[int(how * (len(sent) - 1))]
            under_way.ended(number, answered=what == "answered")
            del sent[number]
            answered += [number] if what == "answered" else []
        limit_s = max(OVERDUE * safe_s, OVERDUE_LEAST_S)
        overdue = [n for n, at in sent.items() if now > at + limit_s and all(later < n for later in answered)]
        assert under_way.silent(now) == bool(overdue)
        assert len(under_way) == len(sent)


def test_no_more_than_the_breaker_forgives_are_sent_to_one_that_fell_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.cloud_endpoint.CHECK_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with asking(server := Server(), timeout_s=60.0) as (pool, _):
            for _ in range(20):
                await pool.infer(GO_A, request(), "m")
            good, server.reply = server.reply, lambda: None
            known, sent = pool.endpoints["a"].models["m"], len(server.seen)
            asked = [asyncio.ensure_future(pool.infer(GO_A, request(30.0), "m"))]
            overdue_s = max(OVERDUE * known.round_trip.predict(time.monotonic())[1], OVERDUE_LEAST_S)
            await asyncio.sleep(overdue_s * 1.01)
            while may_ask(pool):
                asked.append(asyncio.ensure_future(pool.infer(GO_A, request(30.0), "m")))
                await asyncio.sleep(0)
            assert len(asked) == 3, "long before the first deadline"
            await until(lambda: len(server.seen) >= sent + 3)
            server.reply = good
            asked.pop().cancel()  # its client leaves: one may be tried
            await until(lambda: may_ask(pool))
            await pool.infer(GO_A, request(), "m")
            assert may_ask(pool), "it answers what was sent later"
            for task in asked:
                task.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_after_a_failure_no_more_are_under_way_than_would_open_the_breaker() -> None:
    async def main() -> None:
        async with asking(server := Server()) as (pool, _):
            server.reply = lambda: b"nonsense\r\n\r\n"
            await pool.infer(GO_A, request(), "m")
            server.reply = lambda: None
            asked: list[Any] = []
            while may_ask(pool):
                asked.append(asyncio.ensure_future(pool.infer(GO_A, request(30.0), "m")))
                await asyncio.sleep(0)
            assert len(asked) == 2
            for task in asked:
                task.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


GO_A = type(GO)(GO.reason, "a")


def may_ask(pool: Any) -> bool:
    return pool.choose("m", Wanted(natural=False), time.monotonic()) is not None


async def fails_twice(server: Server, pool: Any) -> None:
    server.reply = lambda: http(500, {})
    for _ in range(2):
        await pool.infer(GO_A, request(), "m")


def test_without_a_budget_for_a_sample_a_doubt_forgives_no_failure() -> None:
    async def main() -> None:
        async with asking(server := Server(), requests_per_day=4, timeout_s=60.0) as (pool, _):
            await pool.infer(GO_A, request(), "m")
            await fails_twice(server, pool)
            server.reply = lambda: None
            asked = asyncio.ensure_future(pool.infer(GO_A, request(None), "m"))
            await until(lambda: server.posts == 4)
            endpoint = pool.endpoints["a"]
            endpoint.watch.doubt()
            await until(lambda: not endpoint.watch.wake.is_set())
            await asyncio.sleep(0)
            assert (server.posts, endpoint.breaker.failures) == (4, 2)
            asked.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_those_that_are_decided_in_one_turn_are_counted_as_well() -> None:
    async def main() -> None:
        async with asking(server := Server()) as (pool, _):
            await pool.infer(GO_A, request(), "m")
            await fails_twice(server, pool)
            server.reply = lambda: None
            posts = server.posts
            decided = [may_ask(pool) for _ in range(20)]
            assert all(decided)
            answers = await asyncio.gather(*(pool.infer(GO_A, request(0.2), "m") for _ in decided))
            why = [answer.reason for answer in answers if isinstance(answer, Unanswered)]
            assert len(why) == 20 and why.count(Reason.CLOUD_UNAVAILABLE) >= 19, "most were never sent"
            assert server.posts - posts <= 2, "one of them, and maybe a sample"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_rule_that_forgives_less_opens_nothing_and_keeps_nobody_away() -> None:
    async def main() -> None:
        async with asking(server := Server()) as (pool, _):
            await pool.infer(GO_A, request(), "m")
            await fails_twice(server, pool)
            server.reply = lambda: http(200, ANSWER)
            pool.follow(Policy(breaker_failures=2), (pool.endpoints["a"]._settings,))
            assert may_ask(pool) and pool.endpoints["a"].breaker.state == "closed"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_doubt_while_the_breaker_is_half_open_does_not_hide_the_next_one() -> None:
    async def main() -> None:
        async with asking(server := Server(), timeout_s=60.0) as (pool, _):
            endpoint = pool.endpoints["a"]
            await pool.infer(GO_A, request(), "m")
            endpoint.health.breaker = endpoint.breaker._with(state="half_open")
            endpoint.watch.doubt()
            await until(lambda: not endpoint.watch.wake.is_set())
            assert isinstance(await pool.infer(GO_A, request(), "m"), Answer) and endpoint.breaker.state == "closed"
            await fails_twice(server, pool)
            server.reply = lambda: None
            asked = asyncio.ensure_future(pool.infer(GO_A, request(None), "m"))
            await asyncio.sleep(0)
            posts = server.posts
            assert not may_ask(pool)
            await until(lambda: server.posts >= posts + 2)  # that one, and a sample
            asked.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("opens", [False, True])
def test_old_requests_that_hang_keep_nobody_from_one_that_answers_again(opens: bool) -> None:
    async def main() -> None:
        policy = Policy(breaker_backoff_s=0.05)
        async with asking(server := Server(), policy=policy, timeout_s=60.0) as (pool, events):
            for _ in range(5):
                await pool.infer(GO_A, request(), "m")
            server.reply = lambda: None
            posts = server.posts
            old = [asyncio.ensure_future(pool.infer(GO_A, request(None), "m")) for _ in range(3)]
            await until(lambda: server.posts == posts + 3)
            if opens:
                server.reply = lambda: http(503, {})
                await until(lambda: not may_ask(pool) and pool.endpoints["a"].breaker.state == "open")
            else:
                await until(lambda: not may_ask(pool))
            server.reply = lambda: http(200, ANSWER)
            await until(lambda: may_ask(pool))
            assert not any(task.done() for task in old)
            assert isinstance(await pool.infer(GO_A, request(), "m"), Answer)
            assert ("breaker_opened" in events) == opens
            for task in old:
                task.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))
