"""Every door of a real agent against everything that is no request, byte by byte.

Whatever comes, the answer says what was wrong, and whoever asks next, on a new connection or on this one, gets the
answer to his own request.
"""

from __future__ import annotations

import gzip
import itertools
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import self_signed
from identity_model import write_identity
from malformed import CHUNKED, ENVELOPES, FRAMING, INFER, MAX_BODY_BYTES, START, Case, ask, tensor
from raw_http import Door, Heard, Wire, post

VALUES = itertools.count(1000)


@pytest.fixture(scope="module")
def doors(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Door]]:
    """TCP and Unix socket, TLS, and where there are tenants, of three agents."""
    folder = tmp_path_factory.mktemp("doors")
    write_identity(folder / "repository" / "id" / "1")
    repository = f'[repository]\npath = "{folder / "repository"}"'
    self_signed(folder)
    path = Path(f"/tmp/aios-malformed-{os.getpid()}.sock")
    limit = f"max_body_bytes = {MAX_BODY_BYTES}\n"
    plain = start_agent(repository, http=f'{limit}unix_socket = "{path}"')
    secure = start_agent(repository, http=f'{limit}tls_cert = "{folder}/door.pem"\ntls_key = "{folder}/door.key"')
    of_tenants = path.with_suffix(".tenants")
    tenant = f'[[tenant]]\nid = "t"\nunix_uids = [{os.getuid()}]\nadmin = true\n'
    shared = start_agent(repository + "\n" + tenant, http=f'{limit}unix_socket = "{of_tenants}"')
    context = ssl.create_default_context(cafile=str(folder / "door.pem"))
    yield {
        "tcp": Door.of(plain.url),
        "unix": Door(unix=path),
        "tls": Door.of(secure.url, context),
        "tenants": Door(unix=of_tenants),
    }
    for agent in (plain, secure, shared):
        assert agent.process.poll() is None, agent.log()
        assert "Traceback" not in agent.log() and "ERROR" not in agent.log()
        assert agent.stop() == 0


@pytest.fixture(params=["tcp", "unix", "tls", "tenants"])
def door(request: pytest.FixtureRequest, doors: dict[str, Door]) -> Door:
    return doors[request.param]


def value_of(heard: Heard | None) -> int:
    assert heard is not None and heard.status == 200, heard
    (output,) = heard.document["outputs"]
    (value,) = output["data"]
    assert isinstance(value, int)
    return value


def next_request_is_answered(wire: Wire) -> None:
    value = next(VALUES)
    wire.say(ask(value))
    assert value_of(wire.hear()) == value


@pytest.mark.parametrize("case", [*FRAMING, *ENVELOPES], ids=lambda case: case.name)
def test_what_is_no_request_is_answered_and_the_next_one_too(door: Door, case: Case) -> None:
    with door.connect() as wire:
        wire.say(case.data)
        heard = wire.hear()
        assert heard is not None
        assert (heard.status, heard.closes) == (case.status, case.closes), heard
        document = heard.document
        assert list(document) == ["error"] and case.says.lower() in document["error"].lower(), document
        if case.closes:
            wire.say(ask(666))  # whatever comes behind it is never taken for a request
            if door.tls is None:  # TLS can't end one direction alone: there the client ends it
                assert wire.rest() == []
        elif case.name != "a length shorter than the body":  # there the rest of it is another request, that is none
            next_request_is_answered(wire)
    with door.connect() as wire:
        next_request_is_answered(wire)


TOLERATED = {
    "no host": post(INFER, tensor()).replace(b"Host: x\r\n", b""),
    "two hosts": post(INFER, tensor(), "Host: y"),
    "empty lines before it": b"\r\n" * 40 + post(INFER, tensor()),
    "a whole URL": post("http://x" + INFER, tensor()),
    "a fragment and a query": post(INFER + "?a=b#c", tensor()),
    "an upgrade to what isn't here": post(INFER, tensor(), "Connection: Upgrade", "Upgrade: websocket"),
    "an upgrade, twice, as Java offers it": post(
        INFER, tensor(), "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "Upgrade: x", "HTTP2-Settings: A"
    ),
    "an expectation of its own": post(INFER, tensor(), "Expect: the-unexpected"),
    "spaces around a length": START + b"Content-Length:  %d \r\n\r\n%b" % (len(tensor()), tensor()),
    "a chunk's extension": CHUNKED + b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(tensor()), tensor()),
    "a chunk a byte": CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in tensor()) + b"0\r\n\r\n",
    "40 KB of headers": post(INFER, tensor(), *(f"X-{number}: y" for number in range(4000))),
    "another content type": post(INFER, tensor(), "Content-Type: image/png"),
    "a trailer that would change its meaning": CHUNKED
    + b"%x\r\n%b\r\n0\r\nContent-Encoding: gzip\r\nInference-Header-Content-Length: 0\r\n\r\n"
    % (len(tensor()), tensor()),
    "gzip in chunks": START
    + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (len(packed := gzip.compress(tensor(), mtime=0)), packed),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_is_odd_and_still_clear_is_answered(door: Door, name: str) -> None:
    with door.connect() as wire:
        wire.say(TOLERATED[name])
        assert value_of(wire.hear()) == 1
        next_request_is_answered(wire)


def test_a_request_may_come_byte_by_byte(door: Door) -> None:
    value = next(VALUES)
    with door.connect() as wire:
        for byte in ask(value):
            wire.say(bytes((byte,)))
        assert value_of(wire.hear()) == value


def test_pipelined_requests_are_answered_in_order_refused_ones_among_them(door: Door) -> None:
    refused = [case for case in (*FRAMING, *ENVELOPES) if not case.closes and "shorter" not in case.name]
    expected: list[Any] = []
    sent = b""
    for case in refused:
        value = next(VALUES)
        sent += case.data + ask(value)
        expected += [(case.status, case.says.lower()), value]
    last = next(case for case in FRAMING if case.closes)
    expected += [(last.status, last.says.lower())]
    with door.connect() as wire:
        wire.say(sent + last.data + ask(666))
        for wanted in expected:
            heard = wire.hear()
            if isinstance(wanted, int):
                assert value_of(heard) == wanted
            else:
                assert heard is not None and heard.status == wanted[0] and wanted[1] in heard.document["error"].lower()
        if door.tls is None:
            assert wire.hear() is None


def test_a_head_is_read_with_the_connection_that_it_closes(door: Door) -> None:
    with door.connect() as wire:
        wire.say(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = wire.hear(head_only=True)
        assert heard is not None and heard.status == 200
        wire.say(post(INFER, tensor(), "Connection: close") + ask(666))
        assert value_of(wire.hear()) == 1
        assert wire.rest() == []


@pytest.mark.parametrize("name", ["tcp", "unix", "tenants"])
def test_who_sends_no_more_still_reads_his_answers(doors: dict[str, Door], name: str) -> None:
    import socket

    values = [next(VALUES) for _ in range(5)]
    with doors[name].connect() as wire:
        wire.say(b"".join(map(ask, values)))
        wire.sock.shutdown(socket.SHUT_WR)
        assert [value_of(heard) for heard in wire.rest()] == values
    for whole, part in ((2, ask(1)[:-3]), (0, ask(1)[:-3]), (1, ask(1)[:30]), (0, ask(1)[:30])):
        values = [next(VALUES) for _ in range(whole)]
        with doors[name].connect() as wire:
            wire.say(b"".join(map(ask, values)) + part)
            wire.sock.shutdown(socket.SHUT_WR)
            *answers, refused = wire.rest()
            assert [value_of(heard) for heard in answers] == values
            assert refused.status == 400 and "ended within its" in refused.document["error"] and refused.closes
    with doors[name].connect() as wire:  # nothing asked, nothing answered
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.rest() == []
