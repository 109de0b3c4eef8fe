"""Clients of the gRPC door that hardly move, and messages that come in together: bounded as at the HTTP door."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import struct
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity_model import write_identity
from raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LIMIT_S,
    PING,
    SETTINGS,
    WINDOW,
    Connection,
    call,
    frame,
    message,
)
from relay import Relay
from request_forms import good

from device_agent.grpc_door.callers import Outcome
from device_agent.grpc_door.slow_calls import LOOK_S, SlowCalls
from device_agent.grpc_door.wires import Counts, find
from device_agent.inbound import FREE_BYTES, Inbound
from device_agent.slow_clients import LEAST_BYTES

RECEIVE_S = 1.0
LIMIT = 8_000_000
LONG = 6_000_000
CLIENTS = 6
REQUEST = good(7).message(raw=True)
ANSWER = struct.pack("<q", 7)
ASK = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


OWN = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own


def unary(channel: Any) -> Any:
    return channel.unary_unary(ASK)


@pytest.fixture(scope="module")
def start(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[float], Any]]:
    """An agent with so much patience."""
    folder = tmp_path_factory.mktemp("repository")
    write_identity(folder / "id" / "1")
    agents = []

    def make(receive_s: float, *, checked: bool = True) -> Any:
        more = f'[policy]\nin_flight_bytes = {LIMIT}\n[repository]\npath = "{folder}"'
        http = f'grpc_bind = "127.0.0.1:0"\nreceive_timeout_s = {receive_s}\nmax_body_bytes = {LIMIT}'
        agent = start_agent(more, http=http)
        agents.extend([agent] * checked)
        return agent

    yield make
    for agent in agents:
        agent.until(lambda status: not status["grpc"]["in_flight"] and not status["in_flight"])
        assert agent.stop() == 0
        log = agent.log()
        assert "Traceback" not in log and "never retrieved" not in log and "ERROR" not in log, log


@pytest.fixture(scope="module")
def agent(start: Any) -> Any:
    return start(RECEIVE_S)


@pytest.fixture(scope="module")
def patient(start: Any) -> Any:
    return start(60.0)


def padded(size: int) -> bytes:
    """The request, with so many bytes more in a field there isn't, which protobuf skips."""
    length, rest = b"", size
    while rest >= 128:
        length, rest = length + bytes((rest & 127 | 128,)), rest >> 7
    return REQUEST + b"\xfa\x7f" + length + bytes((rest,)) + bytes(size)


def drip(connection: Connection, data: bytes, *, stream: int) -> bytes:
    """A byte every fiftieth of a second, until the door ends the call; what it says then."""
    for byte in data:
        while connection.hears_within(0.02):
            heard = connection.hear()
            assert heard is not None, "hung up without a word"
            if heard[0] == HEADERS and b"grpc-status" in heard[3]:
                return heard[3]
        connection.say(frame(DATA, 0, stream, bytes((byte,))))
    raise AssertionError("all of it was read")


def test_a_message_that_drips_is_refused_and_a_stream_that_waits_is_not(agent: Any) -> None:
    """On one connection: the stream says nothing meanwhile, and is answered when it does."""
    with Connection(agent.grpc) as connection:
        connection.say(frame(HEADERS, END_HEADERS, 1, call(STREAM)))
        connection.say(frame(HEADERS, END_HEADERS, 3, call()))
        began = time.monotonic()
        said = drip(connection, message(padded(10_000)), stream=3)
        assert b"grpc-status\x014" in said and b"the message brought less than 16384 bytes within 1 s" in said
        assert time.monotonic() - began >= RECEIVE_S
        connection.say(frame(DATA, END_STREAM, 1, message(REQUEST)))
        answer = connection.until(DATA)
        assert answer is not None and ANSWER in answer[3]


