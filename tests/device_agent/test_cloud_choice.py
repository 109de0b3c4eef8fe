"""Which of several endpoints takes a request, and what becomes of it when that one fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
from cloud_server import Server, asking, http, request, shape_of
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import infer

from device_agent.answer import Answer, Energy
from device_agent.cloud import CloudPool
from device_agent.cloud_choice import Candidate, Wanted, choose
from device_agent.model_host import ModelHost
from device_agent.policy_in_force import PolicyInForce
from device_agent.router import There
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import Cloud, InferenceRequest, Reason
from device_agent.worker_pool import WorkerSpec

NOW = 50.0


def candidate(name: str, safe_s: float, weight: float = 1.0) -> Candidate:
    return Candidate(there=There(endpoint=name, expected_s=safe_s / 2, safe_s=safe_s), weight=weight)


def shares(candidates: list[Candidate], within: float | None) -> dict[str, float]:
    deadline_at = None if within is None else NOW + within
    chosen = Counter()
    for number in range(1000):
        there = choose(candidates, NOW, deadline_at, number / 1000)
        assert there is not None
        chosen[there.endpoint] += 1
    return {name: round(count / 1000, 2) for name, count in chosen.items()}


def test_weights_are_shares_among_those_in_time_and_a_spare_waits_for_its_turn() -> None:
    near, far, spare = candidate("near", 0.1, 3.0), candidate("far", 0.5), candidate("spare", 0.05, 0.0)
    assert shares([near, far, spare], None) == {"near": 0.75, "far": 0.25}
    assert shares([near, far, spare], 1.0) == {"near": 0.75, "far": 0.25}
    assert shares([near, far, spare], 0.2) == {"near": 1.0}
    assert shares([near, far, spare], 0.07) == {"spare": 1.0}, "no other is in time"
    assert shares([near, far, spare], 0.01) == {"spare": 1.0}, "none is: the soonest"
    assert shares([near, far], 0.01) == {"near": 1.0}
    assert choose([], NOW, None, 0.5) is None


@given(
    st.lists(st.tuples(st.floats(0.001, 2.0), st.floats(0.0, 100.0)), min_size=1, max_size=5),
    st.none() | st.floats(0.0, 2.0),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_nobody_late_is_asked_while_another_is_in_time(
    endpoints: list[tuple[float, float]], within: float | None, draw: float
) -> None:
    candidates = [candidate(str(number), safe_s, weight) for number, (safe_s, weight) in enumerate(endpoints)]
    deadline_at = None if within is None else NOW + within
    there = choose(candidates, NOW, deadline_at, draw)
    assert there is not None
    in_time = [one for one in candidates if deadline_at is None or NOW + one.there.safe_s <= deadline_at]
    if in_time:
        assert there in [one.there for one in in_time]
        weighed = [one.there for one in in_time if one.weight > 0]
        assert not weighed or there in weighed
    else:
        assert there.safe_s == min(one.there.safe_s for one in candidates)


def test_the_pool_asks_by_weight_leaves_out_who_failed_and_whose_budget_is_spent() -> None:
    async def main() -> None:
        draws = itertools.cycle(number / 100 for number in range(100))
        async with asking(Server(), Server(), weight=[9, 1], requests_per_day=[None, 1], draw=lambda: next(draws)) as (
            pool,
            _,
        ):
            now = time.monotonic()
            chosen = [pool.choose("m", Wanted(), now) for _ in range(100)]
            assert Counter(there.endpoint for there in chosen if there) == {"a": 90, "b": 10}
            without = Wanted(without=("a",))
            assert {there.endpoint for _ in range(50) if (there := pool.choose("m", without, now))} == {"b"}
            await pool.infer(Cloud(Reason.PREDICTED_LATE, "b"), request(), "m")
            assert {there.endpoint for _ in range(50) if (there := pool.choose("m", Wanted(), now))} == {"a"}
            assert pool.choose("m", without, now) is None
            dear = pool.unaffordable("m", without, now)
            assert dear is not None and dear.endpoint == "b"

    asyncio.run(main())


async def through_a_host(bundle: Any, pool: CloudPool, asked: InferenceRequest) -> Answer:
    """A model whose worker isn't there: all it has is the cloud."""
    around = Surroundings(
        rules=PolicyInForce(Policy()),
        cloud=pool,
        emit=lambda kind, **_: None,
        energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
    )
    host = ModelHost(WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x"), bundle, around)
    return await infer(host, msgspec.structs.replace(asked, model="tiny"))


def posts(server: Server) -> int:
    return sum(first.startswith("POST") for first, _, _ in server.seen)


def test_who_has_no_worker_and_no_budget_hears_of_the_budget(tiny_bundle: Any) -> None:
    async def main() -> None:
        shape, metadata = shape_of(tiny_bundle)
        async with asking(Server(metadata), shape=shape, requests_per_day=1) as (pool, _):
            answers = [await through_a_host(tiny_bundle, pool, request()) for _ in range(2)]
            assert [answer.reason for answer in answers] == [Reason.WORKER_LOST, Reason.BUDGET]
            assert answers[1].status == 503 and "budget" in (answers[1].error or "")

    asyncio.run(main())


@pytest.mark.parametrize(("failing", "status", "asked"), [(1, 200, [1, 1, 0]), (2, 503, [1, 1, 0])])
def test_a_request_that_one_endpoint_failed_is_asked_of_one_other(
    tiny_bundle: Any, failing: int, status: int, asked: list[int]
) -> None:
    async def main() -> None:
        shape, metadata = shape_of(tiny_bundle)
        servers = [Server(metadata) for _ in range(3)]
        for server in servers[:failing]:
            server.reply = lambda: http(500, {"error": "x"})
        async with asking(*servers, shape=shape, weight=[1e9, 1e-3, 0], draw=lambda: 0.5) as (pool, _):
            answer = await through_a_host(tiny_bundle, pool, request())
            assert answer.status == status and [posts(server) for server in servers] == asked
            assert answer.reason is (Reason.WORKER_LOST if status == 200 else Reason.CLOUD_FAILED)

    asyncio.run(main())


def test_no_other_endpoint_is_asked_when_there_is_no_time_for_it(tiny_bundle: Any) -> None:
    async def main() -> None:
        shape, metadata = shape_of(tiny_bundle)
        slow, other = Server(metadata), Server(metadata)
        slow.reply = lambda: None
        async with asking(slow, other, shape=shape, weight=[1, 0]) as (pool, _):
            answer = await through_a_host(tiny_bundle, pool, request(0.3))
            assert answer.status == 504 and (posts(slow), posts(other)) == (1, 0)

    asyncio.run(main())
