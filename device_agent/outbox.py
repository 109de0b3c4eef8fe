"""Messages that wait for the broker, on disk, bounded in bytes.

Write-ahead log with ``synchronous=NORMAL``: what was put survives a killed process, but the last moments may be
lost with the power. ``FULL`` survives that too, at about a hundredth of the speed and one flash write per message.

A disk that refuses is a state (:attr:`OutboxStats.error`), not an exception: the agent serves on without it.
Blocking; used from one thread at a time, which need not be the one that opened it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["telemetry", "event"]
#: What a row costs besides topic and payload.
ROW_BYTES = 32
_KINDS: tuple[Kind, ...] = ("telemetry", "event")  # in the order they are dropped

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    qos INTEGER NOT NULL,
    size INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS message_kind ON message (kind, id, size);
CREATE TABLE IF NOT EXISTS dropped (kind TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""


class OutboxMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A stored message; ``id`` rises in the order of putting and is never used twice."""

    id: int
    kind: Kind
    topic: str
    payload: bytes
    qos: int


class OutboxStats(msgspec.Struct, frozen=True, kw_only=True):
    """``dropped_*`` count since the outbox was made, across restarts; ``error`` is the last refusal of the disk,
    None again once it takes messages; ``quarantined`` names a damaged file that was set aside."""

    depth: int = 0
    depth_bytes: int = 0
    dropped_telemetry: int = 0
    dropped_events: int = 0
    error: str | None = None
    quarantined: str | None = None


class Outbox:
    """First in, first out. ``max_bytes`` counts topics, payloads and ``ROW_BYTES`` each; the file is larger by its
    log and free pages."""

    def __init__(
        self, path: Path, *, max_bytes: int = 16_000_000, synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    ) -> None:
        self._path, self._max_bytes, self._synchronous = path, max_bytes, synchronous
        self._stats = OutboxStats()
        self._db: sqlite3.Connection | None = None
        self._open()

    @property
    def stats(self) -> OutboxStats:
        """Depth, drops and the disk's state, without touching the disk."""
        return self._stats

    def put(self, kind: Kind, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Store a message, at the cost of the oldest telemetry, then of the oldest events. False when it could
        not be stored: too large for the bound (counted as dropped), or the disk refused."""
        size = len(topic.encode()) + len(payload) + ROW_BYTES
        if self._db is None:
            self._open()  # the disk may have room again
        if self._db is None:
            return False
        try:
            with self._db as db:
                lost, fits = self._make_room(db, size, kind)
                if fits:
                    db.execute(
                        "INSERT INTO message (kind, topic, payload, qos, size) VALUES (?, ?, ?, ?, ?)",
                        (kind, topic, payload, qos, size),
                    )
                else:
                    lost[kind] = lost.get(kind, 0) + 1
                for name, count in lost.items():
                    db.execute(
                        "INSERT INTO dropped VALUES (?, ?) ON CONFLICT (kind) DO UPDATE SET count = count + ?",
                        (name, count, count),
                    )
            self._measure(self._db)
        except sqlite3.Error as error:
            self._failed(error)
            return False
        return fits

    def next(self, after_id: int, limit: int) -> tuple[OutboxMessage, ...]:
        """The oldest messages behind ``after_id``."""
        if self._db is None:
            return ()
        try:
            rows = self._db.execute(
                "SELECT id, kind, topic, payload, qos FROM message WHERE id > ? ORDER BY id LIMIT ?", (after_id, limit)
            ).fetchall()
        except sqlite3.Error as error:
            self._failed(error)
            return ()
        return tuple(OutboxMessage(id=i, kind=kind, topic=t, payload=p, qos=q) for i, kind, t, p, q in rows)

    def acknowledge(self, message_id: int) -> None:
        """The broker has it: forget it. One that was dropped meanwhile stays counted as dropped."""
        if self._db is None:
            return
        try:
            with self._db as db:
                db.execute("DELETE FROM message WHERE id = ?", (message_id,))
            self._measure(self._db)
        except sqlite3.Error as error:
            self._failed(error)  # it stays and is sent once more: at least once, as promised

    def close(self) -> None:
        """Write the log back and close the file."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._connect()
        except sqlite3.OperationalError as error:
            self._failed(error)
        except sqlite3.DatabaseError as error:  # not a database, or a damaged one: evidence, not a reason to stop
            aside = self._path.with_suffix(".damaged")
            try:
                for suffix in ("-wal", "-shm"):
                    self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
                self._path.replace(aside)
                self._db = self._connect()
            except (OSError, sqlite3.Error) as second:
                self._failed(second)
            else:
                self._stats = msgspec.structs.replace(self._stats, quarantined=f"{aside}: {error}")
        except OSError as error:
            self._failed(error)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=5.0, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {self._synchronous}")
            db.execute("PRAGMA journal_size_limit = 1000000")  # the log shrinks again after a burst
            db.executescript(_SCHEMA)
            self._measure(db)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _make_room(self, db: sqlite3.Connection, size: int, kind: Kind) -> tuple[dict[Kind, int], bool]:
        """Delete the oldest until ``size`` more bytes fit; says what that cost, and whether it was enough.
        Telemetry never displaces an event."""
        lost: dict[Kind, int] = {}
        if size > self._max_bytes:
            return lost, False
        excess = self._stats.depth_bytes + size - self._max_bytes
        for victim in _KINDS[: _KINDS.index(kind) + 1]:
            if excess <= 0:
                break
            for row_id, row_size in db.execute(
                "SELECT id, size FROM message WHERE kind = ? ORDER BY id", (victim,)
            ).fetchall():
                db.execute("DELETE FROM message WHERE id = ?", (row_id,))
                lost[victim] = lost.get(victim, 0) + 1
                excess -= row_size
                if excess <= 0:
                    break
        return lost, excess <= 0

    def _measure(self, db: sqlite3.Connection) -> None:
        depth, size = db.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM message").fetchone()
        dropped = dict(db.execute("SELECT kind, count FROM dropped").fetchall())
        self._stats = OutboxStats(
            depth=depth,
            depth_bytes=size,
            dropped_telemetry=dropped.get("telemetry", 0),
            dropped_events=dropped.get("event", 0),
            quarantined=self._stats.quarantined,
        )

    def _failed(self, error: Exception) -> None:
        self._stats = msgspec.structs.replace(self._stats, error=f"{self._path}: {error}")
