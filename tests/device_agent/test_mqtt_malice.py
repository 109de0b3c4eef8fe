"""The MQTT door against those who mean it ill: what a broker lets through, and brokers that let everything through."""

from __future__ import annotations

import json
import queue
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from identity_model import write_identity
from mqtt_asker import BASE, Asker, user
from quick_constants import RECONNECTING
from raw_mqtt import WAIT_S, RawBroker, packed, publish, text_property

from aios_edge.broker import Broker, start_broker
from aios_edge.mqtt import MqttLink, MqttOptions
from aios_edge.mqtt_message import MessageProperties, Publication

REPLY = "line-3/answers"
ASKED_AT = f"{BASE}/infer/id"
RESULT = f"{ASKED_AT}/result"
LIMIT = 100_000
RESPONSE_TOPIC = 0x08


def body(value: int, **more: Any) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [value]}], **more}).encode()


def value_of(payload: bytes) -> int:
    value: int = json.loads(payload)["outputs"][0]["data"][0]
    return value


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_identity(folder / "id" / "1")
    return folder


def serving(start_agent: Any, repository: Path, url: str, mqtt: str = "", **options: Any) -> Any:
    agent = start_agent(
        f'[repository]\npath = "{repository}"\n[mqtt]\nurl = "{url}"\ninfer = true\n{mqtt}',
        http=f"max_body_bytes = {LIMIT}",
        **options,
    )
    agent.until(lambda status: status["mqtt_infer"]["link"]["subscriptions"] == 1)
    return agent


def figures(agent: Any) -> Any:
    return agent.status()["mqtt_infer"]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with start_broker() as broker:
        yield broker


@pytest.fixture(scope="module")
def agent(start_agent: Any, repository: Path, broker: Broker) -> Iterator[Any]:
    agent = serving(start_agent, repository, broker.url)
    yield agent
    link = figures(agent)["link"]
    assert link["connected"] and link["connects"] == 1, "whatever came, the connection is the first one"
    assert agent.stop() == 0
    assert "Traceback" not in agent.log() and "ERROR" not in agent.log()


@pytest.fixture
def asker(broker: Broker, agent: Any) -> Iterator[Asker]:
    with Asker(broker.url, f"{REPLY}/#", f"{BASE}/infer/+/result/#") as asker:
        yield asker
        asker.ask(body(7), model="id", ResponseTopic=REPLY)
        assert value_of(asker.next().payload) == 7, "the next one is answered"


@pytest.mark.parametrize(
    "topic", ["a/" * 300 + "b", "a/" * 64, "x" * 1025, "é" * 600, "x" * 65_000], ids=lambda topic: str(len(topic))
)
def test_a_response_topic_that_a_broker_would_hang_up_over_is_refused(asker: Asker, topic: str) -> None:
    asker.ask(body(1), model="id", ResponseTopic=topic, CorrelationData=b"7")
    message = asker.next()
    says = "properties" if len(topic) > 32_768 else "has more than 1024 bytes or 64 levels"
    assert message.topic == RESULT and says in json.loads(message.payload)["error"]
    assert user(message)["status"] == ("413" if says == "properties" else "400")


def test_a_response_topic_at_the_limits_gets_its_answer(asker: Asker) -> None:
    for topic in (f"{REPLY}/" + "x" * (1024 - len(REPLY) - 1), REPLY + "/a" * 62):
        asker.ask(body(1), model="id", ResponseTopic=topic)
        assert asker.next().topic == topic


def test_correlation_data_come_back_or_are_refused_for_their_length(asker: Asker) -> None:
    data = bytes(range(256)) * 100
    asker.ask(body(1), model="id", ResponseTopic=REPLY, CorrelationData=data)
    message = asker.next()
    assert message.topic == REPLY and message.properties.CorrelationData == data
    asker.ask(body(1, id="q"), model="id", ResponseTopic=REPLY, CorrelationData=bytes(65_535))
    message = asker.next()
    assert message.topic == RESULT and user(message)["status"] == "413", "the response topic wasn't read either"
    document = json.loads(message.payload)
    assert document["id"] == "q" and "at most 32768 are read" in document["error"]


def test_properties_without_end_cost_nobody_his_answer(agent: Any, asker: Asker) -> None:
    """paho copies the rest of the message for each: this one took it 5 s of a core."""
    before = time.process_time(), cpu_s(agent)
    asker.ask(body(1), model="id", ResponseTopic=REPLY, UserProperty=[("a", "b")] * 25_000)
    assert user(asker.next())["status"] == "413"
    assert cpu_s(agent) - before[1] < 1.0


def cpu_s(agent: Any) -> float:
    ticks = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / 100


def test_a_payload_far_too_long_is_kept_away_and_one_that_is_too_long_refused(agent: Any, asker: Asker) -> None:
    asked = figures(agent)["asked"]
    asker.ask(b" " * 1_000_000, model="id", ResponseTopic=REPLY)
    asker.ask(b" " * (LIMIT + 1), model="id", ResponseTopic=REPLY)
    message = asker.next()
    assert user(message)["status"] == "413" and figures(agent)["asked"] == asked + 1


def test_without_mqtt_5_a_payload_far_too_long_is_refused(start_agent: Any, repository: Path) -> None:
    with start_broker() as broker:
        agent = serving(start_agent, repository, broker.url, 'protocol = "3.1.1"')
        with Asker(broker.url, RESULT, version="3.1.1") as asker:
            for size in (LIMIT + 1, 20_000_000):
                asker.ask(b" " * size, model="id")
                assert "max_body_bytes" in asker.answer()["error"]
            asker.ask(body(7), model="id")
            assert value_of(asker.next().payload) == 7
        assert agent.stop() == 0