def test_a_message_that_comes_slowly_and_steadily_is_taken(agent: Any) -> None:
    whole, began = message(padded(11 * LEAST_BYTES)), time.monotonic()
    with Connection(agent.grpc) as connection:
        connection.say(frame(HEADERS, END_HEADERS, 1, call()))
        for start in range(0, len(whole), LEAST_BYTES):
            last = start + LEAST_BYTES >= len(whole)
            connection.say(frame(DATA, END_STREAM if last else 0, 1, whole[start : start + LEAST_BYTES]))
            pause_ends = time.monotonic() + (0.0 if last else RECEIVE_S / 5)
            while connection.hears_within(max(0.0, pause_ends - time.monotonic())):
                heard = connection.hear()
                assert heard is not None and heard[0] in (SETTINGS, WINDOW, PING)
        answer = connection.until(DATA)
        assert answer is not None and ANSWER in answer[3]
    assert time.monotonic() - began > 2 * RECEIVE_S


def test_who_never_reads_his_answers_is_cut_off_and_holds_nothing(agent: Any) -> None:
    began = time.monotonic()
    with Connection(agent.grpc, settings=struct.pack(">HI", 4, 0)) as connection:  # no room for as much as a byte
        whole = frame(DATA, END_STREAM, 1, message(REQUEST))
        for number in range(1, 9, 2):
            connection.say(frame(HEADERS, END_HEADERS, number, call()) + whole[:8] + bytes((number,)) + whole[9:])
        while (heard := connection.hear()) is not None:
            assert heard[0] != DATA
            assert time.monotonic() - began < LIMIT_S, "he only answers pings"
    assert time.monotonic() - began >= RECEIVE_S
    agent.until(lambda status: not status["in_flight"])
    assert "read too little of its answer" in agent.log()


def test_who_never_reads_a_streams_answers_is_cut_off_too(agent: Any) -> None:
    began = time.monotonic()
    with Connection(agent.grpc, settings=struct.pack(">HI", 4, 0)) as connection:
        connection.say(frame(HEADERS, END_HEADERS, 1, call(STREAM)) + frame(DATA, 0, 1, message(REQUEST) * 20))
        while (heard := connection.hear()) is not None:
            assert heard[0] != DATA and time.monotonic() - began < LIMIT_S
    assert time.monotonic() - began >= RECEIVE_S


