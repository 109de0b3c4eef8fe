"""grpcio's asyncio server on the address of ``[http] grpc_bind``, with the certificate of the HTTP door."""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from aios_edge.errors import ResourceError
from device_agent.desk import FrontDesk
from device_agent.grpc_door.callers import Callers
from device_agent.grpc_door.door import GrpcDoor
from device_agent.listen import check_free
from device_agent.settings import Http, split_bind
from device_agent.status import GrpcStatus
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.values import Completion

_STREAMS = 256  # calls at once on one connection; the others wait at the client
_WHERE = "http.grpc_bind"


def make_server(
    http: Http, front: FrontDesk, tenants: TenantDesks | None, books: TenantBooks, record: Callable[[Completion], None]
) -> GrpcServer:
    """The door and the server under it. Raises :class:`ResourceError`."""
    return GrpcServer(GrpcDoor(Callers(front, tenants, books, record)), http)


class GrpcServer:
    """Bound when it is made, so that a busy port costs only a message: raises :class:`ResourceError`."""

    def __init__(self, door: GrpcDoor, http: Http) -> None:
        host, port = split_bind(http.grpc_bind)
        check_free(http.grpc_bind, where=_WHERE)
        self._door = door
        self._serving = False
        silent_ms = round(http.receive_timeout_s * 1000)
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),  # else two agents would share a port, each getting half of the calls
                ("grpc.max_receive_message_length", http.max_body_bytes),  # also of one that is unpacked
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", _STREAMS),
                # Who never says what it wants, and who has gone without a word while it has calls.
                ("grpc.server_handshake_timeout_ms", silent_ms),
                ("grpc.keepalive_time_ms", silent_ms),
                ("grpc.keepalive_timeout_ms", silent_ms),
                ("grpc.http2.ping_timeout_ms", silent_ms),
                ("grpc.http2.max_pings_without_data", 0),
            )
        )
        self._server.add_generic_rpc_handlers((door,))
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if http.tls_cert is None or http.tls_key is None:
                bound = self._server.add_insecure_port(target)
            else:
                pair = http.tls_key.read_bytes(), http.tls_cert.read_bytes()
                bound = self._server.add_secure_port(target, grpc.ssl_server_credentials((pair,)))
        except (RuntimeError, OSError) as error:
            raise ResourceError(f"{http.grpc_bind} can't be bound ({error})", where=_WHERE) from error
        scheme = "grpc" if http.tls_cert is None else "grpcs"
        self.address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound}"

    async def start(self) -> None:
        """Begin to accept."""
        logging.getLogger("grpc._cython.cygrpc").addFilter(_no_early_ends)
        await self._server.start()
        self._serving = True

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, and end when everyone was answered, or after that time."""
        self._serving = False
        self._door.drain()
        await self._server.stop(grace_s)

    def status(self) -> GrpcStatus:
        """How it is now."""
        return GrpcStatus(address=self.address, serving=self._serving, in_flight=self._door.in_flight)


def _no_early_ends(record: logging.LogRecord) -> bool:
    """A call may end before its answer is sent: grpcio has a traceback for each, if it hasn't heard of the end yet."""
    return not record.getMessage().startswith("ExecuteBatchError")
