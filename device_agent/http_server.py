"""uvicorn as the agent's HTTP door: nothing but requests, and no signals."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn

from device_agent.http import App
from device_agent.http_protocol import DoorProtocol


class HttpServer(uvicorn.Server):
    """Serves the application on sockets that are already open; :meth:`close` ends it.

    ``tls``: for TCP only. What the file system guards stays plain.
    """

    def __init__(self, app: App, *, tls: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=DoorProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=1024,
            timeout_keep_alive=75,
        )
        super().__init__(config)
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        servers = []
        for sock in sockets or ():
            self.config.ssl = None if sock.family == socket.AF_UNIX else self._tls
            await super().startup(sockets=[sock])
            servers += self.servers
        self.servers = servers

    def close(self, *, drain_s: float) -> None:
        """Accept no more. Requests in flight have ``drain_s``; two seconds are added to tell those who still wait."""
        self.config.timeout_graceful_shutdown = round(drain_s) + 2
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield
