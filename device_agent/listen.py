"""Sockets to listen on, opened before anything else starts, so that a busy port costs nothing but a message."""

from __future__ import annotations

import contextlib
import errno
import socket
import stat
from pathlib import Path

from aios_edge.errors import ResourceError
from device_agent.settings import Http, split_bind

BACKLOG = 1024
SOCKET_MODE = 0o660  # owner and group; the group is how other services on the device get in


def open_sockets(http: Http) -> tuple[socket.socket, ...]:
    """TCP and Unix sockets, bound and listening; raises :class:`ResourceError` saying which is taken."""
    opened: list[socket.socket] = []
    try:
        if http.bind:
            opened.append(_tcp(http.bind, "http.bind"))
        if http.unix_socket is not None:
            opened.append(_unix(http.unix_socket))
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return tuple(opened)


def check_free(bind: str, *, where: str) -> None:
    """Whether an address can be bound, for servers that don't tell why not. Raises :class:`ResourceError`."""
    if split_bind(bind)[1]:
        _tcp(bind, where).close()


def address(sock: socket.socket, *, tls: bool = False) -> str:
    """What a client would be told: ``http://127.0.0.1:8080``, ``https://…`` or ``unix:/run/agent.sock``."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    scheme = "https" if tls else "http"
    return f"{scheme}://[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{scheme}://{name[0]}:{name[1]}"


def remove_socket_file(path: Path) -> None:
    """Remove our socket's file at the end."""
    with contextlib.suppress(OSError):
        path.unlink()


def _tcp(bind: str, where: str) -> socket.socket:
    host, port = split_bind(bind)
    try:
        family, _, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sets TCP_NODELAY on what it accepts. Without it Nagle's algorithm and the
        # client's delayed acknowledgement hold the second packet of every answer back for 40 ms.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ResourceError(f"{bind} can't be bound ({error.strerror})", where=where) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} on {host} is in use by another process",
                where=where,
                remedy=f"Stop that process (see: ss -ltnp 'sport = :{port}') or set another port in {where}",
            ) from error
        raise ResourceError(
            f"{bind} can't be bound ({error.strerror})", where=where, remedy="Choose an address of this machine"
        ) from error
    return sock


def _unix(path: Path) -> socket.socket:
    where = f"http.unix_socket {path}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ResourceError("is a file and no socket", where=where, remedy="Choose another path")
        if path.exists():
            if _answers(path):
                raise ResourceError(
                    "another process listens there", where=where, remedy="Stop it, or choose another path"
                )
            path.unlink()  # left behind by one that was killed
        sock.bind(str(path))
        path.chmod(SOCKET_MODE)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ResourceError(
            f"can't be bound ({error.strerror or error})", where=where, remedy="Check folder, permissions and length"
        ) from error
    except ResourceError:
        sock.close()
        raise
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
