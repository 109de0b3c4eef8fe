"""Clients of the gRPC door that hardly move, and messages that come in together: bounded as at the HTTP door."""

from __future__ import annotations

import os
import queue
import signal
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
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
        for _ in range(8):
            for path, size in (("/x/y", LONG), (ASK, 2 * LIMIT)):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(path)(padded(size), timeout=LIMIT_S)
        asked.put(REQUEST)
        assert ANSWER in next(answers)
        asked.put(None)


def test_no_more_than_a_window_is_taken_in_behind_a_message_that_is_whole(patient: Any) -> None:
    """Each call's client neither ends it nor reads the answer."""
    before = resident_bytes(patient)
    with Connection(patient.grpc, settings=struct.pack(">HI", 4, 0)) as connection:
        connection.say(frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
        streams = dict.fromkeys(range(1, 33, 2), message(REQUEST) + bytes(LONG))
        for stream in streams:
            connection.say(frame(HEADERS, END_HEADERS, stream, call()))
        connection.sock.settimeout(1.0)
        with pytest.raises(TimeoutError):  # no window is opened any more
            connection.say_side_by_side(streams, leave=0)
        assert all(60_000 < LONG - len(unsent) < 100_000 for unsent in connection.unsent.values())
        assert resident_bytes(patient) - before < 2 * LIMIT


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
