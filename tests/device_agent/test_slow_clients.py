"""Clients that hardly move, at a real agent with little patience; and the rule alone."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity_model import write_identity
from raw_http import Door, Wire, post

from device_agent.slow_clients import LEAST_BYTES, Part, Progress, SlowClients

INFER = "/v2/models/id/infer"
LIMIT_S = 0.4
BODY = b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[7]}]}'


class Client:
    """A connection whose client does what the test says."""

    def __init__(self) -> None:
        self.now: Progress | None = None
        self.told: list[Part] = []

    def progress(self) -> Progress | None:
        return self.now

    def too_slow(self, part: Part, limit_s: float) -> None:
        self.told.append(part)


@given(
    part=st.sampled_from(["head", "body", "answer"]),
    steps=st.lists(st.integers(0, 2 * LEAST_BYTES), min_size=1, max_size=60),
)
def test_whoever_brings_little_in_the_limit_is_told_and_nobody_else(part: Part, steps: list[int]) -> None:
    """A step takes an eighth of the limit; so two of them lie between the agent's looks."""
    clients, client = SlowClients(8.0), Client()
    done = 0
    for second, step in enumerate(steps):
        done += step
        client.now = Progress(part, 1, done)
        clients.look([client], float(second))
        if client.told:
            break
    brought = [sum(steps[max(0, end - 10) : end]) for end in range(1, len(steps) + 1)]
    if part != "head" and all(step >= LEAST_BYTES for step in steps):
        assert client.told == []
    if not any(steps) or part == "head":
        assert bool(client.told) == (len(steps) > 8)
    if client.told and part != "head":
        assert brought[second] < 10 * 2 * LEAST_BYTES and second >= 8


def test_who_was_answered_begins_anew() -> None:
    clients, client = SlowClients(8.0), Client()
    for second in range(100):
        client.now = None if second % 12 < 6 else Progress("head", 1, 1)
        clients.look([client], float(second))
    for second in range(100, 200):
        client.now = Progress("head", second // 6, 1)
        clients.look([client], float(second))
    assert client.told == []


@pytest.fixture(scope="module")
def agent(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("slow")
    write_identity(folder / "repository" / "id" / "1")
    path = Path(f"/tmp/aios-slow-{os.getpid()}.sock")
    more = f'receive_timeout_s = {LIMIT_S}\nunix_socket = "{path}"'
    agent = start_agent(f'[repository]\npath = "{folder / "repository"}"', http=more)
    agent.doors = {"tcp": Door.of(agent.url), "unix": Door(unix=path)}
    yield agent
    assert "Traceback" not in agent.log()
    assert agent.stop() == 0


@pytest.fixture(params=["tcp", "unix"])
def door(request: pytest.FixtureRequest, agent: Any) -> Door:
    found: Door = agent.doors[request.param]
    return found


def drip(wire: Wire, data: bytes) -> None:
    """A byte every fiftieth of a second, until the other end answers."""
    for byte in data:
        if select.select([wire.sock], [], [], 0.02)[0]:
            return
        wire.say(bytes((byte,)))


@pytest.mark.parametrize("part", ["head", "empty lines", "body", "chunks"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_client_that_drips_is_told_so_and_cut_off(door: Door, part: str, before: int) -> None:
    whole = post(INFER, BODY)
    start, slow = {
        "head": (b"", b"POST /v2 HTTP/1.1\r\n" + b"X: a\r\n" * 100),
        "empty lines": (b"", b"\r\n" * 300),
        "body": (whole.replace(b": 67", b": 900"), b" " * 800),
        "chunks": (post(INFER, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"), b"1\r\n \r\n" * 100),
    }[part]
    with door.connect() as wire:
        wire.say(whole * before + start)
        for _ in range(before):
            heard = wire.hear()
            assert heard is not None and heard.status == 200
        drip(wire, slow)
        heard = wire.hear()
        assert heard is not None and heard.status == 408 and heard.closes
        said = "body brought less than 16384 bytes" if part in ("body", "chunks") else "head was not whole"
        assert said in heard.document["error"]
        assert wire.rest() == []


def test_a_connection_that_never_says_anything_ends_without_a_word(door: Door) -> None:
    with door.connect() as wire:
        assert wire.hear() is None


def test_a_body_that_comes_slowly_and_steadily_is_taken(door: Door) -> None:
    body = BODY[:-1] + b" " * 10 * LEAST_BYTES + b"}"
    whole = post(INFER, body)
    with door.connect() as wire:
        began = time.monotonic()
        for start in range(0, len(whole), LEAST_BYTES):
            wire.say(whole[start : start + LEAST_BYTES])
            time.sleep(LIMIT_S / 5)
        assert time.monotonic() - began > 2 * LIMIT_S
        heard = wire.hear()
        assert heard is not None and heard.status == 200


def test_who_never_reads_his_answers_is_cut_off_and_holds_nothing(door: Door, agent: Any) -> None:
    def connections() -> int:
        return len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))

    before = connections()
    wide = post(
        INFER,
        b'{"inputs":[{"name":"x","datatype":"INT64","shape":[100000],"data":[%s]}]}' % b",".join([b"7"] * 100_000),
    )
    wires = [door.connect() for _ in range(4)]
    for wire in wires:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.sock.setblocking(False)
    pending = dict.fromkeys(wires, wide * 40)
    while pending:
        writable = select.select([], [wire.sock for wire in pending], [], 20.0)[1]
        assert writable, "never cut off"
        for wire, left in list(pending.items()):
            try:
                # Where all of it went into buffers, what follows is the begin of one more.
                pending[wire] = left[wire.sock.send(left[: 1 << 16] or b"P") :]
            except BlockingIOError:
                pass
            except OSError:  # cut off
                del pending[wire]
    agent.until(lambda status: connections() <= before + 1)  # the one that asks
    for wire in wires:
        wire.sock.close()
