"""Answers between the desk and the broker, and what a message may ask: states and values, without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aios_edge.errors import RequestError
from aios_edge.mqtt import Delivery
from aios_edge.mqtt_message import MessageProperties, Publication
from aios_edge.topics import Topics
from device_agent.http import Reply
from device_agent.mqtt_answers import MAX_WAITING, Answers
from device_agent.mqtt_request import Hints, answer, hints, read, reply_to

TOPICS = Topics("g", "d")
ASKED_AT = TOPICS.infer("m")
BYTES = 2_000


class Delivered(RuleBasedStateMachine):
    """Whatever broker and time do, each answer is delivered, lost or waiting, and no more waits than may."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.up = False
        self.told = False  # what the answers were told of it
        self.posted = 0
        self.unacknowledged: list[tuple[Publication, Callable[[Delivery], None]]] = []
        self.taken: list[str] = []
        self.answers = Answers(self.publish, max_bytes=BYTES, clock=lambda: self.now)

    def publish(self, message: Publication, on_delivered: Callable[[Delivery], None]) -> bool:
        assert self.told, "nothing is sent on a connection that was not heard of: it would be sent again"
        if self.up:
            self.unacknowledged.append((message, on_delivered))
        return self.up

    @rule(qos=st.sampled_from([0, 1]), size=st.integers(0, 900), lives_s=st.floats(0.1, 5.0), instead=st.booleans())
    def post(self, qos: int, size: int, lives_s: float, instead: bool) -> None:
        self.posted += 1
        topic = f"t{self.posted}"

        def other(reason: str) -> Publication:
            self.posted += 1
            return Publication(topic=topic, payload=reason.encode(), qos=qos)

        message = Publication(topic=topic, payload=b"x" * size, qos=qos)
        self.answers.post(message, worthless_at=self.now + lives_s, instead=other if instead else None)

    @rule(ok=st.booleans(), which=st.integers(0, 50))
    def acknowledge(self, ok: bool, which: int) -> None:
        if self.unacknowledged:
            _, tell = self.unacknowledged.pop(which % len(self.unacknowledged))
            tell(Delivery(ok=ok, reason=None if ok else "no"))

    @rule(told=st.booleans())
    def drop(self, told: bool) -> None:
        """The connection ends; ``told``: at once."""
        self.up = False
        self.unacknowledged.clear()
        if told:
            self.told = False
            self.answers.link_changed(connected=False)

    @rule()
    def connect(self) -> None:
        if self.told:
            self.told = False
            self.answers.link_changed(connected=False)
        self.up = self.told = True
        self.unacknowledged.clear()
        before = len(self.answers)
        self.answers.link_changed(connected=True)
        assert len(self.unacknowledged) <= before

    @rule(passed_s=st.floats(0.0, 3.0))
    def wait(self, passed_s: float) -> None:
        self.now += passed_s

    @invariant()
    def each_is_somewhere(self) -> None:
        answers = self.answers
        assert answers.delivered + answers.lost + len(answers) == self.posted
        assert (answers.lost_reason is None) is (answers.lost == 0)
        assert len(answers) <= MAX_WAITING and (answers._bytes <= BYTES or len(answers) == 1)
        assert (answers._bytes == 0) is (len(answers) == 0)


TestDelivered = Delivered.TestCase
TestDelivered.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_answer_of_qos_1_outlives_the_connection_and_one_of_qos_0_does_not() -> None:
    sent: list[tuple[str, Callable[[Delivery], None]]] = []

    def publish(message: Publication, tell: Callable[[Delivery], None]) -> bool:
        sent.append((message.topic, tell))
        return True

    now = 0.0
    answers = Answers(publish, max_bytes=10_000, clock=lambda: now)
    for topic, qos, until in (("early", 1, 9.0), ("never", 0, 9.0), ("short", 1, 1.0)):
        answers.post(Publication(topic=topic, payload=b"", qos=qos), worthless_at=until)
    assert sent == [] and answers.lost == 1 and answers.lost_reason == "there is no connection to the broker"
    answers.link_changed(connected=True)
    assert [topic for topic, _ in sent] == ["early", "short"]
    now = 2.0
    answers.link_changed(connected=False)
    assert answers.lost == 2 and answers.lost_reason == "nobody waits for it any more"
    answers.link_changed(connected=True)
    assert [topic for topic, _ in sent] == ["early", "short", "early"]
    sent[0][1](Delivery(ok=True))
    sent[2][1](Delivery(ok=True))
    assert answers.delivered == 1 and len(answers) == 0, "twice at the broker is one answer"
    answers.post(Publication(topic="once", payload=b"", qos=0), worthless_at=9.0)
    assert sent[-1][0] == "once" and len(answers) == 1
    answers.link_changed(connected=False)
    assert answers.lost_reason == "the connection ended" and answers.lost == 3 and len(answers) == 0


