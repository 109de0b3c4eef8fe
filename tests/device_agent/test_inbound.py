"""Bodies that are coming in: together bounded, whoever sends them and however; and short ones always taken."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity_model import write_identity
from quick_constants import CUT_OFF_SOON
from raw_http import Door, Heard, Wire, post

from device_agent.http import HttpApp, Reply
from device_agent.http_server import HttpServer
from device_agent.inbound import FREE_BYTES, Coming, Inbound

INFER = "/v2/models/id/infer"
LIMIT = 8_000_000
LONG = 6_000_000
CLIENTS = 12
BODY = b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[7]}]}'


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200_000)), max_size=60), st.integers(0, 400_000))
def test_they_never_take_more_than_they_may_and_the_longest_goes_first(
    steps: list[tuple[int, int]], limit: int
) -> None:
    """A step is a piece of one body; of 0 bytes, its end."""
    inbound = Inbound(lambda: limit)
    sizes = [0] * 6
    refused: list[int] = []
    bodies = [Coming(inbound, lambda index=index: refused.append(index)) for index in range(6)]  # type: ignore[misc]
    for index, size in steps:
        if size:
            bodies[index].grew(size)
            sizes[index] += size
        else:
            bodies[index].over()
            sizes[index] = 0
        bodies[index].settle()
        while refused:
            gone = refused.pop(0)
            assert sizes[gone] == max(sizes) > FREE_BYTES
            sizes[gone] = 0
        counted = [max(0, size - FREE_BYTES) for size in sizes]
        assert inbound.bytes == sum(counted)
        assert inbound.bytes <= limit or sum(map(bool, counted)) == 1, "a single one has room"
    late = [body.unpacking() for body in bodies]
    for body, unpacked in zip(bodies, late, strict=True):
        body.over()
        unpacked(1_000_000)
    assert inbound.bytes == 0 and not inbound._long


class Echo:
    """A desk that answers everything with nothing."""

    async def infer(self, *_: Any) -> Reply:
        return Reply(body=b"{}")


def test_what_is_unpacked_after_a_body_is_over_counts_no_more() -> None:
    """As where each piece waits until a tenant's bytes of the day are written down."""
    inbound, whole = Inbound(lambda: LIMIT), gzip.compress(bytes(LONG))
    app = HttpApp(Echo(), max_body_bytes=4 * LIMIT, record=lambda completion: None)  # type: ignore[arg-type]
    counted: list[int] = []

    async def main() -> None:
        began = asyncio.Event()

        async def behind(scope: Any, receive: Any, send: Any) -> None:
            """The application gets each piece when the next one has come."""
            first = await receive()
            assert first["more_body"]
            began.set()
            pieces = [await receive(), first]

            async def later() -> Any:
                return pieces.pop() if pieces else await receive()

            await app(scope, later, send)
            counted.append(inbound.bytes)

        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = HttpServer(behind, inbound=inbound)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        for _ in range(3):  # the longest of several would be refused, idle as it is
            began.clear()
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(whole)}\r\n\r\n"
            writer.write(head.encode() + whole[:-8])
            await began.wait()
            writer.write(whole[-8:])
            assert (await reader.readline()).split()[1] == b"200"
        server.close(drain_s=0)
        await serving

    asyncio.run(asyncio.wait_for(main(), 30))
    assert counted == [0, 0, 0]


@pytest.fixture(scope="module")
def doors(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Door]]]:
    folder = tmp_path_factory.mktemp("inbound")
    write_identity(folder / "repository" / "id" / "1")
    path = Path(f"/tmp/aios-inbound-{os.getpid()}.sock")
    agent = start_agent(
        f'[policy]\nin_flight_bytes = {LIMIT}\n[repository]\npath = "{folder / "repository"}"',
        http=f'unix_socket = "{path}"',
    )
    yield agent, {"tcp": Door.of(agent.url), "unix": Door(unix=path)}
    assert agent.stop() == 0
    assert "Traceback" not in agent.log()


def head(way: str) -> bytes:
    """Of a body that is announced, in chunks, or of what is much longer unpacked."""
    how = {"length": "Content-Length: 30000000", "chunks": "Transfer-Encoding: chunked"}.get(way)
    how = how or "Content-Encoding: gzip\r\nContent-Length: 100000"
    return f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{how}\r\n\r\n".encode()


def beginning(way: str) -> bytes:
    if way == "gzip":
        return head(way) + gzip.compress(bytes(LONG), 9)[:-8]
    return head(way) + (b"%x\r\n" % 30_000_000 if way == "chunks" else b"") + bytes(LONG)


def refused(heard: Heard | None) -> bool:
    if heard is None:
        return False
    assert (heard.status, heard.headers["retry-after"], heard.closes) == (503, "1", True)
    assert "[queue_full]" in heard.document["error"]
    return True


@pytest.mark.parametrize("way", ["length", "chunks", "gzip"])
@pytest.mark.parametrize("name", ["tcp", "unix"])
def test_many_long_bodies_are_refused_one_by_one_and_others_are_answered(doors: Any, name: str, way: str) -> None:
    agent, door = doors[0], doors[1][name]
    before = resident_bytes(agent)
    with ExitStack() as stack:
        wires: list[Wire] = []
        for _ in range(CLIENTS):
            wire = stack.enter_context(door.connect())
            wire.say(beginning(way))
            wires.append(wire)
            if len(wires) > 1:  # the one before was the longest, or this one: either reads why
                gone = next_refused(wires)
                wires.remove(gone)
            with door.connect() as other:
                other.say(post(INFER, BODY))
                heard = other.hear()
                assert heard is not None and heard.document["outputs"][0]["data"] == [7]
        assert len(wires) == 1, "one has always room"
        assert resident_bytes(agent) - before < 4 * LIMIT
    assert agent.events("worker_crashed") == []


def next_refused(wires: list[Wire]) -> Wire:
    import select

    ready, _, _ = select.select([wire.sock for wire in wires], [], [], 20)
    assert ready, "nobody is refused"
    wire = next(wire for wire in wires if wire.sock in ready)
    assert refused(wire.hear())
    return wire


@pytest.mark.parametrize("way", ["length", "chunks"])
def test_a_connection_does_not_keep_its_last_body(doors: Any, way: str) -> None:
    agent, door = doors[0], doors[1]["tcp"]
    before = resident_bytes(agent)
    with ExitStack() as stack:
        for _ in range(10):
            wire = stack.enter_context(door.connect())
            body = BODY + b" " * LONG
            wire.say(post(INFER, body) if way == "length" else head(way) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            heard = wire.hear()
            assert heard is not None and heard.status == 200
        assert resident_bytes(agent) - before < 5 * LONG


@pytest.mark.parametrize("way", ["length", "chunks", "gzip"])
def test_a_body_that_is_still_coming_does_not_hold_up_the_end(start_agent: Any, way: str) -> None:
    agent = start_agent("[policy]\ndrain_s = 30.0", constants=CUT_OFF_SOON)
    with Door.of(agent.url).connect() as wire, Door.of(agent.url).connect() as whole:
        wire.say(beginning(way)[:200].replace(b"/id/", b"/tiny/"))
        whole.say(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert whole.hear() is not None
        began = time.monotonic()
        agent.process.send_signal(signal.SIGTERM)
        heard = wire.hear()
        assert heard is not None and heard.status == 503 and "[draining]" in heard.document["error"]
        assert agent.process.wait(30) == 0 and time.monotonic() - began < 15.0
    assert "Traceback" not in agent.log() and "ERROR" not in agent.log(), agent.log()


def resident_bytes(agent: Any) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
