"""A real agent whose file descriptors run short, or out: who is there is served, who comes later is served later."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from identity_model import write_identity
from raw_http import Door, Wire, post
from steady_load import ask, soon_s


@pytest.fixture
def agent(start_agent: Any, tmp_path: Path) -> Iterator[Any]:
    write_identity(tmp_path / "repository" / "id" / "1")
    agent = start_agent(f'[repository]\npath = "{tmp_path / "repository"}"')
    agent.door = Door.of(agent.url)
    yield agent
    assert agent.process.poll() is None
    assert "Traceback" not in agent.log() and agent.log().count("WARNING") < 6, agent.log()
    assert agent.stop() == 0


def limit(agent: Any, descriptors: int) -> None:
    _, hard = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (descriptors, hard))


def wide(number: int) -> bytes:
    """A request, and an answer, that travel to the worker and back by a descriptor."""
    tensor = {"name": "x", "datatype": "INT64", "shape": [40_000], "data": [number] * 40_000}
    return post("/v2/models/id/infer", json.dumps({"inputs": [tensor]}).encode())


def answered(wire: Wire, number: int) -> None:
    heard = wire.hear()
    assert heard is not None and heard.status == 200, heard
    assert set(heard.document["outputs"][0]["data"]) == {number}


def test_a_flood_of_connections_takes_nothing_from_those_that_are_there(agent: Any) -> None:
    worker = agent.status()["models"]["id"]["worker_pid"]
    limit(agent, 600)
    with agent.door.connect() as kept, contextlib.ExitStack() as flood:
        kept.say(ask(1))
        answered(kept, 1)
        for number in range(2, 900):  # of which half as many as there are descriptors get in
            sock = flood.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(agent.door.tcp)
            if number % 100 == 0:
                kept.say(wide(number))
                answered(kept, number)
        with agent.door.connect() as late:
            heard = late.hear()
            assert heard is None or (heard.status == 503 and "too many connections" in heard.document["error"])
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        kept.say(wide(7))
        answered(kept, 7)
        assert time.monotonic() - began < soon_s()
    began = time.monotonic()
    with agent.door.connect() as late:
        late.say(ask(8))
        answered(late, 8)
    assert time.monotonic() - began < soon_s()
    assert agent.log().count("connections: those on top are refused") == 1
    assert [event["away_s"] < soon_s() for event in agent.events("worker_recovered")] == [True]


def test_without_a_single_descriptor_who_is_there_is_served_and_others_are_soon(agent: Any) -> None:
    with agent.door.connect() as kept, agent.door.connect() as other, contextlib.ExitStack() as waiting:
        for wire in (kept, other):
            wire.say(ask(1))
            answered(wire, 1)
        limit(agent, 8)  # fewer than it has
        late = [waiting.enter_context(agent.door.connect()) for _ in range(30)]
        for number, wire in enumerate(late):
            wire.say(ask(number))
        for number in range(10):
            kept.say(ask(number))
            answered(kept, number)
        end = time.monotonic() + 10
        while "new connections wait" not in agent.log():
            assert time.monotonic() < end
            time.sleep(0.01)
        other.say(wide(5))  # has to wait for one
        in_flight = 0
        while not in_flight:
            kept.say(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
            heard = kept.hear()
            assert heard is not None
            in_flight = heard.document["in_flight"]
        limit(agent, 1024)
        began = time.monotonic()
        answered(other, 5)
        for number, wire in enumerate(late):
            heard = wire.hear()
            assert heard is not None and heard.status == 200, (number, heard)
        with agent.door.connect() as new:
            new.say(ask(6))
            answered(new, 6)
        assert time.monotonic() - began < soon_s()
    assert agent.log().count("new connections wait") == 1
    assert agent.events("worker_crashed") == []
