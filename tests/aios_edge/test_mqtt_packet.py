"""A PUBLISH from the wire: what paho writes is read as it was meant, and whatever else comes is refused."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from aios_edge.mqtt_client import publish_properties
from aios_edge.mqtt_message import MAX_PROPERTIES_BYTES, MessageProperties, Publication
from aios_edge.mqtt_packet import Malformed, Unreadable, read_publish

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
PROPERTIES = st.builds(
    MessageProperties,
    response_topic=st.none() | TEXT.filter(lambda text: not set("+#") & set(text)),
    correlation_data=st.none() | st.binary(max_size=20),
    content_type=st.none() | TEXT,
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user=st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple),
)


def packet(topic: bytes, mid: int | None, properties: bytes | None, payload: bytes = b"") -> bytes:
    parts = [struct.pack(">H", len(topic)), topic]
    parts += [] if mid is None else [struct.pack(">H", mid)]
    return b"".join([*parts, properties or b"", payload])


def packed(properties: MessageProperties) -> bytes:
    made = publish_properties(properties) or Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    data: bytes = made.pack()  # type: ignore[no-untyped-call]
    return data


@given(
    topic=TEXT.filter(bool),
    properties=PROPERTIES,
    payload=st.binary(max_size=50),
    mid=st.none() | st.integers(1, 65535),
    retain=st.booleans(),
    five=st.booleans(),
)
def test_what_paho_writes_is_read_as_it_was_meant(
    topic: str, properties: MessageProperties, payload: bytes, mid: int | None, retain: bool, five: bool
) -> None:
    given = properties if five else MessageProperties()
    wire = packet(topic.encode(), mid, packed(given) if five else None, payload)
    first = 0x30 | (mid is not None) << 1 | retain
    expected = Publication(topic=topic, payload=payload, qos=int(mid is not None), retain=retain, properties=given)
    assert read_publish(first, bytearray(wire), five=five) == (mid or 0, expected)


@given(first=st.integers(0x30, 0x3F), data=st.binary(max_size=80), five=st.booleans())
def test_any_bytes_are_a_message_or_refused(first: int, data: bytes, five: bool) -> None:
    with contextlib.suppress(Malformed, Unreadable):
        read_publish(first, data, five=five)


@given(properties=PROPERTIES, cut=st.integers(0, 200), at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_message_with_a_byte_changed_or_cut_off_is_a_message_or_refused(
    properties: MessageProperties, cut: int, at: int, byte: int
) -> None:
    whole = bytearray(packet(b"a/b", 7, packed(properties), b"payload"))
    whole[at % len(whole)] = byte
    for data in (whole, whole[: cut % len(whole)]):
        with contextlib.suppress(Malformed, Unreadable):
            read_publish(0x32, data, five=True)


@pytest.mark.parametrize(
    ("first", "data", "says"),
    [
        (0x34, packet(b"a", 1, b"\0"), "QoS 2"),
        (0x36, packet(b"a", 1, b"\0"), "QoS 3"),
        (0x30, packet(b"", None, b"\0"), "topic is empty"),
        (0x30, packet(b"a", None, b"\x05"), "longer than the packet"),
        (0x30, packet(b"a", None, b"\xff\xff\xff\xff\xff"), "more than four bytes"),
        (0x30, packet(b"a", None, b"\x03\x23\0\1"), "topic alias"),
        (0x30, packet(b"a", None, b"\x02\x99\x01"), "property 153"),
        (0x30, packet(b"a", None, b"\x0a\x02\0\0\0\1\x02\0\0\0\1"), "expiry_s is there twice"),
        (0x30, packet(b"a", None, b"\x04\x09\0\5a"), "ends within a field"),
        (0x32, b"\0\1a", "ends within a field"),
    ],
)
def test_what_is_no_publish_says_why(first: int, data: bytes, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        read_publish(first, data, five=True)


def test_texts_that_are_none_leave_what_acknowledges_them() -> None:
    for data in (packet(b"\xff", 7, b"\0"), packet(b"a", 7, b"\x04\x08\0\1\xff"), packet(b"\xed\xa0\x80", 7, b"\0")):
        with pytest.raises(Unreadable) as caught:
            read_publish(0x32, data, five=True)
        assert caught.value.mid == 7


def test_properties_without_end_are_not_read_and_cost_no_time() -> None:
    pair = b"\x26\0\1a\0\1b"
    many = packed(MessageProperties(user=(("a", "b"),) * (MAX_PROPERTIES_BYTES // len(pair))))
    payload = bytes(10_000_000)
    began = time.process_time()
    _, message = read_publish(0x30, packet(b"t", None, many, payload), five=True)
    assert len(message.properties.user) > 4000 and time.process_time() - began < 1.0, "paho takes seconds"
    over = b"\xff\xff\x03" + pair * (65535 // len(pair)) + bytes(65535 % len(pair))
    _, message = read_publish(0x30, packet(b"t", None, over, b"x"), five=True)
    assert message == Publication(topic="t", payload=b"x", qos=0, properties=MessageProperties(unread_bytes=65535)), (
        "and the payload is found behind them"
    )
