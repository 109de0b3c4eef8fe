from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from device_agent.outbox import ROW_BYTES, Outbox


def payloads(outbox: Outbox) -> list[bytes]:
    return [message.payload for message in outbox.next(0, 1000)]


def test_messages_come_in_order_and_leave_when_acknowledged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite")
    for number in range(5):
        assert outbox.put("telemetry", "t", b"%d" % number)
    first = outbox.next(0, 2)
    assert [message.payload for message in first] == [b"0", b"1"]
    assert outbox.next(first[1].id, 1)[0].payload == b"2"
    assert outbox.stats.depth == 5  # reading takes nothing away
    outbox.acknowledge(first[0].id)
    assert payloads(outbox) == [b"1", b"2", b"3", b"4"]
    outbox.close()
    assert payloads(Outbox(tmp_path / "o.sqlite")) == [b"1", b"2", b"3", b"4"]


def test_the_oldest_telemetry_goes_before_any_event_and_is_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", max_bytes=4 * (ROW_BYTES + 1 + 10))
    outbox.put("event", "e", b"0" * 10)
    for number in range(1, 6):
        outbox.put("telemetry", "t", b"%d" % number * 10)
    assert [payload[:1] for payload in payloads(outbox)] == [b"0", b"3", b"4", b"5"]
    for _ in range(4):
        outbox.put("event", "e", b"E" * 10)
    assert payloads(outbox) == [b"E" * 10] * 4
    assert not outbox.put("telemetry", "t", b"6" * 10)  # telemetry never displaces an event
    assert (outbox.stats.dropped_telemetry, outbox.stats.dropped_events) == (6, 1)
    outbox.close()
    again = Outbox(tmp_path / "o.sqlite").stats
    assert (again.dropped_telemetry, again.dropped_events) == (6, 1)


def test_a_message_beyond_the_bound_is_dropped_alone(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", max_bytes=200)
    outbox.put("event", "e", b"small")
    assert not outbox.put("event", "e", b"x" * 500)
    assert payloads(outbox) == [b"small"] and outbox.stats.dropped_events == 1


class Bounded(RuleBasedStateMachine):
    """Against a list: never over the bound, never out of order, every message stored, dropped or delivered."""

    ids = Bundle("ids")

    @initialize()
    def make(self) -> None:
        self.outbox = Outbox(Path(":memory:"), max_bytes=600)
        self.stored = self.gone = 0

    @rule(kind=st.sampled_from(["telemetry", "event"]), size=st.integers(0, 700))
    def put(self, kind: str, size: int) -> None:
        self.outbox.put(kind, "t", b"x" * size)  # type: ignore[arg-type]
        self.stored += 1

    @rule(target=ids)
    def look(self) -> int:
        found = self.outbox.next(0, 1)
        return found[0].id if found else 0

    @rule(message_id=consumes(ids))
    def acknowledge(self, message_id: int) -> None:
        before = self.outbox.stats.depth
        self.outbox.acknowledge(message_id)
        self.gone += before - self.outbox.stats.depth

    @invariant()
    def keeps_its_promises(self) -> None:
        stats, ids = self.outbox.stats, [message.id for message in self.outbox.next(0, 100)]
        assert stats.depth_bytes <= 600 and ids == sorted(set(ids)) and len(ids) == stats.depth
        assert stats.depth + self.gone + stats.dropped_telemetry + stats.dropped_events == self.stored
        assert stats.error is None

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            self.outbox.close()


Bounded.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBounded = Bounded.TestCase

_PUTS_FOREVER = """
import sys
from pathlib import Path
from device_agent.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
number = 0
while True:
    assert outbox.put("event", "e", b"%d" % number)
    print(number, flush=True)
    number += 1
"""


def test_what_was_put_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    process = subprocess.Popen([sys.executable, "-c", _PUTS_FOREVER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(300):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    said = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    last = int(said[-1]) if said else 299
    kept = payloads_all(path)
    assert kept[: last + 1] == [b"%d" % number for number in range(last + 1)]
    assert len(kept) <= last + 2  # one more may be stored than was said


def payloads_all(path: Path) -> list[bytes]:
    return [message.payload for message in Outbox(path).next(0, 10**6)]


_FULL_DISK = """
import resource, sys
from pathlib import Path
from device_agent.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
assert outbox.put("event", "e", b"first")
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
while outbox.put("telemetry", "t", b"x" * 5000):
    pass
assert outbox.stats.error, outbox.stats
assert outbox.next(0, 1)[0].payload == b"first"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert outbox.put("event", "e", b"room again")
assert outbox.stats.error is None, outbox.stats
outbox.close()
"""


def test_a_full_disk_is_a_state_that_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "o.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert payloads_all(tmp_path / "o.sqlite")[-1] == b"room again"


def test_a_place_that_cannot_be_written_is_a_state(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    outbox = Outbox(tmp_path / "file" / "o.sqlite")
    assert not outbox.put("event", "e", b"x")
    assert outbox.next(0, 1) == () and outbox.stats.error
    outbox.acknowledge(1)
    outbox.close()


def test_a_damaged_file_is_set_aside_and_named(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    path.write_bytes(b"this was never a database" * 100)
    outbox = Outbox(path)
    assert outbox.put("event", "e", b"x")
    assert "o.damaged" in str(outbox.stats.quarantined)
    assert (tmp_path / "o.damaged").read_bytes().startswith(b"this was")


def test_full_synchronous_is_what_the_file_gets(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", synchronous="FULL")
    assert outbox._db is not None
    assert outbox._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert sqlite3.connect(tmp_path / "o.sqlite").execute("PRAGMA journal_mode").fetchone() == ("wal",)
