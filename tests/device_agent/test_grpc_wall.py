"""Messages that come in where no estimate sees them: the agent's own memory bounds them, and spares the others."""

from __future__ import annotations

import itertools
import os
import queue
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity_model import write_identity
from raw_http2 import END_HEADERS, END_STREAM, HEADERS, LIMIT_S, WINDOW, Connection, call, frame, message
from request_forms import good

from device_agent.grpc_door import wall
from device_agent.grpc_door.wall import TIMES, MayHold, Wall

LIMIT = 8_000_000
LONG = 6_000_000
STREAMS = 16
REQUEST = good(7).message(raw=True)
ASK = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
ANSWER = struct.pack("<q", 7)
OWN = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own


class Scene:
    """A wall of 100 bytes, and the agent's memory: set, not measured."""

    def __init__(self) -> None:
        self.memory = 1000
        self.wall = Wall(lambda: 100, lambda: self.memory)

    def over(self, *may_hold: tuple[int, int], grown: int = 0, came: int = 0) -> list[int]:
        self.memory += grown
        return self.wall.over({at: MayHold(*each) for at, each in enumerate(may_hold)}, came)


def test_those_end_that_likely_hold_most_and_no_more_than_it_takes() -> None:
    here = Scene()
    assert here.over((0, 90), (9, 9), (80, 80), (70, 70), came=TIMES * 100 + 120, grown=TIMES * 100 + 120) == [2, 3]


@given(st.integers(0, 900), st.integers(0, 900))
def test_what_it_grew_by_while_nothing_came_in_is_not_theirs(loaded: int, sent: int) -> None:
    """Such as a model that was loaded into this process."""
    here = Scene()
    here.over((0, 101))
    assert here.over((0, 101), grown=loaded) == []
    over = here.over((0, 101), grown=sent, came=sent)
    assert over == ([0] if sent > TIMES * 100 else [])


def test_who_cannot_hold_too_much_never_ends_and_what_is_there_then_counts_no_more() -> None:
    here = Scene()
    assert here.over((50, 50), (50, 50), grown=5000, came=5000) == []
    assert here.over((51, 51), (50, 50), grown=TIMES * 100, came=5000) == []
    assert here.over((51, 51), (50, 50), grown=1, came=5000) == [0]
    assert here.over((51, 51), (50, 50), grown=-TIMES * 100, came=0) == []


def test_what_was_given_back_meanwhile_has_to_grow_again() -> None:
    here = Scene()
    assert here.over((200, 200), grown=-300) == []
    assert here.over((200, 200), grown=TIMES * 100 + 1, came=5000) == [0]


def test_nobody_ends_for_memory_that_is_free_and_was_only_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Scene()

    def give_back() -> None:
        here.memory -= 700

    monkeypatch.setattr(wall, "_give_back", give_back)
    assert here.over((200, 200), grown=TIMES * 100 + 700, came=5000) == []
    assert here.over((200, 200), grown=701, came=5000) == [0]


@pytest.fixture
def agent(start_agent: Any, tmp_path: Path) -> Any:
    write_identity(tmp_path / "id" / "1")
    more = f'[policy]\nin_flight_bytes = {LIMIT}\n[repository]\npath = "{tmp_path}"'
    return start_agent(more, http=f'grpc_bind = "127.0.0.1:0"\nmax_body_bytes = {LIMIT}')


def resident_bytes(agent: Any) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def padded(size: int) -> bytes:
    """The request, with a field of so many bytes there isn't, which protobuf skips."""
    length, rest = b"", size
    while rest >= 128:
        length, rest = length + bytes((rest & 127 | 128,)), rest >> 7
    return REQUEST + b"\xfa\x7f" + length + bytes((rest,)) + bytes(size)


@contextmanager
def idle_streams_beside_long_calls(agent: Any) -> Iterator[None]:
    """Of an ordinary client: streams that say nothing, and long messages one after the other; answered before and
    after."""
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(agent.grpc, OWN))
        asked: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in range(STREAMS)]
        answers = [channel.stream_stream(STREAM)(iter(each.get, None), timeout=5 * LIMIT_S) for each in asked]
        for each in asked:
            stack.callback(each.put, None)
        for _ in range(10):
            assert ANSWER in channel.unary_unary(ASK)(padded(LONG), timeout=LIMIT_S)
        yield
        for each, answer in zip(asked, answers, strict=True):
            each.put(REQUEST)
            assert ANSWER in next(answer)


def test_what_hides_behind_calls_beside_a_stream_is_cut_off_and_nobody_else(agent: Any) -> None:
    """Whatever comes of the streams' messages might be of the calls that come and go."""
    with idle_streams_beside_long_calls(agent):
        before = resident_bytes(agent)
        with Connection(agent.grpc) as hiding:
            streams = dict.fromkeys(range(1, 2 * STREAMS, 2), message(bytes(LONG)))
            for stream in streams:
                hiding.say(frame(HEADERS, END_HEADERS, stream, call(STREAM)))
            numbers = itertools.count(2 * STREAMS + 1, 2)
            calls = (frame(HEADERS, END_HEADERS | END_STREAM, number, call("/x/y")) for number in numbers)
            refused = hiding.say_side_by_side(streams, leave=1000, beside=calls)
            assert not refused.keys() & streams.keys(), "it was seen; then this test says nothing"
            while hiding.hear() is not None:
                pass
        agent.until(lambda status: status["grpc"]["in_flight"] == STREAMS)
        assert resident_bytes(agent) - before < (TIMES + 2) * LIMIT
        assert "may hold more memory than was seen" in agent.log()


def test_bytes_behind_a_whole_message_are_not_taken_in(agent: Any) -> None:
    """Each call's message is whole, and its client neither ends it nor reads the answer; what it sends beyond that
    stays outside."""
    before = resident_bytes(agent)
    with Connection(agent.grpc, settings=struct.pack(">HI", 4, 0)) as connection:
        connection.say(frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
        streams = dict.fromkeys(range(1, 2 * STREAMS, 2), message(REQUEST) + bytes(LONG))
        for stream in streams:
            connection.say(frame(HEADERS, END_HEADERS, stream, call()))
        connection.sock.settimeout(1.0)  # no window is opened any more
        with pytest.raises(TimeoutError):
            connection.say_side_by_side(streams, leave=0)
        assert resident_bytes(agent) - before < 2 * LIMIT