def test_an_answer_that_is_left_for_later_costs_the_others_on_its_connection_nothing(agent: Any) -> None:
    """As a proxy's clients, of which one doesn't read: its window stays shut, and another one's is opened."""
    began, answered = time.monotonic(), 0
    with Connection(agent.grpc, settings=struct.pack(">HI", 4, 0)) as connection:
        connection.say(frame(SETTINGS, 1, 0) + frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
        connection.say(frame(HEADERS, END_HEADERS, 1, call()) + frame(DATA, END_STREAM, 1, message(REQUEST)))
        while time.monotonic() - began < 2 * RECEIVE_S:
            stream = 2 * answered + 3
            connection.say(
                frame(HEADERS, END_HEADERS, stream, call()) + frame(DATA, END_STREAM, stream, message(REQUEST))
            )
            connection.say(frame(WINDOW, 0, stream, struct.pack(">I", 65535)))
            answer = connection.until(DATA)
            assert answer is not None and answer[2] == stream and ANSWER in answer[3]
            answered += 1


def test_a_stream_that_waits_is_not_charged_for_calls_that_were_taken_back(patient: Any) -> None:
    """Uploads whose deadline passes, requests for a method there isn't, messages that are too long: on its channel."""
    with grpc.insecure_channel(patient.grpc, OWN) as channel:
        asked: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        answers = channel.stream_stream(STREAM)(iter(asked.get, None), timeout=3 * LIMIT_S)
        asked.put(REQUEST)
        assert ANSWER in next(answers)
        for _ in range(20):
            for path, size in (("/x/y", LONG), (ASK, 2 * LIMIT)):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(path)(padded(size), timeout=LIMIT_S)
        asked.put(REQUEST)
        assert ANSWER in next(answers)
        asked.put(None)


def test_messages_that_are_not_whole_end_with_the_agent(start: Any) -> None:
    agent = start(60.0, checked=False)
    with Connection(agent.grpc) as connection:
        connection.say(frame(HEADERS, END_HEADERS, 1, call()) + frame(DATA, 0, 1, message(REQUEST)[:10]))
        agent.until(lambda status: status["grpc"]["in_flight"])
        agent.process.send_signal(signal.SIGTERM)
        assert b"the agent is stopping" in trailers(connection)
    assert agent.process.wait(5.0) == 0


def trailers(connection: Connection) -> bytes:
    while (heard := connection.until(HEADERS)) is not None:
        if heard[1] & END_STREAM:
            return heard[3]
    raise AssertionError("hung up without a word")


def test_many_long_messages_are_refused_one_by_one_and_others_are_answered(patient: Any) -> None:
    """They stop before their ends; one has always room, and is answered when its end comes."""
    before = resident_bytes(patient)
    with ExitStack() as stack:
        relay = stack.enter_context(Relay(patient.grpc, free_bytes=LONG - 100_000))
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        asked: set[Future[bytes]] = set()
        for _ in range(CLIENTS):
            ask = unary(stack.enter_context(grpc.insecure_channel(relay.address, OWN)))
            asked.add(pool.submit(ask, padded(LONG), timeout=5 * LIMIT_S))
            if len(asked) > 1:
                (gone,), asked = wait(asked, LIMIT_S, FIRST_COMPLETED)
                error = gone.exception()
                assert isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "[queue_full]" in str(error.details())
            with grpc.insecure_channel(patient.grpc, OWN) as channel:
                assert ANSWER in unary(channel)(REQUEST, timeout=LIMIT_S)
        assert resident_bytes(patient) - before < 4 * LIMIT
        relay.open()
        assert ANSWER in asked.pop().result()


@pytest.mark.parametrize("path", [ASK, STREAM])
def test_many_long_messages_of_one_connection_are_no_way_around(patient: Any, path: str) -> None:
    """All its calls side by side, a frame of each in turn."""
    with Connection(patient.grpc, settings=struct.pack(">HI", 1, 0)) as connection:  # trailers refer to no others
        streams = dict.fromkeys(range(1, 2 * CLIENTS, 2), message(padded(LONG)))
        for stream in streams:
            connection.say(frame(HEADERS, END_HEADERS, stream, call(path)))
        refused = connection.say_side_by_side(streams, leave=1000)
        while len(refused) < CLIENTS - 1:
            heard = connection.until(HEADERS)
            assert heard is not None
            if heard[1] & END_STREAM:
                refused[heard[2]] = heard[3]
        assert all(b"grpc-status\x018" in said and b"[queue_full]" in said for said in refused.values())
        left = next(stream for stream in streams if stream not in refused)
        connection.say(frame(DATA, END_STREAM, left, streams[left][-1000:]))
        answer = connection.until(DATA)
        assert answer is not None and ANSWER in answer[3]


def resident_bytes(agent: Any) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The connections, and the rule, alone


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("bind", "to", "written"), [
    ("127.0.0.1", "127.0.0.1", "ipv4:127.0.0.1:{}"),
    ("::1", "::1", "ipv6:%5B::1%5D:{}"),
    ("::", "127.0.0.1", "ipv6:%5B::ffff:127.0.0.1%5D:{}"),
    ("::", "127.0.0.1", "ipv4:127.0.0.1:{}"),
])  # fmt: skip
def test_a_connection_is_found_by_its_client_and_not_touched(bind: str, to: str, written: str) -> None:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, 0), family=family, dualstack_ipv6=bind == "::") as listening:
        port = listening.getsockname()[1]
        with socket.create_connection((to, port)) as client, listening.accept()[0] as server:
            server.setblocking(False)
            client.sendall(bytes(1000))
            server.sendall(bytes(300))
            assert len(client.recv(300, socket.MSG_WAITALL)) == 300
            peer, before = written.format(client.getsockname()[1]), descriptors()
            found = find([peer, "ipv4:127.0.0.1:1", "unix:/x", "ipv4:x"], port)
            assert list(found) == [peer] and find([peer], port + 1) == {}
            assert found[peer].counts() == Counts(received=1000, acknowledged=300)
            assert not os.get_blocking(server.fileno()), "whoever reads it would wait"
            assert server.recv(2000) == bytes(1000) and descriptors() == before
            found[peer].cut()
            assert client.recv(1000) == b""
            with socket.create_connection((to, port)) as other, listening.accept()[0] as next_one:
                os.dup2(next_one.fileno(), server.fileno())  # what was looked at is another's now
                found[peer].cut()
                next_one.sendall(b"there")
                assert found[peer].counts() is None and other.recv(5) == b"there"
            os.dup2(os.open("/dev/null", os.O_RDONLY), server.fileno())
            found[peer].cut()
            assert found[peer].counts() is None


