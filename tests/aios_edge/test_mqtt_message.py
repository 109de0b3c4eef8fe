"""Messages with MQTT 5's properties, there and back through a broker; and how many may wait."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from aios_edge.broker import start_broker
from aios_edge.mqtt import BACKLOG_MESSAGES, Delivery, LinkState, MqttLink, MqttOptions, Publication
from aios_edge.mqtt_message import NONE, Backlog, MessageProperties

WAIT_S = 15.0
FULL = MessageProperties(
    response_topic="r/é",
    correlation_data=b"\0\xff",
    content_type="application/json",
    expiry_s=60,
    user=(("a", "1"), ("a", "2"), ("é", "")),
)


class Link:
    """A link whose callbacks are run by :meth:`run`, as a busy event loop would run them late."""

    def __init__(self, url: str, **more: Any) -> None:
        self.waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.heard: list[Publication] = []
        self.state = LinkState()
        self.link = MqttLink(
            MqttOptions(url=url, backoff_min_s=0.05),
            call=self.waiting.put,
            on_state=lambda state: setattr(self, "state", state),
            on_message=self.heard.append,
            **more,
        )

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.waiting.get(timeout=WAIT_S)()

    def start(self, *filters: str) -> None:
        for topic_filter in filters:
            self.link.subscribe(topic_filter, 1, retained=False)
        self.link.start()
        self.until(lambda: self.state.connected and self.state.subscriptions == len(filters))


def test_properties_go_through_a_broker_and_are_left_out_for_3_1_1() -> None:
    with start_broker("mosquitto") as broker:
        link = Link(broker.url)
        link.start("a")
        for properties in (FULL, NONE, MessageProperties(correlation_data=b"")):
            assert link.link.publish(Publication(topic="a", payload=b"x", properties=properties))
            link.until(lambda: bool(link.heard))
            assert link.heard.pop().properties == properties
        link.link.stop()
    with start_broker("amqtt") as broker:
        link = Link(broker.url)
        link.start("a")
        assert link.state.protocol == "3.1.1"
        assert link.link.publish(Publication(topic="a", payload=b"x", properties=FULL))
        link.until(lambda: bool(link.heard))
        assert link.heard.pop().properties == NONE
        link.link.stop()


@pytest.mark.parametrize("topic", ["a/+", "#", "", "x" * 70_000])
def test_a_topic_that_is_none_is_a_refusal_and_costs_no_connection(topic: str) -> None:
    with start_broker("mosquitto") as broker:
        link = Link(broker.url)
        link.start()
        told: list[Delivery] = []
        assert link.link.publish(Publication(topic=topic, payload=b""), told.append)
        link.until(lambda: bool(told))
        assert not told[0].ok and told[0].reason
        assert link.link.publish(Publication(topic="a", payload=b""), told.append)
        link.until(lambda: len(told) == 2)
        assert told[1].ok and link.state.connects == 1
        link.link.stop()


def test_what_is_written_is_sent_at_once() -> None:
    with start_broker("mosquitto") as broker:
        link = Link(broker.url)
        link.start()
        session = link.link._session
        assert session is not None
        sock: Any = session.client.socket()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        link.link.stop()


def test_a_size_has_room_for_what_goes_over_the_wire() -> None:
    """A broker refuses what is longer than it said, with the connection; so sizes are rather too large."""
    message = Publication(topic="t/é", payload=b"x" * 10, properties=FULL)
    given = 10 + len("t/é".encode()) + len("r/é".encode()) + 2 + len("application/json") + 4 + 2 + 2 + 2
    assert given < message.size_bytes < given + 100


def test_who_takes_nothing_gets_no_more_than_may_wait_and_all_of_it_later() -> None:
    with start_broker("mosquitto") as broker:
        slow, other = Link(broker.url), Link(broker.url)
        slow.start("a")
        other.start()
        count = BACKLOG_MESSAGES * 3
        acknowledged: list[Delivery] = []
        for number in range(count):
            assert other.link.publish(Publication(topic="a", payload=b"%d" % number), acknowledged.append)
        other.until(lambda: len(acknowledged) == count)  # the broker has them all
        while slow.waiting.qsize() < BACKLOG_MESSAGES:
            threading.Event().wait(0.01)
        assert slow.waiting.qsize() == BACKLOG_MESSAGES, "the rest is the network's, and the broker's"
        slow.until(lambda: len(slow.heard) == count)
        assert [int(message.payload) for message in slow.heard] == list(range(count))
        slow.link.stop()
        other.link.stop()


def test_a_full_backlog_holds_up_nobody_who_stops() -> None:
    backlog = Backlog(2, 100)
    assert backlog.enter(10_000, lambda: False), "one always has room"
    over = threading.Event()
    assert not backlog.enter(1, lambda: True)
    waits = threading.Thread(target=lambda: backlog.enter(50, over.is_set) and over.set())
    waits.start()
    backlog.leave(10_000)
    waits.join(WAIT_S)
    assert over.is_set()
    assert backlog.enter(50, lambda: False) and not backlog.enter(1, lambda: True), "two are two"
    with start_broker("mosquitto") as broker:
        slow = Link(broker.url)
        slow.start("a")
        for number in range(BACKLOG_MESSAGES * 2):
            slow.link.publish(Publication(topic="a", payload=b"%d" % number))
        slow.link.stop(WAIT_S)
        assert not slow.link._thread.is_alive()


def test_retained_messages_are_not_sent_to_who_does_not_want_them() -> None:
    with start_broker("mosquitto") as broker:
        first = Link(broker.url)
        first.start()
        told: list[Delivery] = []
        first.link.publish(Publication(topic="a", payload=b"old", retain=True), told.append)
        first.until(lambda: bool(told))
        second = Link(broker.url)
        second.start("a")
        first.link.publish(Publication(topic="a", payload=b"new"))
        second.until(lambda: bool(second.heard))
        assert [message.payload for message in second.heard] == [b"new"]
        first.link.stop()
        second.link.stop()


def test_a_message_that_is_too_long_is_kept_away_by_the_broker() -> None:
    with start_broker("mosquitto") as broker:
        bounded, other = Link(broker.url, max_packet_bytes=1000), Link(broker.url)
        bounded.start("a")
        other.start()
        for payload in (b"x" * 2000, b"short"):
            other.link.publish(Publication(topic="a", payload=payload))
        bounded.until(lambda: bool(bounded.heard))
        assert bounded.heard[0].payload == b"short" and bounded.state.connects == 1
        bounded.link.stop()
        other.link.stop()
