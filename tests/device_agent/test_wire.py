"""Messages over a real socketpair: round trips, large payloads, and everything that isn't a message."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.telemetry import ProviderStep
from device_agent import wire
from device_agent.values import ActivationCheck, ActivationReport, EngineReport

_texts = st.text(max_size=40)
_counts = st.integers(0, 2**53)
_seconds = st.floats(0, 1e9)
_regions = st.builds(wire.Region, _counts, _counts)
_checks = st.builds(
    ActivationCheck, name=_texts, passed=st.booleans(), detail=_texts, measured=st.none() | _seconds, promised=st.none()
)
_steps = st.builds(
    ProviderStep,
    name=_texts,
    active=st.booleans(),
    reason=st.none() | _texts,
    options=st.dictionaries(_texts, _texts, max_size=2),
    nodes=st.none() | _counts,
    operators=st.dictionaries(_texts, _counts, max_size=2),
)
_engines = st.builds(
    EngineReport,
    state=st.sampled_from(["cached", "built", "missing", "unfit", "failed", "nothing"]),
    reason=st.none() | _texts,
    size_bytes=st.none() | _counts,
    took_s=st.none() | _seconds,
)
_reports = st.builds(
    ActivationReport,
    bundle_id=_texts,
    model=_texts,
    version=_texts,
    providers_requested=st.tuples(_texts),
    providers_active=st.tuples(_texts, _texts),
    provider_reason=st.none() | _texts,
    checks=st.lists(_checks, max_size=3).map(tuple),
    latency_p95_s=st.none() | _seconds,
    rss_bytes=st.none() | _counts,
    load_s=_seconds,
    provider_steps=st.lists(_steps, max_size=2).map(tuple),
    engine=st.none() | _engines,
)
_run_items = st.builds(
    wire.RunItem,
    request_id=_counts,
    body=_regions,
    json_length=st.none() | _counts,
    deadline_at=st.none() | _seconds,
)
_done_items = st.builds(
    wire.DoneItem,
    request_id=_counts,
    status=st.integers(100, 599),
    outputs=_regions,
    binary=_regions,
    error=st.none() | _texts,
    length=_counts,
    batch_size=_counts,
    compute_s=_seconds,
)
_messages = st.one_of(
    st.builds(wire.Load, bundle_path=_texts, profile=_texts, generation=_counts, check=_texts, slowdown=_seconds),
    st.builds(wire.Run, batch_id=_counts, generation=_counts, items=st.lists(_run_items, max_size=4).map(tuple)),
    st.builds(wire.Stop),
    st.builds(wire.Loading, generation=_counts, stage=_texts),
    st.builds(wire.Ready, generation=_counts, report=_reports),
    st.builds(wire.Refused, generation=_counts, check=_texts, detail=_texts, report=st.none() | _reports),
    st.builds(
        wire.Done,
        batch_id=_counts,
        generation=_counts,
        busy_s=_seconds,
        rss_bytes=_counts,
        items=st.lists(_done_items, max_size=4).map(tuple),
    ),
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    supervisor, worker = wire.pair()
    with supervisor, worker:
        yield supervisor, worker


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(deadline=None)  # the machine may be busy
@given(message=_messages, payload=st.binary(max_size=300) | st.sampled_from([b"x" * 65_000, b"y" * 200_000]))
def test_a_message_arrives_as_it_was_sent(message: wire.Message, payload: bytes) -> None:
    supervisor, worker = wire.pair()
    with supervisor, worker:
        wire.send(supervisor, message, payload)
        received = wire.receive(worker)
    assert received is not None
    assert received[0] == message
    assert bytes(received[1]) == payload


@settings(deadline=None)  # the machine may be busy
@given(junk=st.binary(min_size=1, max_size=200))
def test_junk_is_refused_and_nothing_else_happens(junk: bytes) -> None:
    supervisor, worker = wire.pair()
    with supervisor, worker:
        supervisor.send(junk)
        try:
            received = wire.receive(worker)
        except ConnectionError:
            return
        assert received is not None  # hypothesis found a valid message; so be it


@pytest.mark.parametrize("size", [wire.INLINE_LIMIT_BYTES - 100, wire.INLINE_LIMIT_BYTES, 5_000_000])
def test_large_payloads_travel_whole_and_leave_no_descriptor(
    ends: tuple[socket.socket, socket.socket], size: int
) -> None:
    payload = os.urandom(size)
    before = open_descriptors()
    for _ in range(20):
        wire.send(ends[0], wire.Stop(), payload)
        received = wire.receive(ends[1])
        assert received is not None
        assert bytes(received[1]) == payload
        del received
    assert open_descriptors() == before


def test_a_header_beyond_a_datagram_travels_too(ends: tuple[socket.socket, socket.socket]) -> None:
    items = tuple(
        wire.RunItem(request_id=number, body=wire.Region(0, 1), json_length=None, deadline_at=1.5)
        for number in range(10_000)
    )
    message = wire.Run(batch_id=1, generation=1, items=items)
    wire.send(ends[0], message, b"z")
    received = wire.receive(ends[1])
    assert received is not None
    assert received[0] == message
    assert bytes(received[1]) == b"z"


def test_a_closed_peer_is_the_end_even_with_messages_unread(ends: tuple[socket.socket, socket.socket]) -> None:
    supervisor, worker = ends
    wire.send(supervisor, wire.Stop())
    worker.close()  # with a message unread, which the kernel reports as a reset
    supervisor.setblocking(True)
    assert wire.receive(supervisor) is None


def test_a_payload_its_sender_could_still_shrink_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    header = msgspec.msgpack.encode(wire.Stop())
    fd = os.memfd_create("unsealed")
    os.write(fd, header + b"payload")
    before = open_descriptors()
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    ends[0].sendmsg([len(header).to_bytes(4, "little")], control)
    with pytest.raises(ConnectionError, match="still change"):
        wire.receive(ends[1])
    assert open_descriptors() == before
    os.close(fd)


def test_more_descriptors_than_one_are_refused_and_closed(ends: tuple[socket.socket, socket.socket]) -> None:
    fds = [os.memfd_create("one"), os.memfd_create("two")]
    before = open_descriptors()
    ends[0].sendmsg([b"\x01\x00\x00\x00x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    with pytest.raises(ConnectionError, match="truncated"):
        wire.receive(ends[1])
    assert open_descriptors() == before
    for fd in fds:
        os.close(fd)


def test_a_datagram_larger_than_any_message_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].send(b"\x10\x00\x00\x00" + b"x" * (wire.INLINE_LIMIT_BYTES + 1))
    with pytest.raises(ConnectionError, match="truncated"):
        wire.receive(ends[1])


@pytest.mark.parametrize("region", [wire.Region(0, 5), wire.Region(-1, 2), wire.Region(2, -1), wire.Region(9, 0)])
def test_a_region_outside_its_payload_is_refused(region: wire.Region) -> None:
    with pytest.raises(ConnectionError, match="outside"):
        region.of(b"four")
