"""Who asked for what: a file of JSON lines for each tenant, ``audit/<tenant>.jsonl`` under the agent's own folder.

What was asked and what became of it, never what was in it. A thread writes, so that a slow disk delays no answer; a
kill loses what it hadn't written yet. Each tenant's share of the disk is bounded: the file is renamed to ``….jsonl.1``,
over the one before, when it has half of it. A disk that refuses is said in the log, and stops nobody.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

log = logging.getLogger("device_agent.audit")

FOLDER = "audit"
MAX_WAITING = 10_000  # lines that a hanging disk may keep in memory
_REOPEN_S = 5.0


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    def write(self, record: AuditRecord) -> None:
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
        self._thread.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        if self._lost:
            log.error("the audit lacks %d lines: the disk was too slow", self._lost)

    def _write_waiting(self) -> None:
        self._writing = False  # before the last look, so that no line is left behind
        while self._waiting:
            tenant, line = self._waiting.popleft()
            self._files[tenant].append(line)


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

    def append(self, line: bytes) -> None:
        """Write a line; one that can't be written is lost, and the log says so once."""
        if time.monotonic() < self._closed_until:
            self._lost += 1
            return
        try:
            if self._fd is not None and self._size_bytes and self._size_bytes + len(line) > self._limit_bytes:
                self.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            fd = self._open() if self._fd is None else self._fd
            self._put(fd, b"\n" + line if self._torn else line)
        except OSError as error:
            if not self._lost:
                log.error("%s can't be written: %s; serving goes on without it", self._path, error.strerror)
            self._lost += 1
            self._closed_until = time.monotonic() + _REOPEN_S
            self.close()
            return
        if self._lost:
            log.warning("%s is written again; %d lines are missing", self._path, self._lost)
            self._lost = 0

    def close(self) -> None:
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
