"""The door's certificate for grpcio: asked for with each handshake, in a thread of grpcio's."""

from __future__ import annotations

from typing import Any

import grpc

from device_agent.tls import DoorCertificate


def credentials(certificate: DoorCertificate) -> Any:
    """Those of a server that shows what the HTTP door shows. A pair that grpcio can't use changes nothing there."""
    shown = certificate.pair

    def renewed() -> Any:
        nonlocal shown
        now = certificate.pair
        if now is shown:
            return None
        shown = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(shown), renewed)


def _configuration(pair: tuple[bytes, bytes]) -> Any:
    return grpc.ssl_server_certificate_configuration((pair,))
