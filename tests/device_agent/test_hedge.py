"""A request that takes long is asked of a second endpoint: one answer, no failure, no more of it than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cloud_server import Server, asking, http, request, until
from hypothesis import given
from hypothesis import strategies as st

from device_agent.answer import Answer, Unanswered
from device_agent.cloud import CloudPool
from device_agent.hedge import BURST, SHARE, HedgeAllowance
from device_agent.round_trip import RECENT, RECENT_LEAST, RoundTrip
from device_agent.settings import Policy
from device_agent.values import Cloud, Reason

FIRST = Cloud(Reason.PREDICTED_LATE, "a")


@given(st.lists(st.booleans(), max_size=300))
def test_one_request_in_ten_is_sent_twice_at_most(wishes: list[bool]) -> None:
    allowance, twice = HedgeAllowance(), 0
    for sent, wish in enumerate(wishes, 1):
        allowance = allowance.earned()
        if wish and allowance.allows():
            allowance, twice = allowance.used(), twice + 1
        assert twice <= 1 + SHARE * sent + 1e-6 and allowance.left <= BURST


def test_the_95th_percentile_is_that_of_the_last_answers() -> None:
    trip = RoundTrip()
    for number in range(RECENT_LEAST):
        assert trip.p95_s() is None
        trip = trip.observed(0.001 * (number + 1), float(number))
    assert trip.p95_s() == pytest.approx(0.020)
    for number in range(200):
        trip = trip.observed(0.5, float(number))
    assert trip.p95_s() == 0.5 and len(trip.recent) == RECENT


def posts(server: Server) -> int:
    return sum(first.startswith("POST") for first, _, _ in server.seen)


def hedging(scenario: Callable[[CloudPool, Server, Server], Any], *, hedge: bool = True, **endpoint: Any) -> None:
    """Two endpoints, the first of which has answered often and at once."""

    async def main() -> None:
        first, second = Server(), Server()
        async with asking(first, second, policy=Policy(hedge=hedge), **endpoint) as (pool, _):
            known = pool.endpoints["a"].models["m"]
            for number in range(RECENT_LEAST):
                known.round_trip = known.round_trip.observed(0.02, float(number))
            await asyncio.wait_for(scenario(pool, first, second), 20)

    asyncio.run(main())


def test_the_second_endpoint_answers_for_one_that_hangs_and_nobody_failed() -> None:
    async def scenario(pool: CloudPool, first: Server, second: Server) -> None:
        first.reply = lambda: None
        answer = await pool.infer(FIRST, request(), "m")
        assert isinstance(answer, Answer) and answer.status == 200 and answer.reason is Reason.HEDGED
        assert (posts(first), posts(second)) == (1, 1)
        one, other = pool.endpoints["a"], pool.endpoints["b"]
        assert one.breaker.failures == 0 and not one.breaker.probing and other.breaker.failures == 0
        assert (one.status(0.0).hedges, other.status(0.0).hedges) == (0, 1)
        assert one.models["m"].round_trip.recent[-1] > 0.02, "how long it took at least is learnt"

    hedging(scenario)


@pytest.mark.parametrize(
    "why", ["fast", "off", "no other", "no time", "no budget", "used up", "tried before", "failed at once"]
)
def test_it_is_not_sent_twice_without_a_reason_or_without_the_means(why: str) -> None:
    async def scenario(pool: CloudPool, first: Server, second: Server) -> None:
        timeout_s, tried = 0.3, ()
        if why == "failed at once":
            first.reply = lambda: http(500, {"error": "x"})
        elif why == "fast":
            timeout_s = 15.0
            known = pool.endpoints["a"].models["m"]
            known.round_trip = msgspec.structs.replace(known.round_trip, recent=(10.0,) * RECENT)
        else:
            first.reply = lambda: None
        if why == "no other":
            pool.endpoints["b"].models["m"].usable = False
        elif why == "no time":
            known = pool.endpoints["b"].models["m"]
            known.round_trip = RoundTrip(floor_s=1.0).pinged(1.0, 0.0)
        elif why == "no budget":
            await pool.infer(Cloud(Reason.PREDICTED_LATE, "b"), request(), "m")
        elif why == "used up":
            pool._allowance = HedgeAllowance(left=0.5)
        elif why == "tried before":
            tried = ("x",)
        before = posts(second)
        answer = await pool.infer(FIRST, request(timeout_s), "m", tried=tried)
        assert isinstance(answer, Answer) is (why == "fast")
        assert posts(second) == before

    hedging(scenario, hedge=why != "off", requests_per_day=[None, 1])


def test_two_failures_name_both_endpoints_and_a_client_that_goes_away_ends_both() -> None:
    async def scenario(pool: CloudPool, first: Server, second: Server) -> None:
        first.reply = lambda: None
        second.reply = lambda: http(500, {"error": "x"})
        answer = await pool.infer(FIRST, request(0.3), "m")
        assert answer == Unanswered(reason=Reason.CLOUD_FAILED, endpoints=("a", "b"))
        pool._allowance = HedgeAllowance(left=2.0)
        second.reply = lambda: None
        task = asyncio.ensure_future(pool.infer(FIRST, request(), "m"))
        await until(lambda: posts(second) == 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert {one.breaker.failures for one in pool.endpoints.values()} == {1}, "only what failed before"

    hedging(scenario)


def test_a_request_that_a_budget_kept_back_is_no_hedge() -> None:
    async def scenario(pool: CloudPool, first: Server, second: Server) -> None:
        hedged = Cloud(Reason.HEDGED, "b")
        assert isinstance(await pool.infer(hedged, request(), "m"), Answer)
        assert await pool.infer(hedged, request(), "m") == Unanswered(reason=Reason.BUDGET, endpoints=("b",))
        status = pool.endpoints["b"].status(0.0)
        assert posts(second) == status.spent.requests == status.hedges == 1

    hedging(scenario, requests_per_day=[None, 1])
