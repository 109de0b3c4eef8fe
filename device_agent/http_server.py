"""uvicorn as the agent's HTTP door: nothing but requests, and no signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import cast

import uvicorn

from device_agent.descriptors import accept_errors, raise_limit
from device_agent.http import App
from device_agent.http_protocol import DoorProtocol
from device_agent.inbound import UNBOUNDED, Inbound
from device_agent.listen import BACKLOG
from device_agent.seldom import Seldom
from device_agent.slow_clients import SlowClients

TICK_S = 0.1  # uvicorn counts in them: it renews the date every ten
LOOK_S = 0.01  # between looks, at the end, whether the last client has gone

log = logging.getLogger("device_agent.http")


class HttpServer(uvicorn.Server):
    """Serves the application on sockets that are already open; :meth:`close` ends it.

    ``receive_timeout_s``: of a client that hardly moves (:mod:`device_agent.slow_clients`).
    ``tls``: for TCP only. What the file system guards stays plain. ``inbound``: how much may be coming in.
    """

    def __init__(
        self,
        app: App,
        *,
        receive_timeout_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
        inbound: Inbound = UNBOUNDED,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=type("Door", (DoorProtocol,), {"inbound": inbound}),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",  # its warnings are of clients, as many as they like; ours are said seldom
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=75,
        )
        super().__init__(config)
        self._tls = tls
        self._slow_clients = SlowClients(receive_timeout_s)
        self._closing = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        raise_limit()
        loop = asyncio.get_running_loop()
        seldom = Seldom(log)
        loop.set_exception_handler(accept_errors(seldom, loop.get_exception_handler()))
        servers = []
        for sock in sockets or ():
            self.config.ssl = None if sock.family == socket.AF_UNIX else self._tls
            await super().startup(sockets=[sock])
            servers += self.servers
        self.servers = servers

    async def main_loop(self) -> None:
        """Ticks until it is to end; uvicorn's own would notice that at its next tick."""
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), TICK_S)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._slow_clients.look(cast("Iterable[DoorProtocol]", self.server_state.connections), time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end when everyone was answered; uvicorn's own sleeps first, also when nobody is here."""
        for server in self.servers:
            server.close()
        for sock in sockets or ():
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        try:
            await asyncio.wait_for(self._everyone_gone(), self.config.timeout_graceful_shutdown)
        except asyncio.TimeoutError:
            log.warning("stopping: %d requests were not answered in time", len(self.server_state.tasks))
            for task in self.server_state.tasks:
                task.cancel()

    async def _everyone_gone(self) -> None:
        state = self.server_state
        while state.connections or state.tasks:  # noqa: ASYNC110  uvicorn's sets, and they tell nobody
            await asyncio.sleep(LOOK_S)
        for server in self.servers:
            await server.wait_closed()

    def close(self, *, drain_s: float) -> None:
        """Accept no more. Requests in flight have ``drain_s``; two seconds are added to tell those who still wait."""
        self.config.timeout_graceful_shutdown = round(drain_s) + 2
        self.should_exit = True
        self._closing.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield
