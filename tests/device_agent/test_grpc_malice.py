"""The gRPC door against HTTP/2 that is no gRPC, and gRPC that no client would speak: whatever one connection does, the
next call on another is answered, and nothing of it stays."""

from __future__ import annotations

import os
import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from identity_model import write_identity
from raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GO_AWAY,
    HEADERS,
    LIMIT_S,
    MORE_HEADERS,
    PING,
    PUSH,
    RESET,
    SETTINGS,
    WINDOW,
    Connection,
    call,
    frame,
    headers,
    message,
)
from request_forms import good

LIMIT = 200_000
REQUEST = good(7).message(raw=True)
WHOLE = END_HEADERS | END_STREAM


@pytest.fixture(scope="module")
def agent(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("repository")
    write_identity(folder / "id" / "1")
    agent = start_agent(f'[repository]\npath = "{folder}"', http=f'grpc_bind = "127.0.0.1:0"\nmax_body_bytes = {LIMIT}')
    yield agent
    assert agent.process.poll() is None, agent.log()
    assert agent.stop() == 0
    log = agent.log()
    assert "Traceback" not in log and "never retrieved" not in log and "ERROR" not in log, log


@pytest.fixture
def others(agent: Any) -> Iterator[Callable[[], None]]:
    """Somebody else, with a connection of his own: he is answered, and nobody's call is left over."""
    with grpc.insecure_channel(agent.grpc) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def answered() -> None:
            assert struct.pack("<q", 7) in ask(REQUEST, timeout=LIMIT_S)

        answered()
        yield answered
        answered()
        agent.until(lambda status: not status["grpc"]["in_flight"] and not status["in_flight"])


def asked(stream: int = 1, **changes: str) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, call(**changes))


def sent(content: bytes, **changes: str) -> bytes:
    """A whole call."""
    return asked(**changes) + frame(DATA, END_STREAM, 1, content)


WHOLE_CALL = frame(HEADERS, WHOLE, 1, call())
#: What is said on a connection, and what is said back: a part of the trailers, any headers or a reset (where it is
#: grpcio's to choose), or that the connection ends.
SAID: dict[str, tuple[bytes, bytes | int]] = {
    "a message that says it is 4 GB": (sent(message(b"x", length=0xFFFFFFFF)), b"grpc-status\x018"),
    "a message longer than allowed": (sent(message(b"x", length=LIMIT + 1)), b"grpc-status\x018"),
    "half a message": (sent(message(REQUEST)[:-3]), b"grpc-status"),
    "half a length": (sent(b"\0\0"), b"grpc-status"),
    "no message": (WHOLE_CALL, b"grpc-status\x013"),
    "two messages": (sent(message(REQUEST) * 2), b"grpc-status"),
    "a message that is packed in nothing": (sent(message(REQUEST, flag=1)), b"grpc-status"),
    "a flag there isn't": (sent(message(REQUEST, flag=7)), b"grpc-status"),
    "a packing there isn't": (sent(message(REQUEST, flag=1), grpc_encoding="zstd"), b"grpc-status\x0212"),
    "no gzip": (sent(message(REQUEST, flag=1), grpc_encoding="gzip"), b"grpc-status"),
    "another content": (sent(b"<html>", content_type="text/html"), b""),
    "a GET": (frame(HEADERS, WHOLE, 1, call(method="GET")), b""),
    "a method there isn't": (frame(HEADERS, WHOLE, 1, call("/x")), b"grpc-status\x0212"),
    "a path of 15 KB": (frame(HEADERS, 0, 1, call("/" + "x" * 15_000)) + frame(MORE_HEADERS, END_HEADERS, 1), b""),
    "metadata that is no text": (sent(message(REQUEST), x="\xff\xfe"), b"grpc-status"),
    "metadata in bytes that are no base64": (sent(message(REQUEST), x_bin="!!!"), b""),
    "metadata under a name that is no text": (sent(message(REQUEST), **{"\xff": "y"}), b""),
    "an authority that is no text": (
        frame(HEADERS, END_HEADERS, 1, call().replace(headers((":authority", "x")), headers((":authority", "\xff"))))
        + frame(DATA, END_STREAM, 1, message(REQUEST)), b""),
    "a packing that is no text": (sent(message(REQUEST, flag=1), grpc_encoding="\xff"), b"grpc-status"),
    "a content that is no text": (sent(message(REQUEST), content_type="application/grpc+\xff"), b""),
    "a deadline beyond counting": (sent(message(REQUEST), grpc_timeout="99999999H"), b"grpc-status"),
    "15 KB of metadata": (sent(message(REQUEST), x="y" * 15_000), b"grpc-status"),
    "1 MB of metadata": (
        frame(HEADERS, END_STREAM, 1, call()) + b"".join(
            frame(MORE_HEADERS, END_HEADERS if last else 0, 1, headers(*[("x", "y" * 1000)] * 15))
            for last in [False] * 69 + [True]), b""),
    "a key that isn't UTF-8": (sent(message(REQUEST), authorization="Bearer \xff\xfe"), b"grpc-status"),
    "a deadline that is none": (sent(message(REQUEST), grpc_timeout="soon"), b"grpc-status"),
    "a deadline that has passed": (sent(message(REQUEST), grpc_timeout="0n"), b""),
    "data for nobody": (frame(DATA, END_STREAM, 1, message(REQUEST)), GO_AWAY),
    "a stream of an even number": (frame(HEADERS, WHOLE, 2, call()), GO_AWAY),
    "a promise of the client's": (frame(PUSH, END_HEADERS, 1, struct.pack(">I", 2) + call()), GO_AWAY),
    "settings of half a setting": (frame(SETTINGS, 0, 0, b"\0\1\0"), GO_AWAY),
    "a ping of four bytes": (frame(PING, 0, 0, b"ping"), GO_AWAY),
    "a window of nothing": (frame(WINDOW, 0, 0, b"\0\0\0\0"), GO_AWAY),
    "a frame of 16 MB": (b"\xff\xff\xff\0\0\0\0\0\1", GO_AWAY),
    "headers that are none": (frame(HEADERS, WHOLE, 1, b"\xff" * 100), GO_AWAY),
    "no HTTP/2 at all": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", GO_AWAY),
    "TLS to a plain door": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), GO_AWAY),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_no_call_is_answered_or_ends_its_own_connection(agent: Any, others: Any, name: str) -> None:
    said, heard = SAID[name]
    with Connection(agent.grpc) as connection:
        connection.say(said)
        if heard == GO_AWAY:
            connection.sock.shutdown(socket.SHUT_WR)
            connection.until(GO_AWAY)
        else:
            assert isinstance(heard, bytes)
            answer = connection.until(HEADERS, RESET, GO_AWAY)
            while answer is not None and answer[0] == HEADERS and heard not in answer[3]:
                answer = connection.until(HEADERS, RESET, GO_AWAY)
            assert answer is not None, "hung up without a word"
    others()


def test_a_path_that_is_no_text_ends_nothing_but_itself(agent: Any) -> None:
    """At it grpcio's server ends: another one takes its place, and who was being answered is answered."""
    with grpc.insecure_channel(agent.grpc) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        answers = stream(iter(sent.get, None), timeout=10 * LIMIT_S)
        sent.put(REQUEST)
        assert struct.pack("<q", 7) in next(answers)
        for _ in range(7):
            with until_accepted(agent) as connection:
                connection.say(frame(HEADERS, WHOLE, 1, call("/\xff\xfe")))
                connection.until(HEADERS, RESET, GO_AWAY)
        agent.until(lambda status: status["grpc"]["serving"])
        sent.put(REQUEST)
        assert struct.pack("<q", 7) in next(answers), "a call that was open before"
        sent.put(None)
    with grpc.insecure_channel(agent.grpc) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert struct.pack("<q", 7) in ask(REQUEST, timeout=LIMIT_S, wait_for_ready=True)
    assert agent.log().count("another one takes its place") == 1, "a flood of them doesn't fill the log"
    agent.until(lambda status: status["grpc"]["serving"] and not status["grpc"]["in_flight"])


def until_accepted(agent: Any) -> Connection:
    """A connection, as soon as there is somebody to take it."""
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            return Connection(agent.grpc)
        except ConnectionError:
            assert time.monotonic() < end, "nobody took its place"


@pytest.mark.parametrize("length", [5, 40, None])
def test_who_goes_within_a_message_leaves_nothing(agent: Any, others: Any, length: int | None) -> None:
    """With what he has said of it, or with the whole request: his place is free at once."""
    for how in ("reset", "hang up", "half-closed"):
        with Connection(agent.grpc) as connection:
            connection.say(asked() + frame(DATA, 0, 1, message(REQUEST)[:length]))
            connection.say(frame(PING, 0, 0, bytes(8)))
            assert connection.until(PING), "all of it was read"
            if how == "reset":
                connection.say(frame(RESET, 0, 1, struct.pack(">I", 8)))
            elif how == "half-closed":
                connection.sock.shutdown(socket.SHUT_WR)
                while connection.hear() is not None:
                    pass
        agent.until(lambda status: not status["grpc"]["in_flight"] and not status["in_flight"])
    others()


FLOODS = {
    "of calls taken back": lambda index: (
        frame(HEADERS, WHOLE, 2 * index + 1, call()) + frame(RESET, 0, 2 * index + 1, struct.pack(">I", 8))
    ),
    "of calls without a message": lambda index: frame(HEADERS, END_HEADERS, 2 * index + 1, call()),
    "of pings": lambda index: frame(PING, 0, 0, struct.pack(">Q", index)),
    "of settings": lambda index: frame(SETTINGS, 0, 0),
    "of headers without end": lambda index: frame(MORE_HEADERS if index else HEADERS, 0, 1, headers(("x", "y" * 500))),
    "of nothing": lambda index: (b"" if index else asked()) + frame(DATA, 0, 1),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_leaves_nothing_and_others_are_answered(agent: Any, others: Any, name: str) -> None:
    before = resident_bytes(agent)
    with Connection(agent.grpc) as connection:
        for start in range(0, 10_000, 500):
            connection.say(b"".join(FLOODS[name](start + index) for index in range(500)))
        others()
    agent.until(lambda status: not status["grpc"]["in_flight"] and not status["in_flight"])
    assert resident_bytes(agent) - before < 50_000_000


def resident_bytes(agent: Any) -> int:
    return int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
