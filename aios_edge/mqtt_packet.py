"""A PUBLISH as it comes over the wire (MQTT 5 and 3.1.1, section 3.3), in one pass over its bytes. Pure.

paho reads one too, but copies all that is left of the packet, payload included, for each property: 5000 of them before
10 MB took it 7 s of a core. And any client may publish what it likes.
"""

from __future__ import annotations

import struct

from aios_edge.mqtt_message import MAX_PROPERTIES_BYTES, NONE, MessageProperties, Publication

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

_FORMAT, _EXPIRY, _CONTENT_TYPE, _RESPONSE_TOPIC = 0x01, 0x02, 0x03, 0x08
_CORRELATION, _SUBSCRIPTION, _ALIAS, _USER = 0x09, 0x0B, 0x23, 0x26


class Malformed(ValueError):
    """It isn't MQTT: nobody knows where the next packet begins."""


class Unreadable(ValueError):
    """A whole PUBLISH, in which a text isn't UTF-8. ``mid``: what acknowledges it; 0 for QoS 0."""

    def __init__(self, what: str, mid: int) -> None:
        super().__init__(what)
        self.mid = mid


def read_publish(first: int, packet: bytes | bytearray, *, five: bool) -> tuple[int, Publication]:
    """Packet identifier (0 for QoS 0) and message. ``first``: the packet's first byte; ``packet``: what follows its
    length. Raises :class:`Malformed` and :class:`Unreadable`.
    """
    view = memoryview(packet)
    qos = first >> 1 & 3
    if qos > 1:
        raise Malformed(f"QoS {qos}, where we ask for no more than 1")
    mid, properties = 0, NONE
    try:
        topic, at = _data(view, 0)
        if qos:
            (mid,), at = _U16.unpack_from(view, at), at + 2
        if five:
            length, at = _varint(view, at)
            if at + length > len(view):
                raise Malformed("the properties are longer than the packet")
            if length > MAX_PROPERTIES_BYTES:
                properties = MessageProperties(unread_bytes=length)
            elif length:
                properties = _properties(view[at : at + length])
            at += length
        name = str(topic, "utf-8")
    except (struct.error, IndexError) as error:
        raise Malformed("the packet ends within a field") from error
    except UnicodeDecodeError as error:
        raise Unreadable("a text is not UTF-8", mid) from error
    if not name:
        raise Malformed("the topic is empty")
    message = Publication(topic=name, payload=bytes(view[at:]), qos=qos, retain=bool(first & 1), properties=properties)
    return mid, message


def _properties(view: memoryview) -> MessageProperties:
    found: dict[str, object] = {}
    user: list[tuple[str, str]] = []
    at = 0
    while at < len(view):
        kind, at = _varint(view, at)
        if kind == _USER:
            key, at = _data(view, at)
            value, at = _data(view, at)
            user.append((str(key, "utf-8"), str(value, "utf-8")))
            continue
        name: str | None = None
        if kind in (_CONTENT_TYPE, _RESPONSE_TOPIC):
            name = "content_type" if kind == _CONTENT_TYPE else "response_topic"
            data, at = _data(view, at)
            given: object = str(data, "utf-8")
        elif kind == _CORRELATION:
            name = "correlation_data"
            data, at = _data(view, at)
            given = bytes(data)
        elif kind == _EXPIRY:
            name = "expiry_s"
            (given,), at = _U32.unpack_from(view, at), at + 4
        elif kind == _SUBSCRIPTION:
            given, at = _varint(view, at)
        elif kind == _ALIAS:
            raise Malformed("a topic alias, which we don't take")
        elif kind == _FORMAT:
            given, at = view[at], at + 1
        else:
            raise Malformed(f"property {kind} in a PUBLISH")
        if name in found:
            raise Malformed(f"{name} is there twice")
        if name is not None:
            found[name] = given
    return MessageProperties(user=tuple(user), **found)  # type: ignore[arg-type]


def _data(view: memoryview, at: int) -> tuple[memoryview, int]:
    """Bytes behind their length."""
    (length,) = _U16.unpack_from(view, at)
    end = at + 2 + length
    if end > len(view):
        raise IndexError
    return view[at + 2 : end], end


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(4):
        byte = view[at]
        value, at = value | (byte & 127) << 7 * place, at + 1
        if not byte & 128:
            return value, at
    raise Malformed("a number of more than four bytes")
