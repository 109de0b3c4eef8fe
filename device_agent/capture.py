"""Requests with their answers as files, for people to label: a folder for each tenant that wants one.

    <capture_dir>/<milliseconds since 1970>-<the agent's number>.json

A thread of its own writes them, each under another name first, so that a file is whole or isn't there. The folder
holds ``capture_bytes`` at most, the oldest files go first; what else lies there is left alone. A disk that refuses
costs files, is told of, and keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from aios_edge.telemetry import rfc3339
from device_agent.tenants import Tenant

log = logging.getLogger("device_agent.capture")

MAX_WAITING_BYTES = 16_000_000  # of bodies that a slow disk may keep in memory, all tenants together
BLOCK_BYTES = 4096  # a file takes whole blocks
_AGAIN_S = 5.0  # until a disk that refused is tried again
_OURS = re.compile(r"\d{13}-\d+\.json")
_UNFINISHED = ".new"


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """One request and what it was answered. Bodies are as they were; ``…_json_length`` as in the protocol, None: JSON
    alone."""

    model: str
    request_id: int | None
    client_id: str | None
    route: str | None
    reason: str | None
    request: bytes
    request_json_length: int | None
    answer: bytes
    answer_json_length: int | None

    def document(self, tenant: str, ts: str) -> bytes:
        """The file. A body of JSON is in it as a document, one with binary tensors in base64."""
        head = {
            "ts": ts,
            "tenant": tenant,
            "model": self.model,
            "request_id": self.request_id,
            "id": self.client_id,
            "route": self.route,
            "reason": self.reason,
        }
        request = _body("request", self.request, self.request_json_length)
        answer = _body("answer", self.answer, self.answer_json_length)
        return msgspec.json.encode({**head, **request, **answer})


class Captures:
    """What is kept for the tenants that have a ``capture_dir``. ``emit`` hears when a folder can't be written, and when
    it can again. Methods belong to the event loop."""

    def __init__(
        self,
        tenants: Iterable[Tenant],
        emit: Callable[..., None],
        draw: Callable[[], float] = random.random,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._tenants = {tenant.id: tenant for tenant in tenants if tenant.capture_dir is not None}
        self._folders = {
            name: _Folder(tenant.capture_dir, tenant.capture_bytes)
            for name, tenant in self._tenants.items()
            if tenant.capture_dir is not None
        }
        self._emit = emit
        self._draw = draw
        self._wall = wall
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="capture")

    def wants(self, tenant: str) -> Tenant | None:
        """Whether this tenant's next request is one of those that are kept; it may still be private."""
        known = self._tenants.get(tenant)
        return known if known is not None and self._draw() < known.capture_share else None

    def counts(self, tenant: str) -> tuple[int, int] | None:
        """Files written since start, and requests that should have become one and didn't; None: it has no folder."""
        folder = self._folders.get(tenant)
        return None if folder is None else (folder.written, folder.lost)

    def keep(self, tenant: str, captured: Captured) -> None:
        """Write soon."""
        folder, size = self._folders[tenant], len(captured.request) + len(captured.answer)
        with self._lock:
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                folder.lost += 1
                return
            self._waiting_bytes += size
        loop, now = asyncio.get_running_loop(), self._wall()
        self._disk.submit(self._write, loop, tenant, captured, now)

    def close(self) -> None:
        """Write what waits. Not for the event loop."""
        self._disk.shutdown(wait=True)

    def _write(self, loop: asyncio.AbstractEventLoop, tenant: str, captured: Captured, now: float) -> None:
        folder = self._folders[tenant]
        try:
            name = f"{int(now * 1000):013d}-{captured.request_id or 0}.json"
            news = folder.put(name, captured.document(tenant, rfc3339(now)))
        except Exception:  # whatever it is, it must not end the thread unheard
            folder.lost += 1
            log.exception("a request of %s was not captured", tenant)
            return
        finally:
            with self._lock:
                self._waiting_bytes -= len(captured.request) + len(captured.answer)
        if news is not None:
            kind, detail = news
            with contextlib.suppress(RuntimeError):  # the agent has stopped
                loop.call_soon_threadsafe(lambda: self._emit(kind, tenant=tenant, path=str(folder.path), detail=detail))


class _Folder:
    """One tenant's files, for one thread."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.written = 0
        self.lost = 0
        self._limit_bytes = limit_bytes
        self._files: deque[tuple[str, int]] | None = None  # oldest first, with what they take; None: not looked at yet
        self._size_bytes = 0
        self._why: str | None = None  # it can't be written
        self._closed_until = 0.0

    def put(self, name: str, content: bytes) -> tuple[str, str] | None:
        """Write a file, or lose it; returns the kind of event and the detail when that has changed."""
        if time.monotonic() < self._closed_until:
            self.lost += 1
            return None
        try:
            if self._files is None:
                self._files = self._look()
            takes = _takes(len(content))
            if takes > self._limit_bytes:
                self.lost += 1
                return None
            self._make_room(self._files, takes)
            self._write(name, content)
            self._files.append((name, takes))
            self._size_bytes += takes
        except OSError as error:
            self.lost += 1
            self._files = None  # whatever became of them
            self._closed_until = time.monotonic() + _AGAIN_S
            before, self._why = self._why, error.strerror or str(error)
            if before is not None:
                return None
            log.error("%s can't be written: %s; serving goes on without it", self.path, self._why)
            return "capture_failed", self._why
        self.written += 1
        if self._why is None:
            return None
        self._why = None
        log.warning("%s is written again; %d requests are missing", self.path, self.lost)
        return "capture_resumed", f"{self.lost} requests are missing"

    def _look(self) -> deque[tuple[str, int]]:
        """What is there of an earlier start."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        files: list[tuple[str, int]] = []
        for file in self.path.iterdir():
            if _OURS.fullmatch(file.name):
                files.append((file.name, _takes(file.lstat().st_size)))
            elif file.suffix == _UNFINISHED and _OURS.fullmatch(file.stem):
                file.unlink()
        self._size_bytes = sum(takes for _, takes in files)
        return deque(sorted(files))

    def _make_room(self, files: deque[tuple[str, int]], takes: int) -> None:
        while files and self._size_bytes + takes > self._limit_bytes:
            name, freed = files.popleft()
            (self.path / name).unlink(missing_ok=True)  # somebody may have taken it
            self._size_bytes -= freed

    def _write(self, name: str, content: bytes) -> None:
        fresh = self.path / (name + _UNFINISHED)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(content)
            fresh.replace(self.path / name)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def _takes(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _body(name: str, body: bytes, json_length: int | None) -> dict[str, Any]:
    if json_length is None:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            msgspec.json.decode(body, type=msgspec.Raw)  # whole, and nothing behind it
            return {name: msgspec.Raw(body)}
    return {f"{name}_base64": base64.b64encode(body).decode(), f"{name}_json_length": json_length}
