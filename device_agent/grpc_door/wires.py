"""The TCP connections under grpcio's calls. It shows nothing of a message before its end; the kernel counts the bytes.

They are found among this process's descriptors, by the client's address. The descriptors are grpcio's, and may become
others' at any time: whatever is done with one, whose it is is looked at.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import resource
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from device_agent.seldom import Seldom

#: ``struct tcp_info`` of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, since Linux 4.1.
_COUNTS = struct.Struct("=120xQQ")
_DESCRIPTORS = "/proc/self/fd"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

Address = tuple[str, int]

_seldom = Seldom(logging.getLogger("device_agent.grpc"))


class Counts(NamedTuple):
    """Bytes since the connection began: that came from the client, and that it has acknowledged."""

    received: int
    acknowledged: int


class Wire:
    """One of them. ``client``: its address, as the socket has it."""

    def __init__(self, descriptor: int, client: Any) -> None:
        self._descriptor = descriptor
        self._client = client

    def counts(self) -> Counts | None:
        """None: it has ended, or this kernel doesn't count, which is in the log."""
        with contextlib.suppress(OSError), _lent(self._descriptor) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS.size)
            if sock.getpeername() == self._client:
                return _counted(info)
        return None

    def cut(self) -> None:
        """End it, with all its calls."""
        with contextlib.suppress(OSError), _lent(self._descriptor) as sock:
            if sock.getpeername() == self._client:
                sock.shutdown(socket.SHUT_RDWR)


def find(peers: Collection[str], port: int) -> dict[str, Wire]:
    """Those of ``peers``, as grpcio writes them (``ipv4:127.0.0.1:50000``, ``ipv6:%5B::1%5D:50000``), that came in on
    ``port`` and are there now. Some microseconds for each descriptor of this process."""
    wanted = {address: peer for peer in peers if (address := _address(peer)) is not None}
    ports = {address[1] for address in wanted}
    found: dict[str, Wire] = {}
    for descriptor in _descriptors():
        with contextlib.suppress(OSError), _lent(descriptor) as sock:
            if sock.family not in _FAMILIES:
                continue
            client = sock.getpeername()
            if client[1] in ports and sock.getsockname()[1] == port:
                peer = wanted.get(_plain(client[0], client[1]))
                if peer is not None:
                    found[peer] = Wire(descriptor, client)
    return found


def _counted(info: bytes) -> Counts | None:
    """A call that came on it takes bytes: a kernel that has seen none doesn't count, as one that tells less."""
    acknowledged, received = _COUNTS.unpack(info) if len(info) == _COUNTS.size else (0, 0)
    if received:
        return Counts(received, acknowledged)
    _seldom.warn("uncounted", "this kernel doesn't count the bytes of a connection: slow gRPC clients are not refused")
    return None


def _descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir(_DESCRIPTORS)]  # noqa: PTH208  a fifth of the time
    except OSError:  # none is left to look with
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@contextlib.contextmanager
def _lent(descriptor: int) -> Iterator[socket.socket]:
    """It stays open, and blocks or doesn't as before. Raises :class:`OSError` where it is no socket."""
    sock = socket.socket(fileno=descriptor)
    try:
        yield sock
    finally:
        sock.detach()


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