class Script:
    """A connection, and the context of each call on it."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:50000") -> None:
        self._peer = peer
        self.received = 0
        self.messages: list[asyncio.Future[bytes]] = []
        self.was_cut = False

    def counts(self) -> Counts:
        return Counts(self.received, 0)

    def cut(self) -> None:
        self.was_cut = True

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return self._peer

    def read(self) -> asyncio.Future[bytes]:
        self.messages.append(asyncio.get_running_loop().create_future())
        return self.messages[-1]


class Scene:
    """Calls that wait, and a clock that is set."""

    def __init__(self, limit_bytes: int = LIMIT, limit_s: float = 8.0) -> None:
        self.now = 0.0
        self.inbound = Inbound(lambda: limit_bytes)
        self.slow = SlowCalls(limit_s, LIMIT, self.inbound, lambda: self.now)
        self.line = Script()

    def begin(self, *, stream: bool = False) -> asyncio.Task[Any]:
        return asyncio.create_task(self.slow.read(self.line, stream=stream))

    async def find(self, peers: Collection[str]) -> dict[str, Script]:
        return dict.fromkeys(peers, self.line)

    async def after(self, seconds: float) -> None:
        """Look as often as the agent does."""
        for _ in range(round(seconds / LOOK_S)):
            await asyncio.sleep(0)
            self.now += LOOK_S
            await self.slow.look(self.find)
        await asyncio.sleep(0)


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), LIMIT_S))


@given(st.lists(st.integers(0, 2 * LEAST_BYTES) | st.just(0), min_size=1, max_size=60), st.integers(1, 4))
def test_whoever_brings_little_in_the_limit_is_refused_and_nobody_else(steps: list[int], calls: int) -> None:
    """A step is what comes in a second, for all calls together; a stream on the same connection waits for ever."""

    async def scene() -> None:
        here = Scene()
        waiting, stream = [here.begin() for _ in range(calls)], here.begin(stream=True)
        for second, step in enumerate(steps):
            here.line.received += step
            await here.after(1.0)
            if any(one.done() for one in waiting):
                assert all(isinstance(one.result(), Outcome) and one.result().status == 408 for one in waiting)
                assert second >= 7 and sum(steps[second - 7 : second]) < calls * LEAST_BYTES
                break
        else:
            for at in range(len(steps) - 20):  # twice the limit, kept to a quarter: it begins anew with what has come
                assert sum(steps[at : at + 21]) >= calls * LEAST_BYTES
        assert not stream.done()
        stream.cancel()
        for one in waiting:
            one.cancel()

    run(scene)


def test_calls_of_one_connection_share_what_it_brings() -> None:
    """One of four that says as much as one must: too little for four."""

    async def scene() -> None:
        here = Scene()
        waiting = [here.begin() for _ in range(4)]
        for _ in range(12):
            here.line.received += LEAST_BYTES // 4
            await here.after(1.0)
        assert all(one.result().status == 408 for one in waiting)

    run(scene)


def test_whole_messages_are_not_taken_for_parts_of_one_that_is_awaited() -> None:
    """A long one waits while calls go by on its connection, with what comes around their messages."""

    async def scene() -> None:
        here = Scene(limit_bytes=0, limit_s=10_000.0)
        waiting, stream = here.begin(), here.begin(stream=True)
        await here.after(1.0)
        for size in (0, 100, 5_000, 1_000_000) * 500:
            other = here.begin()
            await asyncio.sleep(0)
            here.line.received += size + size // 200 + 400
            here.line.messages[-1].set_result(bytes(size))
            assert len(await other) == size
            if size:
                await here.after(LOOK_S)
        assert not waiting.done() and not stream.done() and not here.inbound.bytes
        waiting.cancel()
        stream.cancel()

    run(scene)


def test_messages_of_streams_count_where_nothing_else_is_on_their_connection() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=LIMIT)
        streams = [here.begin(stream=True) for _ in range(4)]
        await here.after(1.0)
        here.line.received += 3 * LIMIT // 2
        await here.after(LOOK_S)
        assert sum(stream.done() for stream in streams) == 2
        assert next(stream for stream in streams if stream.done()).result().status == 503
        whole = next(at for at, stream in enumerate(streams) if not stream.done())
        here.line.messages[whole].set_result(bytes(3 * LIMIT // 8))
        await here.after(LOOK_S)
        assert here.inbound.bytes == pytest.approx(3 * LIMIT // 8 - FREE_BYTES, rel=0.02)
        for stream in streams:
            stream.cancel()

    run(scene)


def test_a_packed_message_accounts_for_nothing_that_others_brought() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=2 * LIMIT)
        waiting = here.begin()
        await here.after(LOOK_S)
        here.line.received += LIMIT // 2
        await here.after(LOOK_S)
        packed = here.begin()
        await asyncio.sleep(0)
        here.line.received += 1000
        here.line.messages[-1].set_result(bytes(LIMIT))
        await packed
        await here.after(LOOK_S)
        assert here.inbound.bytes == LIMIT // 2 + 1000 - FREE_BYTES
        waiting.cancel()

    run(scene)


def test_a_streams_message_that_is_whole_is_held_no_more_whatever_else_goes_on() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=2 * LIMIT)
        stream, other = here.begin(stream=True), here.begin(stream=True)
        await here.after(LOOK_S)
        here.line.received += LIMIT // 2
        await here.after(LOOK_S)
        assert here.inbound.bytes == LIMIT // 2 - 2 * FREE_BYTES
        here.slow.unread(here.line)
        here.line.messages[0].set_result(bytes(LIMIT // 2))
        await stream
        await here.after(LOOK_S)
        assert not here.inbound.bytes
        here.line.received += LIMIT
        await here.after(LOOK_S)
        assert not here.inbound.bytes, "it may be what was refused"
        await here.after(LOOK_S)
        here.line.received += LIMIT // 2
        await here.after(LOOK_S)
        assert here.inbound.bytes == LIMIT // 2 - FREE_BYTES, "all of that has come"
        other.cancel()
        await here.after(LOOK_S)
        stream = here.begin(stream=True)
        await here.after(LOOK_S)
        assert not here.inbound.bytes
        stream.cancel()

    run(scene)


def test_a_call_that_begins_while_its_connection_is_looked_for_is_bounded_as_well() -> None:
    async def scene() -> None:
        here = Scene()
        begun: list[asyncio.Task[Any]] = []

        async def find(peers: Collection[str]) -> dict[str, Script]:
            if not begun:
                late = Script("ipv4:127.0.0.1:50001")
                begun.append(asyncio.create_task(here.slow.read(late)))
                await asyncio.sleep(0)
                return {here.line.peer(): here.line}
            return {peer: Script(peer) for peer in peers}

        here.find = find  # type: ignore[method-assign]
        first = here.begin()
        await here.after(12.0)
        assert begun[0].result().status == first.result().status == 408

    run(scene)


def test_a_connection_that_is_not_found_at_once_is_looked_for_again() -> None:
    async def scene() -> None:
        here, found = Scene(), 0

        async def find(peers: Collection[str]) -> dict[str, Script]:
            nonlocal found
            found += 1
            return dict.fromkeys(peers, here.line) if found > 2 else {}

        here.find = find  # type: ignore[method-assign]
        waiting = here.begin()
        await here.after(12.0)
        assert waiting.result().status == 408

    run(scene)


def test_messages_of_a_stream_that_came_before_they_were_awaited_are_accounted_for() -> None:
    """As behind sixty-four that are being answered; and pings of months."""

    async def scene() -> None:
        here = Scene(limit_bytes=0)
        idle = [here.begin(stream=True) for _ in range(2)]
        await here.after(LOOK_S)
        for _ in range(100):
            here.line.received += LIMIT // 10
            busy = here.begin(stream=True)
            await asyncio.sleep(0)
            here.line.messages[-1].set_result(bytes(LIMIT // 10))
            await busy
            await here.after(LOOK_S)
            for _ in range(30):
                here.line.received += 34
                await here.after(LOOK_S)
        assert not any(one.done() for one in idle) and not here.inbound.bytes
        for one in idle:
            one.cancel()

    run(scene)


@pytest.mark.parametrize("how", ["unread", "taken back", "late", "a stream"])
def test_what_others_leave_behind_is_no_part_of_a_streams_message(how: str) -> None:
    """And what comes of them behind their end."""

    async def scene() -> None:
        here = Scene(limit_bytes=LIMIT if how == "a stream" else 0)
        stream = here.begin(stream=True)
        await here.after(1.0)
        for _ in range(100):
            if how == "unread":
                here.slow.unread(here.line)
            else:
                other = here.begin(stream=how == "a stream")
                await (asyncio.sleep(0) if how == "taken back" else here.after(LOOK_S))
                here.line.received += LIMIT // 4
                await (here.after(LOOK_S) if how == "a stream" else asyncio.sleep(0))
                other.cancel()
            await here.after(LOOK_S)
            here.line.received += LIMIT // 2
            await here.after(2 * LOOK_S)
        assert not stream.done() and not here.inbound.bytes
        stream.cancel()

    run(scene)


def test_calls_that_come_and_go_hide_no_part_of_a_message() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=LIMIT)
        waiting = [here.begin() for _ in range(4)]
        await here.after(LOOK_S)
        for _ in range(100):
            here.line.received += LIMIT // 20
            here.slow.unread(here.line)
            here.begin().cancel()
            await here.after(LOOK_S)
        assert any(one.done() for one in waiting) and here.inbound.bytes <= LIMIT
        for one in waiting:
            one.cancel()

    run(scene)


def test_a_message_is_never_taken_for_more_than_it_may_be() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=10 * LIMIT, limit_s=1000.0)
        waiting = here.begin()
        here.line.received += 100 * LIMIT  # of calls that were taken back, mostly
        await here.after(1.0)
        assert here.inbound.bytes == LIMIT - FREE_BYTES and not waiting.done()
        waiting.cancel()

    run(scene)


def test_parts_count_until_they_are_whole_or_thrown_away() -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=3 * FREE_BYTES, limit_s=1000.0)
        waiting = [here.begin() for _ in range(4)]
        await here.after(2 * LOOK_S)
        here.line.received += 8 * FREE_BYTES
        await here.after(LOOK_S)
        assert sum(one.done() for one in waiting) == 1, "a quarter is thrown away, and the rest has room"
        assert here.inbound.bytes == 3 * FREE_BYTES
        await here.after(10.0)
        assert sum(one.done() for one in waiting) == 1
        whole = next(at for at, one in enumerate(waiting) if not one.done())
        here.line.messages[whole].set_result(bytes(2 * FREE_BYTES))
        await here.after(LOOK_S)
        assert here.inbound.bytes == pytest.approx(2 * FREE_BYTES, rel=0.02)
        for one in waiting:
            one.cancel()
        await here.after(LOOK_S)
        assert not here.inbound.bytes

    run(scene)
