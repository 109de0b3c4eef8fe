"""The TCP connections under grpcio's calls. It shows nothing of a message before its end; the kernel counts the bytes.

They are found among this process's descriptors, by the client's address. The descriptors are grpcio's, and may become
others' at any time: whatever is done with one, whose it is is looked at.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

#: ``struct tcp_info`` of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, since Linux 4.1.
_COUNTS = struct.Struct("=120xQQ")
_DESCRIPTORS = Path("/proc/self/fd")

Address = tuple[str, int]


class Counts(NamedTuple):
    """Bytes since the connection began: that came from the client, and that it has acknowledged."""

    received: int
    acknowledged: int


class Wire:
    """One of them."""

    def __init__(self, descriptor: int, client: Address) -> None:
        self._descriptor = descriptor
        self._client = client

    def counts(self) -> Counts | None:
        """None: it has ended, or this kernel doesn't count."""
        with contextlib.suppress(OSError, struct.error), _lent(self._descriptor) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS.size)
            acknowledged, received = _COUNTS.unpack(info)
            if _client(sock) == self._client:
                return Counts(received, acknowledged)
        return None

    def cut(self) -> None:
        """End it, with all its calls."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as sock:
            if _client(sock) == self._client:
                sock.shutdown(socket.SHUT_RDWR)


def find(peers: Collection[str], port: int) -> dict[str, Wire]:
    """Those of ``peers``, as grpcio writes them (``ipv4:127.0.0.1:50000``, ``ipv6:%5B::1%5D:50000``), that came in on
    ``port`` and are there now."""
    wanted = {address: peer for peer in peers if (address := _address(peer)) is not None}
    found: dict[str, Wire] = {}
    for descriptor in _descriptors():
        with contextlib.suppress(OSError), _lent(descriptor) as sock:
            client = _client(sock)
            if client is not None and client in wanted and sock.getsockname()[1] == port:
                found[wanted[client]] = Wire(descriptor, client)
    return found


def _descriptors() -> list[int]:
    try:
        return [int(path.name) for path in _DESCRIPTORS.iterdir()]
    except OSError:
        return []


@contextlib.contextmanager
def _lent(descriptor: int) -> Iterator[socket.socket]:
    """It stays open, and blocks or doesn't as before. Raises :class:`OSError` where it is no socket."""
    sock = socket.socket(fileno=descriptor)
    try:
        yield sock
    finally:
        sock.detach()


def _client(sock: socket.socket) -> Address | None:
    name = sock.getpeername()
    return _plain(name[0], name[1]) if sock.family in (socket.AF_INET, socket.AF_INET6) else None


def _address(peer: str) -> Address | None:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _plain(host.strip("[]"), int(port))
    except ValueError:
        return None


def _plain(host: str, port: int) -> Address:
    """IPv4 stays itself where the door is one of IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address), port
