"""uvicorn as the agent's HTTP door: nothing but requests, and no signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from device_agent.http import HttpApp
from device_agent.http_protocol import DoorProtocol


class HttpServer(uvicorn.Server):
    """Serves the application on sockets that are already open; ``should_exit`` closes it.

    ``drain_s``: how long requests in flight may take after that; two seconds are added to tell those who still wait.
    """

    def __init__(self, app: HttpApp, *, drain_s: float) -> None:
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
            timeout_graceful_shutdown=round(drain_s) + 2,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield
