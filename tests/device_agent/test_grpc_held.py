"""What the gRPC door knows of messages that aren't whole: their connections, and the rule alone."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.grpc_door import wires
from device_agent.grpc_door.callers import Outcome
from device_agent.grpc_door.slow_calls import LOOK_S, SlowCalls
from device_agent.grpc_door.wires import Counts, find
from device_agent.inbound import FREE_BYTES, Inbound
from device_agent.seldom import Seldom
from device_agent.slow_clients import LEAST_BYTES

LIMIT = 8_000_000
LIMIT_S = 20.0


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


@pytest.mark.parametrize("told", [bytes(104), bytes(136)], ids=["before Linux 4.1", "no bytes"])
def test_a_kernel_that_does_not_count_ends_nobody_and_is_in_the_log(
    told: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncounted(socket.socket):
        def getsockopt(self, *_: object) -> Any:
            return told

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listening.accept()[0]:
            (wire,) = find([f"ipv4:127.0.0.1:{client.getsockname()[1]}"], port).values()
            client.sendall(b"x")
            monkeypatch.setattr(wires, "_seldom", Seldom(logging.getLogger("device_agent.grpc")))
            monkeypatch.setattr(socket, "socket", Uncounted)
            assert wire.counts() is None
    assert "this kernel doesn't count the bytes of a connection" in caplog.text

    async def scene() -> None:
        here = Scene()
        here.line.uncounted = True
        waiting = here.begin()
        await here.after(100.0)
        assert not waiting.done() and not here.line.was_cut
        waiting.cancel()

    run(scene)


class Script:
    """A connection, and the context of each call on it."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:50000") -> None:
        self._peer = peer
        self.received = 0
        self.messages: list[asyncio.Future[bytes]] = []
        self.was_cut = self.uncounted = False

    def counts(self) -> Counts | None:
        return None if self.uncounted else Counts(self.received, 0)

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


def test_what_was_whole_before_its_connection_was_found_is_nobodys_part() -> None:
    async def scene() -> None:
        here, real = Scene(limit_bytes=0), Scene.find

        async def nothing(peers: Collection[str]) -> dict[str, Script]:
            return {}

        here.find = nothing  # type: ignore[method-assign]
        waiting, other = here.begin(), here.begin()
        await asyncio.sleep(0)
        here.line.received += LIMIT
        here.line.messages[-1].set_result(bytes(LIMIT - 1000))
        await other
        await here.after(LOOK_S)
        here.find = lambda peers: real(here, peers)  # type: ignore[method-assign]
        await here.after(2 * LOOK_S)
        assert not waiting.done() and not here.inbound.bytes
        waiting.cancel()

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


@pytest.mark.parametrize("at_once", [True, False], ids=["with its descriptor", "with another"])
def test_who_comes_from_the_address_of_one_that_has_gone_is_bounded_as_well(at_once: bool) -> None:
    async def scene() -> None:
        here = Scene(limit_bytes=LIMIT)
        first = here.begin()
        await here.after(LOOK_S)
        here.line.received += 100 * LIMIT  # most of it packed, which accounts for nothing
        here.line.messages[-1].set_result(b"x")
        await first
        await here.after(LOOK_S)
        if not at_once:
            here.line.uncounted = True
            here.line = Script()
        here.line.received = 0
        waiting = [here.begin() for _ in range(4)]
        await here.after(2 * LOOK_S)
        here.line.received += 3 * LIMIT
        await here.after(LOOK_S)
        assert sum(one.done() for one in waiting) == 3 and here.inbound.bytes <= LIMIT
        for one in waiting:
            one.cancel()

    run(scene)
