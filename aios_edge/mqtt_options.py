"""How to reach a broker: the options as a user writes them, and what they come to."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from aios_edge.errors import SettingsError


class MqttOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the broker. ``url`` is ``mqtt://host[:1883]`` or ``mqtts://host[:8883]``.

    ``ca`` replaces the system's trust store; ``cert`` and ``key`` are the client's own (mTLS).
    """

    url: str
    client_id: str | None = None
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = 30
    backoff_min_s: float = 0.5
    backoff_max_s: float = 30.0


class BrokerAddress(msgspec.Struct, frozen=True):
    """What the options come to, checked and read."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    password: str | None


def broker_address(options: MqttOptions) -> BrokerAddress:
    """Check the options and read the files they name; raises :class:`SettingsError`."""
    parts = urlsplit(options.url)
    where = "mqtt.url"
    try:
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"'{options.url}': {error}", where=where, remedy="Write mqtt://host:1883") from error
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise SettingsError(f"'{options.url}' is no broker address", where=where, remedy="Write mqtt://host:1883")
    if parts.password is not None:
        raise SettingsError("has a password in it", where=where, remedy="Use mqtt.username and mqtt.password_file")
    if (options.cert is None) != (options.key is None):
        raise SettingsError("cert and key go together", where="mqtt.cert", remedy="Give both mqtt.cert and mqtt.key")
    tls = None
    if parts.scheme == "mqtts":
        try:
            tls = ssl.create_default_context(cafile=options.ca)
            if options.cert is not None:
                tls.load_cert_chain(options.cert, options.key)
        except OSError as error:
            raise SettingsError(
                f"the TLS files can't be used: {error}", where="mqtt.ca", remedy="Check mqtt.ca, mqtt.cert and mqtt.key"
            ) from error
    elif options.ca or options.cert:
        raise SettingsError("has TLS files but no TLS", where=where, remedy="Write mqtts://host:8883")
    password = None
    if options.password_file is not None:
        try:
            password = options.password_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"can't be read: {error}", where=f"mqtt.password_file {options.password_file}", remedy="Check the file"
            ) from error
    return BrokerAddress(parts.hostname, port or (8883 if tls else 1883), tls, password)
