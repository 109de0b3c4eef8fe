"""The cloud client against servers that behave, misbehave and vanish, over real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cloud_server import ANSWER, GO, METADATA, SHAPE, Server, drive, http, request, serving, until, usable

from aios_edge.errors import RemoteError
from device_agent.answer import Answer, Unanswered
from device_agent.cloud import CloudPool
from device_agent.cloud_choice import Wanted
from device_agent.cloud_fit import misfit
from device_agent.http1 import HttpClient
from device_agent.round_trip import RoundTrip
from device_agent.values import Reason

FAILED = Unanswered(reason=Reason.CLOUD_FAILED, endpoints=("c",))


def test_forwards_under_the_mapped_name_with_our_key_and_the_time_that_is_left(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        assert not usable(pool, natural=True), "a server that takes tensors only gets no text"
        for _ in range(3):
            answer = await pool.infer(GO, request(5.0), "m")
            assert isinstance(answer, Answer) and answer.status == 200 and answer.remote_body is not None
        document = json.loads(answer.remote_body)
        assert document["model_name"] == "m" and document["outputs"] == ANSWER["outputs"]
        assert document["id"] == "7", "a server that doesn't echo it loses it for no client"
        unknown = ("queue_us", "compute_us", "batch_size", "energy_j", "energy_method")
        route = {"route": "cloud", "reason": "predicted_late"}
        assert document["parameters"] == {**dict.fromkeys(unknown), **route}
        first, headers, body = server.seen[-1]
        assert first == "POST /v2/models/r/versions/3/infer HTTP/1.1"
        assert headers["authorization"] == "Bearer secret"
        parameters = json.loads(body)["parameters"]
        assert parameters["priority"] == 2 and 4_000_000 < parameters["timeout"] <= 5_000_000
        assert server.connections == 1, "connections are kept"

    drive(scenario, Server(), bearer_file=tmp_path / "key")


@pytest.mark.parametrize(
    "reply",
    [
        lambda: http(500, {"error": "x"}),
        lambda: http(503, {"error": "full"}),
        lambda: b"not http at all\r\n\r\n",
        lambda: http(200, {"outputs": 5}),
        lambda: http(200, [1]),
        lambda: b"HTTP/1.1 200 X\r\ncontent-length: 100\r\nconnection: close\r\n\r\n{",
        lambda: None,
    ],
    ids=["500", "503", "nonsense", "no outputs", "a list", "cut off", "silence"],
)
def test_every_way_to_fail_opens_the_breaker_and_a_probe_brings_it_back(reply: Any) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        good, server.reply = server.reply, reply
        for _ in range(3):
            assert usable(pool)
            assert await pool.infer(GO, request(0.2), "m") == FAILED
        assert not usable(pool) and "breaker_opened" in events
        server.reply = good
        await until(lambda: usable(pool))
        assert pool.endpoints["c"].breaker.state == "half_open"
        answer = await pool.infer(GO, request(), "m")
        assert isinstance(answer, Answer) and answer.status == 200
        assert pool.endpoints["c"].breaker.state == "closed" and events[-1] == "breaker_closed"

    drive(scenario, Server())


def test_a_clients_mistake_is_passed_on_and_does_not_count_against_the_cloud() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: http(400, {"error": "bad shape"})
        for _ in range(5):
            answer = await pool.infer(GO, request(), "m")
            assert isinstance(answer, Answer) and answer.status == 400 and "bad shape" in (answer.error or "")
        assert usable(pool)

    drive(scenario, Server())


@pytest.mark.parametrize(("status", "paused"), [(413, False), (429, True)])
def test_what_an_endpoint_does_not_take_may_go_elsewhere_and_opens_no_breaker(status: int, paused: bool) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        good, server.reply = server.reply, lambda: http(status, {"error": "no"}, "retry-after: 1\r\n")
        for _ in range(5):
            assert await pool.infer(GO, request(), "m") == FAILED
        assert pool.endpoints["c"].breaker.state == "closed" and "breaker_opened" not in events
        assert usable(pool) is not paused
        server.reply = good
        await until(lambda: usable(pool))
        assert isinstance(await pool.infer(GO, request(), "m"), Answer)

    drive(scenario, Server())


def test_a_kept_connection_that_the_server_closed_costs_no_failure() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: http(200, ANSWER, "x-y: connection: close\r\n")  # closes without saying so
        for _ in range(4):
            assert isinstance(await pool.infer(GO, request(), "m"), Answer)
        assert pool.endpoints["c"].breaker.failures == 0

    drive(scenario, Server())


def test_fit_compares_names_datatypes_and_label_order() -> None:
    def why(**changes: Any) -> str | None:
        return misfit(SHAPE, json.dumps({**METADATA, **changes}).encode())

    assert why() is None and why(labels=["a", "b"]) is None
    assert "labels" in (why(labels=["b", "a"]) or "")
    assert "no input 'x'" in (why(inputs=[]) or "")
    assert "FP16" in (why(outputs=[{"name": "y", "datatype": "FP16", "shape": [1]}]) or "")
    assert "metadata" in (misfit(SHAPE, b"<html>") or "")


def test_round_trip_learns_and_forgets_what_grew_old() -> None:
    trip = RoundTrip().pinged(0.002, 0.0)
    assert trip.predict(0.0)[0] == 0.002
    for second in range(20):
        trip = trip.observed(0.5, float(second))
    expected_s, safe_s = trip.predict(19.0)
    assert 0.45 < expected_s <= safe_s
    assert trip.predict(60.0)[0] < 0.01, "an endpoint that was slow a minute ago gets its chance"
    assert msgspec.structs.asdict(trip)["floor_s"] == 0.002


def test_a_response_without_end_is_refused() -> None:
    async def main() -> None:
        server = Server()
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        server.reply = lambda: b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n" + piece * 66
        async with serving(server):
            client = HttpClient(server.url)
            with pytest.raises(RemoteError, match="longer than"):
                await client.request("POST", "/", timeout_s=20)
            client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "reply",
    [
        lambda: b'HTTP/1.1 400 X\r\ncontent-length: 15\r\n\r\n{"error":"b\xe9b"}',
        lambda: b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        lambda: b'HTTP/1.1 200 X\r\ncontent-length: 16\r\n\r\n{"outputs":"\xff"}\n',
    ],
    ids=["an error that is not UTF-8", "another protocol", "an answer that is not UTF-8"],
)
def test_no_answer_keeps_the_one_place_of_a_half_open_breaker(reply: Any) -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        endpoint, good = pool.endpoints["c"], server.reply
        endpoint.health.breaker = endpoint.breaker._with(state="half_open")
        server.reply = reply
        answer = await pool.infer(GO, request(), "m")
        assert answer == FAILED or answer.status == 400
        assert not endpoint.breaker.probing
        server.reply = good
        await until(lambda: usable(pool))

    drive(scenario, Server())


def test_metadata_that_is_no_text_is_a_reason_and_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.cloud_watch.RECHECK_MISFIT_S", 0.05)

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        model = pool.endpoints["c"].models["m"]
        await until(lambda: model.reason != "not checked yet")
        assert not model.usable and "metadata" in (model.reason or "")
        server.raw_metadata = None
        await until(lambda: usable(pool))

    drive(
        scenario,
        Server(raw_metadata=b'HTTP/1.1 200 X\r\ncontent-length: 40\r\n\r\n{"inputs":[{"name":"\xff","datatype":"x"}]}'),
    )


def test_a_model_that_the_endpoint_lacks_does_not_keep_the_others_away() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        pool.add(msgspec.structs.replace(SHAPE, name="absent"))
        endpoint = pool.endpoints["c"]
        endpoint.models["m"] = endpoint.models.pop("m")  # behind it
        await until(lambda: usable(pool))
        assert "404" in (endpoint.models["absent"].reason or "")
        absent, known = (endpoint.status(time.monotonic()).models[name] for name in ("absent", "m"))
        assert (absent.expected_s, absent.safe_s) == (None, None) and absent.reason, "never measured is no 5 ms"
        assert known.expected_s and known.safe_s
        good, server.reply = server.reply, lambda: http(500, {"error": "x"})
        for _ in range(3):
            assert await pool.infer(GO, request(), "m") == FAILED
        assert endpoint.breaker.state == "open"
        server.reply = good
        await until(lambda: usable(pool))

    drive(scenario, Server())


def test_a_deadline_that_the_endpoint_missed_is_learnt_from() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        server.reply = lambda: None
        assert await pool.infer(GO, request(0.2), "m") == FAILED
        offer = pool.choose("m", Wanted(), time.monotonic())
        assert offer is not None and offer.expected_s > 0.1, "nobody else with such a deadline is sent there at once"

    drive(scenario, Server())


def test_a_check_that_swallows_its_cancellation_does_not_keep_the_agent_from_stopping() -> None:
    """asyncio.wait_for before Python 3.12 does, when what it waits for ends at the same moment."""

    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        endpoint, busy = pool.endpoints["c"], asyncio.Event()

        async def stubborn(_: Any) -> None:
            busy.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if not swallowed:
                    swallowed.append(True)
                    return
                raise

        swallowed: list[bool] = []
        await until(lambda: usable(pool))
        endpoint.watch._check = stubborn  # type: ignore[method-assign]
        endpoint.models["m"].usable = False
        endpoint.watch.wake.set()
        await busy.wait()
        await asyncio.wait_for(pool.stop(), 5)
        assert swallowed

    drive(scenario, Server())


def versioned(version: str, labels: tuple[str, ...] = SHAPE.labels) -> tuple[dict[str, Any], Any]:
    """Metadata and answer of a server that tells its version."""
    return {**METADATA, "versions": [version], "labels": labels}, lambda: http(
        200, {**ANSWER, "model_version": version}
    )


def test_another_version_that_answers_is_checked_before_its_answer_is_used() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        endpoint = pool.endpoints["c"]

        def checks() -> int:
            return sum(first.startswith("GET") for first, _, _ in server.seen)

        before = checks()
        for _ in range(2):
            assert isinstance(await pool.infer(GO, request(), "m"), Answer)
        assert checks() == before, "it is the one that was checked"

        server.metadata, server.reply = versioned("2")
        answers = await asyncio.gather(*(pool.infer(GO, request(), "m") for _ in range(4)))
        assert all(isinstance(answer, Answer) for answer in answers), "it fits as well"
        assert 1 <= checks() - before <= 2, "many ask once"

        server.metadata, server.reply = versioned("3", ("b", "a"))
        assert await pool.infer(GO, request(), "m") == FAILED
        assert not endpoint.models["m"].usable and "cloud_mismatch" in events
        assert "its labels are b, a" in str(endpoint.models["m"].reason)
        assert endpoint.breaker.state == "closed", "it answers"
        assert sum(first.startswith("POST") for first, _, _ in server.seen) == 7

    first, reply = versioned("1")
    server = Server(first)
    server.reply = reply
    drive(scenario, server)


def test_an_answer_of_a_version_that_nobody_speaks_of_is_not_used() -> None:
    async def scenario(server: Server, pool: CloudPool, events: list[Any]) -> None:
        await until(lambda: usable(pool))
        assert isinstance(await pool.infer(GO, request(), "m"), Answer)
        _, server.reply = versioned("0")
        assert await pool.infer(GO, request(), "m") == FAILED
        _, server.reply = versioned("1")
        assert isinstance(await pool.infer(GO, request(), "m"), Answer), "the one that was checked answers again"
        _, server.reply = versioned("0")
        server.raw_metadata = http(500, {"error": "x"})
        assert await pool.infer(GO, request(), "m") == FAILED
        assert not usable(pool) and "metadata can't be had" in str(pool.endpoints["c"].models["m"].reason)
        server.raw_metadata = None
        await until(lambda: usable(pool))

    first, reply = versioned("1")
    server = Server(first)
    server.reply = reply
    drive(scenario, server)
