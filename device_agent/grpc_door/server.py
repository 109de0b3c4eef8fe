"""grpcio's asyncio server on the address of ``[http] grpc_bind``, with the certificate of the HTTP door."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc

from aios_edge.errors import ResourceError
from device_agent.background import ended, kept_up
from device_agent.desk import FrontDesk
from device_agent.grpc_door.callers import Callers
from device_agent.grpc_door.certificate import credentials
from device_agent.grpc_door.crashes import Crashes
from device_agent.grpc_door.door import GrpcDoor
from device_agent.grpc_door.slow_calls import LOOK_S, SlowCalls
from device_agent.grpc_door.wires import find
from device_agent.inbound import Inbound
from device_agent.listen import check_free
from device_agent.seldom import Seldom
from device_agent.settings import Http, split_bind
from device_agent.status import GrpcStatus
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.tls import DoorCertificate
from device_agent.values import Completion

log = logging.getLogger("device_agent.grpc")

_STREAMS = 256  # calls at once on one connection; the others wait at the client
_WHERE = "http.grpc_bind"
_LAST_CALLS_S = 60.0  # of a server that ended by itself
_ENDING = 4  # of those that may still have calls
_TRY_AGAIN_S = 0.02
_ENDED_S = 2.0  # between looks whether it has
_PAUSES = 20.0  # times as long as a look for slow calls takes


def make_server(
    http: Http,
    front: FrontDesk,
    tenants: TenantDesks | None,
    books: TenantBooks,
    record: Callable[[Completion], None],
    inbound: Inbound,
    certificate: DoorCertificate | None = None,
) -> GrpcServer:
    """The door and the server under it. Raises :class:`ResourceError`."""
    slow = SlowCalls(http.receive_timeout_s, http.max_body_bytes, inbound)
    return GrpcServer(GrpcDoor(Callers(front, tenants, books, record), slow), http, certificate)


class GrpcServer:
    """Bound when it is made, so that a busy port costs only a message: raises :class:`ResourceError`.

    grpcio's server may end at a client's bytes (:mod:`device_agent.grpc_door.crashes`). Then another takes its port,
    and the calls of the one before are answered to their end.
    """

    def __init__(self, door: GrpcDoor, http: Http, certificate: DoorCertificate | None = None) -> None:
        self._host, port = split_bind(http.grpc_bind)
        check_free(http.grpc_bind, where=_WHERE)
        self._door = door
        self._credentials = None if certificate is None else credentials(certificate)
        self._options = _options(http)
        self._serving = False
        self._ended = asyncio.Event()
        self._crashes = Crashes(self._heard_of_an_end)
        self._seldom = Seldom(log)
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._ending: dict[Any, asyncio.Task[None]] = {}
        try:
            self._server, self._port = self._bound(port)
        except (RuntimeError, OSError) as error:
            raise ResourceError(f"{http.grpc_bind} can't be bound ({error})", where=_WHERE) from error
        scheme = "grpc" if certificate is None else "grpcs"
        self.address = f"{scheme}://{self._target(self._port)}"

    async def start(self) -> None:
        """Begin to accept."""
        self._crashes.begin()
        await self._server.start()
        self._serving = True
        self._tasks = (
            asyncio.create_task(kept_up(self._keep_open, "the gRPC door could not be kept open"), name="grpc-open"),
            asyncio.create_task(kept_up(self._look, "slow gRPC calls could not be looked at"), name="grpc-slow-calls"),
        )

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, and end when everyone was answered, or after that time."""
        self._serving = False
        self._door.drain()
        await ended(*self._tasks)
        await asyncio.gather(*(server.stop(grace_s) for server in (self._server, *self._ending)))
        self._crashes.end()

    def status(self) -> GrpcStatus:
        """How it is now."""
        return GrpcStatus(address=self.address, serving=self._serving, in_flight=self._door.in_flight)

    def _target(self, port: int) -> str:
        return f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    def _bound(self, port: int) -> tuple[Any, int]:
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((self._door,))
        target = self._target(port)
        if self._credentials is None:
            return server, server.add_insecure_port(target)
        return server, server.add_secure_port(target, self._credentials)

    def _heard_of_an_end(self, error: BaseException) -> None:
        why = (
            "a call's path isn't UTF-8" if isinstance(error, UnicodeDecodeError) else f"{type(error).__name__}: {error}"
        )
        self._seldom.warn("ended", "grpcio's server ended (%s), another one takes its place", why)
        self._ended.set()

    async def _keep_open(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _ENDED_S)  # a program may have its logging switched off
            self._ended.clear()
            if not await self._is_ending():
                continue
            self._serving = False
            self._let_end(self._server)
            while not self._serving:
                try:
                    self._server, _ = self._bound(self._port)
                    await self._server.start()
                    self._serving = True
                except (RuntimeError, OSError):  # it still has its port
                    await asyncio.sleep(_TRY_AGAIN_S)

    async def _look(self) -> None:
        """One look, and a pause. With many descriptors a search takes milliseconds, of which others get their part."""
        began = time.monotonic()
        await self._door.slow.look(lambda peers: asyncio.to_thread(find, peers, self._port))
        await asyncio.sleep(max(LOOK_S, _PAUSES * (time.monotonic() - began)))

    async def _is_ending(self) -> bool:
        """Whether it is this one."""
        for _ in range(10):
            if not self._server._server.is_running():
                return True
            await asyncio.sleep(0)  # it begins to end in a task of its own
        return False

    def _let_end(self, server: Any) -> None:
        grace_s = _LAST_CALLS_S if len(self._ending) < _ENDING else None  # a flood of them keeps no calls
        self._ending[server] = ending = asyncio.create_task(server.stop(grace_s), name="grpc-ending")
        ending.add_done_callback(lambda _: self._ending.pop(server, None))


def _options(http: Http) -> tuple[tuple[str, int], ...]:
    silent_ms = round(http.receive_timeout_s * 1000)
    return (
        ("grpc.so_reuseport", 0),  # else two agents would share a port, each getting half of the calls
        ("grpc.max_receive_message_length", http.max_body_bytes),  # also of one that is unpacked
        ("grpc.max_send_message_length", -1),
        # Else each call of a quick connection may send 8 MiB behind a message that is whole, in place of 64 KiB.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", _STREAMS),
        # Who never says what it wants, and who has gone without a word while it has calls.
        ("grpc.server_handshake_timeout_ms", silent_ms),
        ("grpc.keepalive_time_ms", silent_ms),
        ("grpc.keepalive_timeout_ms", silent_ms),
        ("grpc.http2.ping_timeout_ms", silent_ms),
        ("grpc.http2.max_pings_without_data", 0),
    )
