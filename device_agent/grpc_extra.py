"""The way to the gRPC door for those who ask for it: grpcio takes memory, and may not be installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from aios_edge.errors import MissingExtra

if TYPE_CHECKING:
    from device_agent.desk import FrontDesk
    from device_agent.grpc_door.server import GrpcServer
    from device_agent.inbound import Inbound
    from device_agent.settings import Http
    from device_agent.tenant_books import TenantBooks
    from device_agent.tenant_desk import TenantDesks
    from device_agent.tls import DoorCertificate
    from device_agent.values import Completion

    MakeGrpc = Callable[
        [
            Http,
            FrontDesk,
            TenantDesks | None,
            TenantBooks,
            Callable[[Completion], None],
            Inbound,
            DoorCertificate | None,
        ],
        GrpcServer,
    ]


def load_grpc() -> MakeGrpc:
    """What makes the server; raises :class:`MissingExtra` where grpcio or protobuf isn't there."""
    # Its library writes a line to stderr for whatever a client does wrong; the caller's own choice stands.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from device_agent.grpc_door.server import make_server
    except ModuleNotFoundError as error:
        package = "protobuf" if error.name and error.name.startswith("google") else "grpcio"
        raise MissingExtra(package, "grpc", why="[http] grpc_bind") from error
    return make_server
