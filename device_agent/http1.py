"""A small HTTP/1.1 client on asyncio streams and httptools' parser: keep-alive, TLS, deadlines. For the cloud."""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httptools

from aios_edge.errors import RemoteError, SettingsError

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_IDLE = 32  # connections kept for reuse
_READ_BYTES = 256 * 1024


@dataclass(frozen=True)
class Response:
    """A whole response; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class AnswerSize:
    """How much of an answer's body may be read, and how much was. Reading stops with the piece that exceeds it."""

    limit_bytes: int = MAX_RESPONSE_BYTES
    read_bytes: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether there was more than may be read."""
        return self.read_bytes > self.limit_bytes


@dataclass
class _Parse:
    """Callbacks of the parser."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    keep_alive: bool = False
    parser: httptools.HttpResponseParser | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True
        # Only here the parser still knows how this message was framed.
        self.keep_alive = self.parser is not None and self.parser.should_keep_alive()


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HttpClient:
    """One origin. Raises :class:`RemoteError` for everything that is the other side's or the network's fault, and
    :class:`asyncio.TimeoutError` when ``timeout_s`` passes."""

    def __init__(
        self, url: str, *, ca: Path | None = None, client_cert: Path | None = None, client_key: Path | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"{url!r} is not an http(s) URL", remedy="Write http://host:port")
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._netloc = parts.netloc.rpartition("@")[2]
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = _tls(ca, client_cert, client_key)
        self._idle: list[_Connection] = []

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout_s: float,
        size: AnswerSize | None = None,
    ) -> Response:
        """Send one request and read the whole answer within ``timeout_s``; ``size`` tells how much was read."""
        size = size or AnswerSize()
        return await asyncio.wait_for(self._request(method, path, headers or {}, body, size), timeout_s)

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, size: AnswerSize
    ) -> Response:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        try:
            head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        except UnicodeEncodeError as error:
            raise RemoteError("a header can't be sent: it isn't Latin-1 text", where=self.url) from error
        while self._idle:
            connection = self._idle.pop()
            if connection[1].is_closing() or connection[0].at_eof():
                connection[1].close()
                continue
            try:
                return await self._exchange(connection, head, body, size, reused=True)
            except _Stale:
                continue  # the server closed it while it was idle: nothing was read, so sending again is safe
        try:
            connection = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_READ_BYTES)
        except (OSError, ssl.SSLError) as error:
            raise RemoteError(f"can't connect ({error})", where=self.url) from error
        return await self._exchange(connection, head, body, size, reused=False)

    async def _exchange(
        self, connection: _Connection, head: bytes, body: bytes, size: AnswerSize, *, reused: bool
    ) -> Response:
        reader, writer = connection
        started = time.monotonic()
        parse = _Parse()
        parser = parse.parser = httptools.HttpResponseParser(parse)
        keep = False
        received = False
        try:
            writer.write(head)
            if body:
                writer.write(body)
            await writer.drain()
            while not parse.complete:
                data = await reader.read(_READ_BYTES)
                if not data:
                    break
                received = True
                parser.feed_data(data)
                size.read_bytes = len(parse.body)
                if size.cut_off:
                    raise RemoteError(f"the answer is longer than {size.limit_bytes} bytes", where=self.url)
            if not parse.complete:
                if reused and not received:
                    raise _Stale
                raise RemoteError(
                    f"the connection ended {time.monotonic() - started:.3f} s after the request, before the answer",
                    where=self.url,
                )
            keep = parse.keep_alive
            return Response(parser.get_status_code(), parse.headers, bytes(parse.body))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise RemoteError(f"the answer is not HTTP ({error})", where=self.url) from error
        except OSError as error:
            if reused and not received:
                raise _Stale from error
            raise RemoteError(f"the connection failed ({error})", where=self.url) from error
        finally:
            if keep and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                writer.close()


def _tls(ca: Path | None, client_cert: Path | None, client_key: Path | None) -> ssl.SSLContext:
    """What we trust, and who we are. Raises :class:`SettingsError` naming the file that can't be used."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"the CA file can't be used ({error})", where=str(ca), remedy="Give a PEM file") from error
    if client_cert is None:
        return context
    try:
        # A key behind a passphrase would be asked for on the terminal; a daemon has none.
        context.load_cert_chain(client_cert, client_key, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        where = f"{client_cert} with {client_key}" if client_key else str(client_cert)
        raise SettingsError(
            f"certificate and key can't be used ({error})",
            where=where,
            remedy="Give PEM files that belong together; the key without a passphrase",
        ) from error
    return context


class _Stale(Exception):
    """A kept connection turned out to be closed; never leaves this module."""