# Brokers that check nothing.


@pytest.fixture(scope="module")
def raw() -> Iterator[RawBroker]:
    with RawBroker() as raw:
        yield raw


@pytest.fixture(scope="module")
def told(start_agent: Any, repository: Path, raw: RawBroker) -> Iterator[tuple[Any, socket.socket]]:
    """An agent and its door's connection."""
    agent = serving(start_agent, repository, raw.url, 'protocol = "5"')
    yield agent, raw.door()
    assert figures(agent)["link"]["connects"] == 1
    assert agent.stop() == 0
    assert "Traceback" not in agent.log() and "ERROR" not in agent.log(), agent.log()


def answered(raw: RawBroker, door: socket.socket, value: int) -> None:
    door.sendall(publish(ASKED_AT, body(value)))
    assert value_of(raw.next().payload) == value


def test_texts_that_are_none_are_counted_and_said_once(told: Any, raw: RawBroker) -> None:
    agent, door = told
    for topic, properties in ((b"\xff\xfe", b"\0"), (ASKED_AT.encode(), text_property(RESPONSE_TOPIC, b"\xc0\x80"))):
        door.sendall(publish(topic, body(1), mid=9, properties=properties))
        assert raw.acknowledged.get(timeout=20) == 9, "else it would come again"
    answered(raw, door, 5)
    assert figures(agent)["ignored"] == 2
    assert agent.log().count("a message can't be read, and isn't answered: a text is not UTF-8") == 1


@pytest.mark.parametrize(
    "topic",
    ["#", "+/a", "a/#", "", "$SYS/x", "$share/g/a", "a\0b", "a\nb", "a\x7fb", "a\uffffb", f"{BASE}/cmd", ASKED_AT],
)
def test_a_response_topic_that_is_none_is_refused_at_the_result_topic(told: Any, raw: RawBroker, topic: str) -> None:
    _, door = told
    door.sendall(publish(ASKED_AT, body(1), properties=text_property(RESPONSE_TOPIC, topic.encode())))
    answer = raw.next()
    assert answer.topic == RESULT and "response topic" in json.loads(answer.payload)["error"]
    assert ("status", "400") in answer.properties.user
    answered(raw, door, 5)


def test_a_request_that_is_delivered_twice_is_answered_twice_each_time_the_same(told: Any, raw: RawBroker) -> None:
    _, door = told
    asked = packed(MessageProperties(response_topic="here", correlation_data=b"\0\1"))
    for dup in (False, True):
        door.sendall(publish(ASKED_AT, body(3), mid=4, dup=dup, properties=asked))
    answers = [raw.next() for _ in range(2)]
    acknowledged = 0
    while acknowledged < 2:  # of requests before these it may still hear
        acknowledged += raw.acknowledged.get(timeout=WAIT_S) == 4
    assert {(answer.topic, answer.properties.correlation_data, value_of(answer.payload)) for answer in answers} == {
        ("here", b"\0\1", 3)
    }


GARBAGE = {
    "no packet": b"\x00\x00",
    "a length without end": b"\x30\xff\xff\xff\xff\xff",
    "a publish that is cut off": b"\x32\x03\0\x09a",
    "properties that are none": publish(ASKED_AT, b"", properties=b"\x02\x99\x01"),
    "QoS 3": b"\x36" + publish(ASKED_AT, body(1))[1:],
    "a CONNACK without properties": b"\x20\x01\x00",
    "a SUBACK of nothing": b"\x90\x00",
    "a PUBACK of an unknown message": b"\x40\x04\0\x07\x99\xff",
    "a client's packet": b"\x10\x00",
    "an HTTP answer": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_isnt_mqtt_costs_the_connection_and_nothing_else(name: str) -> None:
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with RawBroker() as raw:
        options = MqttOptions(url=raw.url, protocol="5", backoff_min_s=0.02, backoff_max_s=0.05)
        link = MqttLink(options, call=lambda function: function(), on_message=lambda got: heard.put(got.payload))
        link.subscribe(f"{BASE}/infer/+")
        link.start()
        door = raw.door()
        door.sendall(GARBAGE[name])
        door.shutdown(socket.SHUT_WR)  # some of it is the beginning of a packet
        raw.door().sendall(publish(ASKED_AT, b"after it"))
        assert heard.get(timeout=20) == b"after it"
        assert link.state.connects == 2
        link.stop()


def test_an_answer_that_a_broker_hangs_up_over_takes_no_other_along(start_agent: Any, repository: Path) -> None:
    with RawBroker(poison="poison") as raw:
        agent = serving(start_agent, repository, raw.url, 'protocol = "5"', constants=RECONNECTING)
        door = raw.door()
        to = packed(MessageProperties(response_topic="poison"))
        door.sendall(publish(ASKED_AT, body(1), mid=1, properties=to) + publish(ASKED_AT, body(2), mid=2))
        heard: list[Publication] = []
        for _ in range(2):
            door = raw.door()  # the connection after the one that it cost
        while not any(value_of(answer.payload) == 2 for answer in heard):
            heard.append(raw.next())
        agent.until(lambda status: status["mqtt_infer"]["lost"] == 1)
        assert "each of the 3 times" in figures(agent)["lost_reason"]
        agent.until(lambda status: status["mqtt_infer"]["link"]["connected"])
        while not raw.doors.empty():
            door = raw.door()
        answered(raw, door, 5)
        assert {answer.topic for answer in heard} == {RESULT}
        assert agent.stop() == 0
