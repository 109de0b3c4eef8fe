"""The HTTP door's own life: it begins, ticks, and ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from device_agent.http_server import HttpServer


@pytest.mark.parametrize("tick_s", [0.01, 3600.0])
def test_it_ends_at_once_and_not_at_its_next_tick(tick_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.http_server.TICK_S", tick_s)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = HttpServer(app)
            ticks = 0

            async def tick(counter: int, real: Any = server.on_tick) -> bool:
                nonlocal ticks
                ticks += 1
                ticked.set()
                found: bool = await real(counter)
                return found

            ticked = asyncio.Event()
            server.on_tick = tick  # type: ignore[method-assign]
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            for _ in range(1 if tick_s > 1 else 3):
                await ticked.wait()
                ticked.clear()
            server.close(drain_s=0)
            await serving
        assert ticks >= (2 if tick_s > 1 else 4)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_nobody_is_waited_for_when_nobody_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    async def sleep(seconds: float) -> None:
        raise AssertionError(f"it sleeps for {seconds} s")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = HttpServer(app)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started:
                await real(0)
            monkeypatch.setattr(asyncio, "sleep", sleep)
            server.close(drain_s=0)
            await serving

    real = asyncio.sleep
    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("in_time", [True, False])
def test_who_asked_is_waited_for_and_given_up_in_the_end(in_time: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        try:
            await may_answer.wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        ends.append("answered")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = HttpServer(app)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asked.wait()
            server.close(drain_s=20)
            if not in_time:
                server.config.timeout_graceful_shutdown = 0
                await serving
                await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
                writer.close()
                return
            for _ in range(50):  # turns of the loop, more than an end takes
                await asyncio.sleep(0)
            assert listening.fileno() < 0 and not serving.done()
            may_answer.set()
            assert (await reader.read()).endswith(b"ok")
            await serving
            writer.close()

    asked, may_answer, ends = asyncio.Event(), asyncio.Event(), list[str]()
    asyncio.run(asyncio.wait_for(main(), 20))
    assert ends == ["answered" if in_time else "cancelled"]
