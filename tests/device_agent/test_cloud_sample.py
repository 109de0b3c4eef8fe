"""What an open breaker's check asks of an endpoint, so that no client's request is spent on it."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import msgspec
import pytest
from cloud_server import ANSWER, GO, METADATA, SHAPE, Server, drive, http, request, until, usable

from aios_edge.manifest import TensorSpec
from aios_edge.oip.envelope import parse_request
from device_agent.cloud import CloudPool
from device_agent.cloud_sample import MAX_ELEMENTS, sample_request


def shape(*specs: tuple[str, tuple[int, ...]]) -> Any:
    inputs = tuple(TensorSpec(name=f"x{n}", datatype=datatype, shape=size) for n, (datatype, size) in enumerate(specs))
    return msgspec.structs.replace(SHAPE, inputs=inputs)


def test_a_sample_is_a_text_or_one_row_of_ones() -> None:
    text = sample_request(SHAPE, 0.0, natural=True)
    assert text is not None and [tensor["name"] for tensor in json.loads(text.body)["inputs"]] == ["text"]
    ours = shape(("FP32", (-1, 3)), ("BOOL", ()), ("BYTES", (-1,)), ("INT64", (-1, -1)))
    rows = sample_request(ours, 0.0, natural=False)
    assert rows is not None and parse_request(rows.body, None) is not None
    assert [(tensor["shape"], tensor["data"]) for tensor in json.loads(rows.body)["inputs"]] == [
        ([1, 3], [1, 1, 1]),
        ([], [True]),
        ([1], ["a"]),
        ([1, 1], [1]),
    ]
    for unsaid in (shape(("FP16", (-1,))), shape(("FP32", (-1, MAX_ELEMENTS + 1)))):
        assert sample_request(unsaid, 0.0, natural=False) is None
    assert sample_request(shape(), 0.0, natural=False) is not None


async def lost(server: Server, pool: CloudPool, reply: Any) -> None:
    """Three clients find that it fails."""
    await until(lambda: usable(pool))
    server.reply = reply
    for _ in range(3):
        await pool.infer(GO, request(0.2), "m")
    assert not usable(pool)


@pytest.mark.parametrize(
    "reply",
    [lambda: http(503, {}), lambda: b"nonsense\r\n\r\n", lambda: http(200, {"outputs": 5}), lambda: None],
    ids=["503", "nonsense", "no outputs", "silence"],
)
def test_while_it_answers_metadata_only_no_client_is_sent_there(reply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.cloud_endpoint.CHECK_TIMEOUT_S", 0.1)

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await lost(server, pool, reply)
        posts = server.posts
        await until(lambda: server.posts >= posts + 2)
        assert not usable(pool)
        assert events.count("breaker_half_open") == 0
        server.reply = lambda: http(200, ANSWER)
        await until(lambda: usable(pool))
        assert pool.endpoints["c"].account.spent().requests == server.posts, "each is paid for"

    drive(scenario, Server())


def test_one_that_has_become_slow_is_let_in_again_when_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        for _ in range(20):
            await pool.infer(GO, request(), "m")
        server.pause_s = 0.5
        await lost(server, pool, server.reply)
        posts = server.posts
        await until(lambda: usable(pool))
        assert server.posts - posts > 1, "at first it was too slow"
        there = pool.endpoints["c"].offer("m", time.monotonic(), natural=False)
        assert there is not None and there.safe_s > 0.5

    drive(scenario, Server())


def test_one_that_nobody_tries_because_it_was_slow_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.cloud_watch.HALF_OPEN_S", 0.05)

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        pool.endpoints["c"].add(msgspec.structs.replace(SHAPE, name="absent"))  # which is checked again and again
        await lost(server, pool, lambda: http(503, {}))
        server.reply = lambda: http(200, ANSWER)
        await until(lambda: usable(pool))
        round_trip = pool.endpoints["c"].models["m"].round_trip
        pool.endpoints["c"].models["m"].round_trip = msgspec.structs.replace(round_trip, floor_s=1.0, mean_s=1.0)
        await until(lambda: pool.endpoints["c"].models["m"].round_trip.floor_s < 0.5)
        assert usable(pool) and pool.endpoints["c"].breaker.state == "half_open"
        server.raw_metadata = b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"
        await until(lambda: pool.endpoints["c"].breaker.state == "open")

    drive(scenario, Server())


def test_without_a_budget_for_it_a_clients_request_has_to_find_out() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await lost(server, pool, lambda: http(503, {}))
        await until(lambda: pool.endpoints["c"].breaker.state == "half_open")
        assert server.posts == 3

    drive(scenario, Server(), requests_per_day=3)


def test_what_may_be_the_samples_own_fault_keeps_nobody_away() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await lost(server, pool, lambda: http(503, {}))
        server.reply = lambda: http(500, {"error": "ones are no numbers that I like"})
        posts = server.posts
        await until(lambda: usable(pool))
        assert server.posts - posts >= 2

    drive(scenario, Server(METADATA))


def test_a_sample_that_is_disliked_is_no_failure_of_an_endpoint_in_doubt() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: http(503, {})
        for _ in range(2):
            await pool.infer(GO, request(0.2), "m")
        server.reply, posts = lambda: http(400, {"error": "ones are no numbers that I like"}), server.posts
        pool.endpoints["c"].watch.doubt()
        await until(lambda: not pool.endpoints["c"].breaker.failures)
        assert server.posts - posts == 2 and events.count("breaker_opened") == 0

    drive(scenario, Server(METADATA))


def test_one_that_answers_this_and_that_is_not_believed_by_the_way() -> None:
    """A server that is broken in many ways also says what one would say that dislikes the sample."""
    nonsense = itertools.cycle([http(500, {"error": "it broke"}), b"nonsense\r\n\r\n", http(400, {})])

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await lost(server, pool, lambda: http(503, {}))
        posts, server.reply = server.posts, lambda: next(nonsense)
        await until(lambda: server.posts >= posts + 6)
        assert not usable(pool) and events.count("breaker_half_open") == 0

    drive(scenario, Server(METADATA))


def test_a_sample_ends_with_the_agent() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await lost(server, pool, lambda: None)
        posts = server.posts
        await until(lambda: server.posts > posts)
        began = time.monotonic()
        await pool.stop()
        assert time.monotonic() - began < 2.0

    drive(scenario, Server())
