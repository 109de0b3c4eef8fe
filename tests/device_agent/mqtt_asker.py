"""A client that asks over MQTT, as things in the field do: paho, and nothing of ours."""

from __future__ import annotations

import json
import queue
import socket
import threading
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

BASE = "aios/v1/default/dev"
WAIT_S = 20.0


def request(*texts: str, **more: Any) -> dict[str, Any]:
    """A natural request."""
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}], **more}


class Asker:
    """Publishes requests and keeps what comes back, from the topics it listens to."""

    def __init__(self, url: str, *topics: str, version: str = "5") -> None:
        self.heard: queue.SimpleQueue[MQTTMessage] = queue.SimpleQueue()
        self.five = version == "5"
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5 if self.five else MQTTv311)
        subscribed = threading.Semaphore(0)
        self.client.on_message = lambda _c, _u, message: self.heard.put(message)
        self.client.on_subscribe = lambda *_: subscribed.release()
        self.client.on_connect = lambda *_: [self.client.subscribe(topic, 1) for topic in topics]
        self.client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.max_queued_messages_set(0)
        host, _, port = url.removeprefix("mqtt://").partition(":")
        self.client.connect(host, int(port))
        self.client.loop_start()
        for _ in topics:
            assert subscribed.acquire(timeout=WAIT_S)

    def ask(
        self,
        body: Any,
        *,
        model: str = "tiny",
        topic: str | None = None,
        qos: int = 1,
        retain: bool = False,
        **properties: Any,
    ) -> None:
        """Publish; ``properties`` are MQTT 5's, by paho's names."""
        given: Properties | None = None
        if self.five:
            given = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(given, name, value)
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.client.publish(topic or f"{BASE}/infer/{model}", payload, qos, retain, given)

    def next(self) -> MQTTMessage:
        return self.heard.get(timeout=WAIT_S)

    def answer(self) -> Any:
        """The next one, as a document."""
        return json.loads(self.next().payload)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def user(message: MQTTMessage) -> dict[str, str]:
    """User properties."""
    return dict(getattr(message.properties, "UserProperty", ()))
