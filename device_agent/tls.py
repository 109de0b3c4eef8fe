"""The certificate of the HTTP door."""

from __future__ import annotations

import ssl
from pathlib import Path

from aios_edge.errors import SettingsError


def server_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with that certificate (and what leads to its authority, in one file); None without one.

    Raises :class:`SettingsError` for files that can't be read or don't belong together.
    """
    if cert is None or key is None:
        return None
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
