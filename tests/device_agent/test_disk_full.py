"""A real agent on a disk that is full: a small file system of its own, filled to the last byte."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from identity_model import write_identity
from quick_constants import DISK_TRIED_AGAIN
from raw_http import Door
from steady_load import SteadyLoad

from device_agent.trace_reader import TraceLines

DISK_BYTES = 3_000_000


class SmallDisk:
    """A tmpfs; ``fill`` leaves not a byte, ``free`` takes that back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def start(start_agent: Any, agent_toml: Callable[..., str], disk: SmallDisk, tmp_path: Path) -> Callable[[], Any]:
    """An agent that writes everything it can to that disk: outbox, trace, audit, budgets, a copy of its bundle."""
    write_identity(tmp_path / "repository" / "id" / "1")
    socket_path = Path(f"/tmp/aios-disk-{os.getpid()}-{tmp_path.name[-4:]}.sock")
    more = f"""[repository]\npath = "{tmp_path / "repository"}"
[mqtt]\nurl = "mqtt://127.0.0.1:1"\ninterval_s = 0.05\noutbox_bytes = 200000
[policy]\ntrace = "{disk.path / "trace"}"\ntrace_bytes = 400000
[[cloud]]\nname = "c"\nurl = "http://127.0.0.1:1"\nrequests_per_day = 5
[[tenant]]\nid = "t"\nunix_uids = [{os.getuid()}]\nadmin = true\naudit_bytes = 400000\n"""
    config = tmp_path / "agent.toml"
    text = agent_toml(more, http=f'unix_socket = "{socket_path}"')
    config.write_text(text.replace('state_dir = "state"', f'state_dir = "{disk.path / "state"}"'))

    def begin() -> Any:
        agent = start_agent(again=SimpleNamespace(config=config), constants=DISK_TRIED_AGAIN)
        agent.door = Door(unix=socket_path)
        return agent

    return begin


def status(agent: Any) -> Any:
    with agent.door.connect() as wire:
        wire.say(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = wire.hear()
        assert heard is not None and heard.status == 200
        return heard.document


def until(agent: Any, condition: Callable[[Any], Any]) -> None:
    end = time.monotonic() + 15
    while not condition(status(agent)):
        assert time.monotonic() < end, agent.log()
        time.sleep(0.02)


def written(*paths: Path) -> list[tuple[int, int]]:
    """Other values once something was written, also to a new file in its place."""
    found = [path.stat() if path.exists() else None for path in paths]  # a trace whose new part found no room is gone
    return [(0, 0) if stat is None else (stat.st_ino, stat.st_size) for stat in found]


def test_it_serves_on_says_so_and_writes_again_when_there_is_room(start: Any, disk: SmallDisk) -> None:
    state, audit = disk.path / "state", disk.path / "state" / "audit" / "t.jsonl"
    agent = start()
    with SteadyLoad(agent.door, clients=2) as load:
        load.goes_on()
        until(agent, lambda told: told["mqtt"]["outbox"]["depth"] > 3 and not told["mqtt"]["outbox"]["error"])
        disk.fill()
        until(agent, lambda told: "full" in (told["mqtt"]["outbox"]["error"] or ""))
        until(agent, lambda _: "the trace can't be written" in agent.log() and "audit" in agent.log())
        os.kill(status(agent)["models"]["id"]["worker_pid"], signal.SIGKILL)
        load.goes_on()
        agent.process.kill()  # and what is started now finds it full
        agent.process.wait()
        shutil.rmtree(state / "bundles")
        disk.fill()
        agent = start()
        assert "is not kept for a restart" in agent.log()
        load.goes_on()
        until(agent, lambda told: "full" in (told["mqtt"]["outbox"]["error"] or ""))
        disk.free()
        before = written(audit, disk.path / "trace")
        until(agent, lambda told: told["mqtt"]["outbox"]["error"] is None)
        until(agent, lambda _: all(map(operator.ne, before, written(audit, disk.path / "trace"))))
    assert set(load.ended) <= {"local", "closed", "503"}, load.ended
    assert agent.log().count("the trace can't be written") <= 1 and "Traceback" not in agent.log()
    assert agent.stop() == 0
    with sqlite3.connect(state / "outbox.sqlite") as outbox:
        assert outbox.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    whole = [line for line in audit.read_text().splitlines() if line.endswith("}") and line.startswith("{")]
    assert sum(json.loads(line)["status"] == 200 for line in whole[-5:]) >= 1
    trace = TraceLines(disk.path / "trace")
    assert sum(1 for _ in trace) > 3
    assert trace.torn <= 2, "the line that met the end of the disk"