def test_an_answer_that_ends_the_connection_takes_no_other_along() -> None:
    """Such a broker hangs up over one topic, each time."""
    up = True
    unheard: list[tuple[str, Callable[[Delivery], None]]] = []
    delivered: list[str] = []

    def publish(message: Publication, tell: Callable[[Delivery], None]) -> bool:
        nonlocal up
        if up and message.topic == "poison":
            up = False
            unheard.clear()  # what was sent with it was read by nobody
        elif up:
            unheard.append((message.topic, tell))
        return True

    def acknowledge() -> None:
        while up and unheard:
            topic, tell = unheard.pop(0)
            delivered.append(topic)
            tell(Delivery(ok=True))

    answers = Answers(publish, max_bytes=10_000, clock=lambda: 0.0)
    answers.link_changed(connected=True)
    for topic in ("a", "poison", "b", "c"):
        answers.post(Publication(topic=topic, payload=b""), worthless_at=9.0)
    connections = 1
    while len(answers):
        answers.link_changed(connected=False)
        up = True
        connections += 1
        answers.link_changed(connected=True)
        answers.post(Publication(topic=f"new{connections}", payload=b""), worthless_at=9.0)
        acknowledge()
    assert {"a", "b", "c"} <= set(delivered) and "poison" not in delivered and connections <= 6
    assert answers.lost == 1 and answers.lost_reason == "the connection ended each of the 3 times it was sent"


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
BEGINNINGS = st.sampled_from([[], ["aios", "v1"], ["aios", "v1", "g", "d"], ["aios", "v1", "g", "d", "infer", "m"]])
LEVELS = st.lists(st.sampled_from(["aios", "v1", "g", "d", "infer", "m", "result", "cmd", "+", "#", "$SYS", "", "x"]))


def message(topic: str = ASKED_AT, payload: bytes = b"{}", qos: int = 1, **properties: Any) -> Publication:
    return Publication(topic=topic, payload=payload, qos=qos, properties=MessageProperties(**properties))


@given(begun=BEGINNINGS, levels=LEVELS, data=st.none() | st.binary(max_size=9), qos=st.integers(0, 2))
def test_no_answer_is_a_question_or_the_word_of_a_device(
    begun: list[str], levels: list[str], data: bytes | None, qos: int
) -> None:
    topic = "/".join([*begun, *levels])
    to = reply_to(message(response_topic=topic, correlation_data=data, qos=qos))
    assert to.correlation_data == data and to.qos <= min(qos, 1)
    result = f"{ASKED_AT}/result"
    assert not set("+#\0") & set(to.topic) and to.topic and not to.topic.startswith("$")
    assert not to.topic.startswith("aios/v1/") or to.topic == result or to.topic.startswith(result + "/")
    assert to.topic == (topic if to.problem is None else result)
    if to.problem is not None:
        with pytest.raises(RequestError, match="response topic"):
            read(message(response_topic=topic), to, TOPICS, max_body_bytes=99)


@settings(deadline=None)
@given(model=TEXT)
def test_any_name_is_a_level(model: str) -> None:
    topic = TOPICS.infer(model)
    assert not set("+#\0") & set(topic) and topic.count("/") == TOPICS.infer_filter.count("/")
    assert TOPICS.model(topic) == model


@given(payload=st.binary(max_size=60) | TEXT.map(str.encode), length=st.none() | TEXT | st.integers(-2, 99).map(str))
def test_what_is_no_request_has_no_hints_and_raises_nothing(payload: bytes, length: str | None) -> None:
    user = () if length is None else (("Inference-Header-Content-Length", length),)
    assert isinstance(hints(message(payload=payload, user=user)), Hints)


@given(
    client_id=TEXT, timeout=st.integers(0, 2**53) | st.just(10**400), tail=st.binary(max_size=9), pad=st.integers(0, 5)
)
def test_the_id_and_the_timeout_are_found_beside_binary_tensors(
    client_id: str, timeout: int, tail: bytes, pad: int
) -> None:
    head = msgspec.json.encode({"inputs": [], "id": client_id, "parameters": {"timeout": timeout, "x": "y"}})
    head += b" " * pad
    user = (("inference-header-content-length", str(len(head))),)
    found = hints(message(payload=head + tail, user=user))
    assert found == Hints(id=client_id, timeout_s=timeout / 1e6 if 0 < timeout <= 2**53 else None)
    refused = Reply(status=503, body=b'{"error":"no","parameters":{"route":null}}', headers=((b"retry-after", b"2"),))
    asked = message(payload=head, user=user, expiry_s=3, correlation_data=tail)
    made = answer(refused, asked, reply_to(asked), found, waited_s=2.5)
    assert msgspec.json.decode(made.payload) == {"id": client_id, "error": "no", "parameters": {"route": None}}
    assert made.properties.expiry_s == 1 and made.properties.user == (("status", "503"), ("retry-after", "2"))
    assert made.topic == f"{ASKED_AT}/result" and made.properties.correlation_data == tail


def test_a_message_without_time_left_is_asked_without_time_left() -> None:
    asked = message(expiry_s=0, user=(("Inference-Header-Content-Length", "2"),))
    found = read(asked, reply_to(asked), TOPICS, max_body_bytes=2)
    assert (found.model, found.within_s, found.json_length) == ("m", 0, 2)
    with pytest.raises(RequestError, match="longer than 1 bytes"):
        read(asked, reply_to(asked), TOPICS, max_body_bytes=1)


def test_parameters_that_are_none_leave_the_id() -> None:
    assert hints(message(payload=b'{"id": "q", "parameters": [1]}')) == Hints(id="q")
    assert hints(message(payload=b'{"id": "\xff", "parameters": {"timeout": 1000000}}')) == Hints(timeout_s=1.0)
    assert hints(message(payload=b'{"id": 5, "parameters": {"timeout": 2000000}}')) == Hints(timeout_s=2.0)
    assert hints(message(payload=b'{"id": "q", "x": "' + b"x" * 70_000 + b'"}')) == Hints(), "not worth reading"
