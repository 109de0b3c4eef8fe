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
