"""HTTP without a client's good manners: bytes out, whole answers in, over TCP, a Unix socket or TLS."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 20.0  # until something that should happen is said not to have happened


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where to connect: an address for TCP, a path for the Unix socket; ``tls`` wraps the first."""

    tcp: tuple[str, int] | None = None
    unix: Path | None = None
    tls: ssl.SSLContext | None = None

    @staticmethod
    def of(url: str, tls: ssl.SSLContext | None = None) -> Door:
        """An agent's TCP door, by its URL."""
        host, port = url.rpartition("//")[2].split(":")
        return Door(tcp=(host, int(port)), tls=tls)

    def connect(self) -> Wire:
        """A new connection."""
        if self.unix is not None:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(LIMIT_S)
            sock.connect(str(self.unix))
            return Wire(sock)
        assert self.tcp is not None
        sock = socket.create_connection(self.tcp, timeout=LIMIT_S)
        return Wire(sock if self.tls is None else self.tls.wrap_socket(sock, server_hostname="localhost"))


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        """Its body as JSON."""
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        """Whether it says that the connection ends with it."""
        return self.headers.get("connection") == "close"


class Wire:
    """A connection. ``hear`` returns None at its end and raises :class:`ConnectionError` within an answer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._left = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sock.close()

    def say(self, data: bytes) -> None:
        """Send it all; a server that has closed already is no error here: what it said is read all the same."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.sock.sendall(data)

    def hear(self, *, head_only: bool = False) -> Heard | None:
        """The next answer, interim ones (1xx) skipped. ``head_only``: to a HEAD."""
        while True:
            head = self._until(b"\r\n\r\n")
            if head is None:
                return None
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ")[1])
            if status >= 200:
                break
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        length = 0 if head_only else int(headers["content-length"])
        while len(self._left) < length:
            self._left += self._more()
        body, self._left = self._left[:length], self._left[length:]
        return Heard(status=status, headers=headers, body=body)

    def rest(self) -> list[Heard]:
        """Every answer until the connection ends."""
        found = []
        while (heard := self.hear()) is not None:
            found.append(heard)
        return found

    def _until(self, end: bytes) -> bytes | None:
        while end not in self._left:
            try:
                data = self.sock.recv(65536)
            except (ConnectionResetError, ssl.SSLEOFError):
                data = b""
            if not data:
                if self._left:
                    raise ConnectionError(f"ended within a head: {self._left[:80]!r}")
                return None
            self._left += data
        head, self._left = self._left.split(end, 1)
        return head

    def _more(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("ended within a body")
        return data


def post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a POST with its right length."""
    lines = (f"POST {path} HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode("latin-1") + body
