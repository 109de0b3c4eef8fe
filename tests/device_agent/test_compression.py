"""Compressed bodies: whole or refused, never more memory than allowed; and made only where it pays."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib
from typing import Any

import msgspec
import pytest
from cloud_server import GO, Server, drive, http, request, until, usable
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import RequestError
from device_agent.answer import Answer
from device_agent.cloud import CloudPool
from device_agent.compression import LEAST_BYTES, Inflater, gzipped
from device_agent.values import InferenceRequest

LIMIT = 1_000_000


def unpack(packed: bytes, piece: int = 1000, limit: int = LIMIT) -> bytes:
    inflater = Inflater(limit)
    for start in range(0, len(packed), piece):
        inflater.feed(packed[start : start + piece])
    return inflater.finish()


def status(packed: bytes, **more: Any) -> int:
    with pytest.raises(RequestError) as caught:
        unpack(packed, **more)
    return caught.value.http_status


@given(st.binary(max_size=5000), st.integers(1, 50), st.integers(1, 6000))
def test_what_was_packed_comes_back_from_any_pieces(body: bytes, times: int, piece: int) -> None:
    assert unpack(gzip.compress(body * times), piece) == body * times


def test_the_limit_is_of_the_body_unpacked_to_the_byte() -> None:
    assert len(unpack(gzip.compress(b"x" * LIMIT))) == LIMIT
    assert status(gzip.compress(b"x" * (LIMIT + 1))) == 413


def test_a_bomb_is_given_up_before_it_takes_memory() -> None:
    bomb = gzip.compress(bytes(200_000_000), 9)
    inflater = Inflater(LIMIT)
    with pytest.raises(RequestError, match="longer than 1000000 bytes"):
        inflater.feed(bomb)
    assert sum(map(len, inflater._pieces)) <= LIMIT, "200 MB were never made"


@pytest.mark.parametrize("damage", ["cut off", "not gzip", "empty", "check sum", "more behind", "zlib"])
def test_what_is_no_gzip_is_a_400(damage: str) -> None:
    whole = gzip.compress(b"a good film" * 100)
    packed = {
        "cut off": whole[:-1],
        "not gzip": b"{}",
        "empty": b"",
        "check sum": whole[:-8] + bytes(8),
        "more behind": whole + b"{}",
        "zlib": zlib.compress(b"x"),
    }[damage]
    assert status(packed) == 400


@given(st.binary(max_size=200), st.integers(1, 400), st.integers(0, 1000))
def test_a_body_is_compressed_only_where_it_shrinks(body: bytes, times: int, seed: int) -> None:
    packed = gzipped(body * times)
    assert packed is None or (gzip.decompress(packed) == body * times and len(packed) < 0.91 * len(body * times))
    assert gzipped(random.Random(seed).randbytes(LEAST_BYTES * 2)) is None, "noise stays as it is"


def test_what_pays_and_what_does_not() -> None:
    assert gzipped(b"x" * (LEAST_BYTES - 1)) is None
    assert gzipped(b"x" * LEAST_BYTES) is not None
    assert gzipped(random.Random(1).randbytes(20_000) + b"x" * 100_000) is None, "its beginning speaks for it"


def long_request(size: int) -> InferenceRequest:
    tensor = {"name": "x", "datatype": "FP32", "shape": [size], "data": [1.5] * size}
    return msgspec.structs.replace(request(), body=json.dumps({"inputs": [tensor]}).encode())


@pytest.mark.parametrize("size", [10, 5_000, 200_000])
def test_long_bodies_go_compressed_and_are_paid_for_as_they_go(size: int) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        assert isinstance(await pool.infer(GO, long_request(size), "m"), Answer)
        _, headers, body = server.seen[-1]
        if size == 10:
            assert "content-encoding" not in headers
        else:
            assert headers["content-encoding"] == "gzip" and len(body) < size
            body = gzip.decompress(body)
        assert json.loads(body)["inputs"] == json.loads(long_request(size).body)["inputs"]
        assert pool.endpoints["c"].account.spent().sent_bytes == len(server.seen[-1][2])

    drive(scenario, Server(), compression="gzip")


def test_an_endpoint_that_takes_no_gzip_gets_none_any_more() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        good, server.reply = server.reply, lambda: http(415, {"error": "no gzip here"})
        assert not isinstance(await pool.infer(GO, long_request(5_000), "m"), Answer)
        server.reply = good
        assert isinstance(await pool.infer(GO, long_request(5_000), "m"), Answer)
        assert [headers.get("content-encoding") for first, headers, _ in server.seen if first.startswith("POST")] == [
            "gzip",
            None,
        ]

    drive(scenario, Server(), compression="gzip")


def test_nothing_is_compressed_for_an_endpoint_that_was_not_said_to_take_it() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        await asyncio.gather(pool.infer(GO, long_request(5_000), "m"))
        assert "content-encoding" not in server.seen[-1][1]

    drive(scenario, Server())
