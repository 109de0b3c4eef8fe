"""Who asked for what: a file of JSON lines for each tenant, ``audit/<tenant>.jsonl`` under the agent's own folder.

What was asked and what became of it, never what was in it. A thread writes what has gathered, several times a second,
so that neither a slow disk nor the change of threads delays answers; a kill loses what it hadn't written yet. Each
tenant's share of the disk is bounded: at half of it the file is renamed to ``….jsonl.1``, over the one before.
A disk that refuses is said in the log, and stops nobody.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import msgspec

from aios_edge.telemetry import rfc3339
from device_agent.values import Completion

log = logging.getLogger("device_agent.audit")

FOLDER = "audit"
CLIP_CHARS = 200  # of what a client chose freely
MAX_WAITING = 10_000  # lines that a hanging disk may keep in memory
_GATHER_S = 0.1
_REOPEN_S = 5.0
_PIECE_BYTES = 65_536  # that are written at once


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``request_id`` is the agent's number, ``id`` the client's; None: it didn't come that far.

    ``status`` None: the client went away before it was answered. ``bytes_in``, ``bytes_out``: of the bodies.
    """

    ts: str  # when it ended
    tenant: str
    request_id: int | None
    id: str | None
    method: str
    path: str
    model: str | None
    route: str | None
    reason: str | None
    status: int | None
    bytes_in: int
    bytes_out: int


def audit_record(
    tenant: str,
    done: Completion | None,
    *,
    method: str,
    path: str,
    model: str | None,
    limit: str | None,
    status: int | None,
    bytes_in: int,
    bytes_out: int,
) -> AuditRecord:
    """What is written down of a request that ends now; ``done`` None: no inference was answered, and ``limit`` is the
    tenant's that kept it out, if one did."""
    return AuditRecord(
        ts=rfc3339(time.time()),
        tenant=tenant,
        request_id=done.request_id if done else None,
        id=done.client_id[:CLIP_CHARS] if done and done.client_id else None,
        method=method,
        path=path[:CLIP_CHARS],
        model=model[:CLIP_CHARS] if model else None,
        route=done.route if done else None,
        reason=done.reason if done else limit,
        status=status,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )


class Record(Protocol):
    """A line; ``tenant`` says whose."""

    @property
    def tenant(self) -> str: ...


class AuditLog:
    """``limits_bytes``: how much of the disk each tenant's audit may have."""

    def __init__(self, state_dir: Path, limits_bytes: Mapping[str, int]) -> None:
        self._files = {
            tenant: _AuditFile(state_dir / FOLDER / f"{tenant}.jsonl", limit_bytes // 2)
            for tenant, limit_bytes in limits_bytes.items()
        }
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._lost = 0
        self._writing = False
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    def write(self, record: Record) -> None:
        """Write soon."""
        if len(self._waiting) >= MAX_WAITING:
            self._lost += 1
            return
        self._waiting.append((record.tenant, msgspec.json.encode(record) + b"\n"))
        if not self._writing:
            self._writing = True
            self._thread.submit(self._write_waiting)

    def close(self) -> None:
        """Write what waits."""
        self._closing.set()
        self._thread.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        if self._lost:
            log.error("the audit lacks %d lines: the disk was too slow", self._lost)

    def _write_waiting(self) -> None:
        self._closing.wait(_GATHER_S)
        self._writing = False  # before the last look, so that no line is left behind
        lines: dict[str, list[bytes]] = {}
        while self._waiting:
            tenant, line = self._waiting.popleft()
            lines.setdefault(tenant, []).append(line)
        for tenant, of_tenant in lines.items():
            self._files[tenant].append(of_tenant)


class _AuditFile:
    """One file, for one thread."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._fd: int | None = None
        self._size_bytes = 0
        self._torn = False  # the last line on disk has no end
        self._lost = 0
        self._closed_until = 0.0

    def append(self, lines: list[bytes]) -> None:
        """Write whole lines; those that can't be written are lost, and the log says so once."""
        for piece in _pieces(lines, min(_PIECE_BYTES, self._limit_bytes // 8)):
            self._append(piece)

    def _append(self, piece: bytes) -> None:
        if time.monotonic() < self._closed_until:
            self._lost += piece.count(b"\n")
            return
        try:
            if self._fd is not None and self._size_bytes and self._size_bytes + len(piece) > self._limit_bytes:
                self.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            fd = self._open() if self._fd is None else self._fd
            self._put(fd, b"\n" + piece if self._torn else piece)
        except OSError as error:
            if not self._lost:
                log.error("%s can't be written: %s; serving goes on without it", self._path, error.strerror)
            self._lost += piece.count(b"\n")
            self._closed_until = time.monotonic() + _REOPEN_S
            self.close()
            return
        if self._lost:
            log.warning("%s is written again; %d lines are missing", self._path, self._lost)
            self._lost = 0

    def close(self) -> None:
        """Until the next line."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = fd = os.open(self._path, flags, 0o600)
        os.fchmod(fd, 0o600)
        self._size_bytes = os.fstat(fd).st_size
        self._torn = bool(self._size_bytes) and os.pread(fd, 1, self._size_bytes - 1) != b"\n"
        return fd

    def _put(self, fd: int, data: bytes) -> None:
        while data:
            written = os.write(fd, data)
            self._size_bytes += written
            self._torn = not data[:written].endswith(b"\n")
            data = data[written:]


def _pieces(lines: list[bytes], most_bytes: int) -> Iterator[bytes]:
    """The lines, joined to pieces of at most that size, or of one line."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > most_bytes:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield b"".join(piece)
