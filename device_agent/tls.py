"""The certificate of the HTTP door, and its renewal while the door is open."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from aios_edge.errors import SettingsError

log = logging.getLogger("device_agent")

LOOK_S = 2.0  # how often the files are looked at

_Look = tuple[tuple[int, int, int], ...]  # of both files: when they were written, their size, which ones they are


class DoorCertificate:
    """``context`` is what the door was opened with: what is loaded into it later is shown to new connections, and those
    that are open stay. ``pair``: key and certificate as it has them. Raises :class:`SettingsError` as
    :func:`server_context` does."""

    def __init__(self, cert: Path, key: Path) -> None:
        self.context = server_context(cert, key)
        self._files = (cert, key)
        self.pair = self._read()
        self._loaded = self._refused = self._look()
        self._told = False

    async def watch(self, emit: Callable[..., None]) -> None:
        """Load the files whenever they have changed, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(emit)

    def look(self, emit: Callable[..., None]) -> None:
        """Load the files if they have changed. Those that can't be used are told of when they still can't the next
        time: one of the two is replaced before the other."""
        look = self._look()
        if look == self._loaded or not look:
            return
        cert, key = self._files
        try:
            server_context(cert, key)  # a context that refuses a key has taken the certificate already
            pair = self._read()
            self.context.load_cert_chain(cert, key, password=_no_password)
        except (SettingsError, ssl.SSLError, ValueError, OSError) as error:
            if look == self._refused and not self._told:
                self._told = True
                log.error("the door keeps its certificate: %s", error)
                emit("certificate_refused", path=str(cert), detail=str(error))
            self._told &= look == self._refused
            self._refused = look
            return
        self.pair = pair
        self._loaded, self._told = look, False
        log.info("the door's certificate was read again: %s", cert)
        emit("certificate_loaded", path=str(cert))

    def _read(self) -> tuple[bytes, bytes]:
        cert, key = self._files
        return key.read_bytes(), cert.read_bytes()

    def _look(self) -> _Look:
        try:
            stats = [path.stat() for path in self._files]
        except OSError:  # it is being replaced
            return ()
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def door_certificate(cert: Path | None, key: Path | None) -> DoorCertificate | None:
    """None where there is none."""
    return None if cert is None or key is None else DoorCertificate(cert, key)


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with that certificate (and what leads to its authority, in one file).

    Raises :class:`SettingsError` for files that can't be read or don't belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for path, name in ((cert, "tls_cert"), (key, "tls_key")):
        try:
            path.open("rb").close()  # OpenSSL doesn't say which of the two
        except OSError as error:
            raise SettingsError(
                f"can't be read ({error.strerror})", where=f"http.{name} {path}", remedy="Check path and permissions"
            ) from error
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"certificate {cert} and key {key} can't be used ({getattr(error, 'reason', None) or error})",
            where="http.tls_cert",
            remedy="Give a PEM certificate and its own key, without a passphrase",
        ) from error
    return context


def _no_password() -> str:
    """Instead of OpenSSL's question on the terminal."""
    raise ValueError("the key has a passphrase")
