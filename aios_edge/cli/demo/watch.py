"""What the demo hears over MQTT while it runs."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any

from aios_edge.mqtt import MqttListener


@dataclass(frozen=True)
class Heard:
    """One message: topic, content, and when it came (``time.monotonic``)."""

    topic: str
    body: dict[str, Any]
    at: float


class Watcher:
    """Collects every message under a filter, in a thread of its own."""

    def __init__(self, url: str, topic_filter: str) -> None:
        self._listener = MqttListener(url, topic_filter)
        self._heard: list[Heard] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, daemon=True, name="mqtt-watcher")
        self._thread.start()

    def _collect(self) -> None:
        for message in self._listener:
            try:
                body = json.loads(message.payload)
            except ValueError:
                continue  # not ours: the broker may carry others' messages
            with self._changed:
                self._heard.append(Heard(message.topic, body, time.monotonic()))
                self._changed.notify_all()

    @property
    def count(self) -> int:
        """Messages heard so far."""
        return len(self._heard)

    def latest(self, suffix: str) -> Heard | None:
        """The newest message whose topic ends so."""
        with self._changed:
            return next((heard for heard in reversed(self._heard) if heard.topic.endswith(suffix)), None)

    def wait_for(self, suffix: str, after: float, timeout_s: float, **fields: object) -> Heard | None:
        """The first message after that moment whose topic ends so and whose fields have these values, or None."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for heard in self._heard:
                    if (
                        heard.at >= after
                        and heard.topic.endswith(suffix)
                        and all(heard.body.get(key) == value for key, value in fields.items())
                    ):
                        return heard
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)

    def close(self) -> None:
        """Disconnect."""
        self._listener.close()
        self._thread.join(5)
