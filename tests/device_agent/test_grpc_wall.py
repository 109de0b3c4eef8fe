"""Messages that come in where no estimate sees them: the agent's own memory bounds them."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity_model import write_identity
from raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Connection, call, frame, message
from request_forms import good

from device_agent.grpc_door.wall import TIMES, Wall

LIMIT = 8_000_000
LONG = 6_000_000
STREAMS = 16
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
ANSWER = struct.pack("<q", 7)


@given(st.lists(st.tuples(st.dictionaries(st.integers(0, 3), st.integers(0, 150)), st.integers(0, 2000)), max_size=20))
def test_only_who_may_hold_what_the_agent_grew_by_ends(looks: list[tuple[dict[int, int], int]]) -> None:
    memory = 1000
    wall, floor = Wall(lambda: 100, lambda: memory), memory
    for may_hold, memory in looks:
        over = wall.over(may_hold)
        if sum(may_hold.values()) <= 100:
            floor = memory
        if over is None:
            assert sum(may_hold.values()) <= 100 or memory - floor <= TIMES * 100
        else:
            assert may_hold[over] == max(may_hold.values()) and memory - floor > TIMES * 100 < TIMES * sum(
                may_hold.values()
            )


@pytest.fixture
def agent(start_agent: Any, tmp_path: Path) -> Any:
    write_identity(tmp_path / "id" / "1")
    more = f'[policy]\nin_flight_bytes = {LIMIT}\n[repository]\npath = "{tmp_path}"'
    return start_agent(more, http=f'grpc_bind = "127.0.0.1:0"\nmax_body_bytes = {LIMIT}')


def resident_bytes(agent: Any) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answered(connection: Connection) -> bool:
    """What a new call on it comes to."""
    connection.say(frame(HEADERS, END_HEADERS, 5, call()))
    connection.say(frame(DATA, END_STREAM, 5, message(good(7).message(raw=True))))
    answer = connection.until(DATA)
    return answer is not None and ANSWER in answer[3]


def test_what_hides_behind_calls_beside_a_stream_is_cut_off_and_nobody_else(agent: Any) -> None:
    """Whatever comes of the streams' messages might be of the calls that come and go."""
    before = resident_bytes(agent)
    with Connection(agent.grpc) as hiding, Connection(agent.grpc) as other:
        other.say(frame(HEADERS, END_HEADERS, 3, call(STREAM)))
        streams = dict.fromkeys(range(1, 2 * STREAMS, 2), message(bytes(LONG)))
        for stream in streams:
            hiding.say(frame(HEADERS, END_HEADERS, stream, call(STREAM)))
        numbers = itertools.count(2 * STREAMS + 1, 2)
        calls = (frame(HEADERS, END_HEADERS | END_STREAM, number, call("/x/y")) for number in numbers)
        refused = hiding.say_side_by_side(streams, leave=1000, beside=calls)
        assert not refused.keys() & streams.keys(), "it was seen; then this test says nothing"
        while hiding.hear() is not None:
            pass
        agent.until(lambda status: status["grpc"]["in_flight"] == 1)
        assert resident_bytes(agent) - before < (TIMES + 2) * LIMIT
        assert "may hold more memory than was seen" in agent.log()
        assert answered(other)
