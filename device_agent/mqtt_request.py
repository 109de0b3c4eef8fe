"""Inference over MQTT, as messages: what is asked by one, where its answer goes, and the answer as a message. Pure.

The payload is the body of an HTTP request: Open Inference Protocol JSON, behind which binary tensors may follow; the
user property ``inference-header-content-length`` then has the length of the JSON, as the HTTP header has.

An answer is published by the agent, with the agent's rights at the broker. So where it may go is not the asker's choice
alone: nothing in the agents' own tree, where others would take it for a device's word, or be asked by it.
"""

from __future__ import annotations

import contextlib
import math

import msgspec

from aios_edge.errors import RequestError
from aios_edge.mqtt_message import MAX_PROPERTIES_BYTES, MessageProperties, Publication
from aios_edge.oip.envelope import ABSENT, JSON_LENGTH_HEADER, MAX_TIMEOUT_US, parse_json_length, split_body
from aios_edge.topics import ROOT, Topics
from device_agent.http import Reply

JSON_LENGTH = JSON_LENGTH_HEADER.lower()
_HINTS_WITHIN_BYTES = 65_536  # they aren't worth reading more
#: Of a response topic: within what brokers take. One that doesn't hangs up, over and over, whenever the answer is sent.
_TOPIC_BYTES = 1024
_TOPIC_LEVELS = 64


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``within_s``: what was left of its message's expiry; None: it had none."""

    topic: str
    model: str
    body: bytes
    json_length: int | None
    within_s: float | None


class Came(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a message before it is read. ``model``: which one its topic names."""

    topic: str
    model: str
    size_bytes: int  # of its payload


class ReplyTo(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer goes. ``problem``: why that isn't where it was asked to go."""

    topic: str
    correlation_data: bytes | None
    qos: int
    problem: str | None = None


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What of a request the door minds itself, as far as that can be read of what may be no request at all: the
    client's ``id``, and how long it waits."""

    id: str | None = None
    timeout_s: float | None = None


class _Head(msgspec.Struct, frozen=True):
    id: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT


class _Parameters(msgspec.Struct, frozen=True):
    timeout: int = 0


_head = msgspec.json.Decoder(_Head)
_id = msgspec.json.Decoder(str)
_parameters = msgspec.json.Decoder(_Parameters)
_document = msgspec.json.Decoder(dict[str, msgspec.Raw])


def reply_to(message: Publication) -> ReplyTo:
    """Its response topic, where that may be one; else the result topic beside the one it came by."""
    result = f"{message.topic}/result"
    asked = message.properties.response_topic
    problem = None if asked is None else _problem(asked, result)
    return ReplyTo(
        topic=result if asked is None or problem is not None else asked,
        correlation_data=message.properties.correlation_data,
        qos=min(message.qos, 1),
        problem=problem,
    )


def light(message: Publication) -> Publication:
    """Without the properties that nobody reads: while it is answered they would only take memory."""
    properties = message.properties
    kept = tuple(pair for pair in properties.user if pair[0].lower() == JSON_LENGTH)[:2]
    return msgspec.structs.replace(message, properties=msgspec.structs.replace(properties, user=kept))


def read(message: Publication, to: ReplyTo, topics: Topics, *, max_body_bytes: int) -> Asked:
    """What a message asks; raises :class:`RequestError` for what it can't be."""
    if message.properties.unread_bytes:
        raise RequestError(
            f"are {message.properties.unread_bytes} bytes, at most {MAX_PROPERTIES_BYTES} are read",
            status=413,
            where="the message's properties",
            remedy="Leave out what isn't needed",
        )
    if to.problem is not None:
        raise RequestError(to.problem, where="response topic", remedy="Choose another, or leave it out")
    if len(message.payload) > max_body_bytes:
        raise RequestError(
            f"the payload is longer than {max_body_bytes} bytes",
            status=413,
            remedy="Send smaller batches, or raise http.max_body_bytes",
        )
    lengths = [value for name, value in message.properties.user if name.lower() == JSON_LENGTH]
    if len(lengths) > 1:
        raise RequestError("is given more than once", where=JSON_LENGTH, remedy="Give it once")
    return Asked(
        topic=message.topic,
        model=topics.model(message.topic),
        body=message.payload,
        json_length=parse_json_length(lengths[0]) if lengths else None,
        within_s=message.properties.expiry_s,
    )


def hints(message: Publication) -> Hints:
    """Never raises."""
    lengths = [value for name, value in message.properties.user if name.lower() == JSON_LENGTH]
    if len(message.payload) > _HINTS_WITHIN_BYTES:
        return Hints()
    try:
        text, _ = split_body(message.payload, parse_json_length(lengths[0]) if lengths else None)
        head = _head.decode(text)
    except (RequestError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Hints()
    client_id: str | None = None
    timeout_us = 0
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        client_id = _id.decode(head.id)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        timeout_us = _parameters.decode(head.parameters).timeout
    return Hints(id=client_id, timeout_s=timeout_us / 1e6 if 0 < timeout_us <= MAX_TIMEOUT_US else None)


def answer(reply: Reply, message: Publication, to: ReplyTo, hints: Hints, *, waited_s: float) -> Publication:
    """The answer to a message that came ``waited_s`` ago. Its headers are user properties; a refusal has the client's
    ``id``, which over MQTT 3.1.1 is all that tells whose it is."""
    body = reply.body
    if reply.status >= 400 and hints.id is not None:
        body = msgspec.json.encode({"id": hints.id, **_document.decode(body)})
    expiry_s = message.properties.expiry_s
    return Publication(
        topic=to.topic,
        payload=body,
        qos=to.qos,
        properties=MessageProperties(
            correlation_data=to.correlation_data,
            content_type=reply.content_type,
            expiry_s=None if expiry_s is None else max(1, math.ceil(expiry_s - waited_s)),
            user=(
                ("status", str(reply.status)),
                *((name.decode(), value.decode()) for name, value in reply.headers),
            ),
        ),
    )


def _problem(topic: str, result: str) -> str | None:
    """Why nothing is published there."""
    if not topic:
        return "is empty"
    if "+" in topic or "#" in topic:
        return f"{topic[:80]!r} has a wildcard"
    if topic.startswith("$") or any(map(_forbidden, topic)):
        return f"{topic[:80]!r} is no topic for clients"
    if len(topic.encode()) > _TOPIC_BYTES or topic.count("/") >= _TOPIC_LEVELS:
        return f"{topic[:80]!r}… has more than {_TOPIC_BYTES} bytes or {_TOPIC_LEVELS} levels"
    if topic.startswith(f"{ROOT}/") and topic != result and not topic.startswith(f"{result}/"):
        return f"{topic[:80]!r} is among the agents' own topics, of which only {result} and those below it take answers"
    return None


def _forbidden(char: str) -> bool:
    """What MQTT lets a broker hang up over: control characters, and code points that are none."""
    code = ord(char)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE
