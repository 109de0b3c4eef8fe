"""A connection of the doors under our own application: who goes away, what is written when."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from device_agent.http import HttpApp, Reply
from device_agent.http_direct import DirectCycle
from device_agent.http_protocol import DoorProtocol

REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class Desk:
    """Answers when it is told to, and says who was taken away."""

    def __init__(self) -> None:
        self.asked = asyncio.Semaphore(0)
        self.left = asyncio.Semaphore(0)
        self.go = asyncio.Event()

    async def infer(self, *_: Any) -> Reply:
        self.asked.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.left.release()
            raise
        return Reply(body=b'{"answer":1}')

    def submit(self, *given: Any) -> Callable[[], None]:
        self.asked.release()
        waits = asyncio.ensure_future(self.go.wait())
        waits.add_done_callback(lambda _: waits.cancelled() or given[-1](Reply(body=b'{"answer":1}')))

        def leave() -> None:
            waits.cancel()
            self.left.release()

        return leave

    def __getattr__(self, name: str) -> Callable[[], bytes]:
        return lambda: b'{"other":1}'


def app_of(desk: Any, way: str, record: Callable[[Any], None] = lambda completion: None) -> HttpApp:
    """``way``: ``short``, past ASGI, or ``long``."""
    return HttpApp(desk, max_body_bytes=100, record=record, direct=desk if way == "short" else None)


WAYS = pytest.mark.parametrize("way", ["short", "long"])


@contextlib.asynccontextmanager
async def serving(
    app: Any, writes: list[bytes] | None = None, *, family: int = socket.AF_INET, path: Path | None = None
) -> AsyncIterator[Any]:
    class Watched(DoorProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            write = transport.write
            transport.write = lambda data: (writes if writes is not None else []).append(bytes(data)) or write(data)

    config = uvicorn.Config(
        app, http=Watched, ws="none", lifespan="off", log_config=None, server_header=False, proxy_headers=False
    )
    address: Any = ("127.0.0.1", 0) if family == socket.AF_INET else str(path)
    with socket.socket(family) as listening:
        listening.bind(address)
        listening.listen()
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        yield listening.getsockname()
        server.should_exit = True
        await task


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


@WAYS
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("pipelined", [1, 2])
def test_who_goes_away_takes_the_request_along(
    way: str, end: str, pipelined: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        desk, recorded = Desk(), []
        async with serving(app_of(desk, way, recorded.append)) as address:
            _, writer = await asyncio.open_connection(*address)
            writer.write(REQUEST * pipelined)
            await desk.asked.acquire()
            if end == "reset":
                writer.transport.abort()
            else:
                writer.close()
            await desk.left.acquire()
            assert recorded == []
            writer.close()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert caplog.text == ""


@WAYS
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_who_ends_his_own_direction_waits_for_the_answer_and_may_still_leave(
    way: str, family: socket.AddressFamily, tmp_path: Path
) -> None:
    async def open_connection(address: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if family == socket.AF_UNIX:
            return await asyncio.open_unix_connection(address)
        return await asyncio.open_connection(*address)

    async def scenario() -> None:
        desk = Desk()
        async with serving(app_of(desk, way), family=family, path=tmp_path / "door") as address:
            reader, writer = await open_connection(address)
            writer.write(REQUEST * 2)
            writer.write_eof()
            await desk.asked.acquire()
            _, leaving = await open_connection(address)
            leaving.write(REQUEST)
            leaving.write_eof()
            await desk.asked.acquire()
            leaving.close()  # only now is nobody there
            await desk.left.acquire()
            desk.go.set()
            answers = (await reader.read()).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            assert answers.count(b"HTTP/1.1 200") == answers.count(b'{"answer":1}') == 2
            assert answers.startswith(b"HTTP/1.1 200") and answers.endswith(b'{"answer":1}')
            writer.close()
            assert not desk.left._value  # type: ignore[attr-defined]

    run(scenario())


def test_an_agent_that_stops_does_not_take_it_for_a_client_that_went_away() -> None:
    async def scenario() -> None:
        desk = Desk()
        app = HttpApp(desk, max_body_bytes=100, record=lambda completion: None)  # type: ignore[arg-type]

        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": []}
        task = asyncio.create_task(app(scope, receive, send))
        await desk.asked.acquire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


@WAYS
def test_head_and_body_are_one_write(way: str) -> None:
    async def scenario() -> None:
        desk, writes = Desk(), []
        desk.go.set()
        async with serving(app_of(desk, way), writes) as address:
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(3):
                writer.write(REQUEST)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                assert json.loads(await reader.readexactly(12)) == {"answer": 1}
            assert len(writes) == 3
            writer.write(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + REQUEST)  # a head alone, then the next answer
            assert b"content-length: 11" in await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 12" in await reader.readuntil(b"\r\n\r\n")
            assert json.loads(await reader.readexactly(12)) == {"answer": 1}
            assert len(writes) == 5
            writer.write(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"\r\n\r\n")
            writer.close()

    run(scenario())


@WAYS
def test_an_answered_request_leaves_nothing_to_the_garbage_collector(way: str) -> None:
    async def scenario() -> None:
        desk = Desk()
        desk.go.set()
        async with serving(app_of(desk, way)) as address:
            reader, writer = await asyncio.open_connection(*address)
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    writer.write(REQUEST)
                    await reader.readuntil(b"}")
                held = [thing for thing in gc.get_objects() if isinstance(thing, RequestResponseCycle | DirectCycle)]
                assert len(held) <= 2  # the connection's latest, and one whose task is just ending
            finally:
                gc.enable()
            writer.close()

    run(scenario())


@WAYS
def test_go_on_is_said_before_the_body_is_sent(way: str) -> None:
    async def scenario() -> None:
        desk = Desk()
        desk.go.set()
        async with serving(app_of(desk, way)) as address:
            reader, writer = await asyncio.open_connection(*address)
            head, body = REQUEST.split(b"\r\n\r\n")
            writer.write(head + b"\r\nExpect: 100-continue\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()

    run(scenario())


def test_an_answer_in_pieces_comes_in_pieces() -> None:
    async def scenario() -> None:
        more = asyncio.Event()

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
            await more.wait()
            await send({"type": "http.response.body", "body": b"cd"})

        async with serving(app) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"ab"
            more.set()
            assert await reader.readexactly(2) == b"cd"
            writer.close()

    run(scenario())
