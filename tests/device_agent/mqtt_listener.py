"""Everything an agent tells over MQTT, heard by a client in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from aios_edge.broker import Broker


class Listener:
    """``with Listener(broker):``"""

    def __init__(self, broker: Broker) -> None:
        from paho.mqtt import client as mqtt

        self._messages: list[tuple[str, bytes]] = []
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_message = lambda _c, _u, message: self._messages.append((message.topic, message.payload))
        subscribed = threading.Event()
        self._client.on_connect = lambda *_: self._client.subscribe("aios/v1/default/dev/#", 1)
        self._client.on_subscribe = lambda *_: subscribed.set()
        host, port = broker.url.removeprefix("mqtt://").split(":")
        self._client.connect(host, int(port))
        self._client.loop_start()
        assert subscribed.wait(10)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.loop_stop()
        self._client.disconnect()

    def of(self, kind: str) -> list[tuple[bytes, Any]]:
        return [(text, json.loads(text)) for topic, text in self._messages if topic.endswith("/" + kind)]

    def has_windows(self, count: int, boot: str) -> bool:
        return sum(message["boot_id"] == boot for _, message in self.of("telemetry")) >= count

    def last_status(self) -> Any:
        return self.of("status")[-1][1]

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end, "never told"
            time.sleep(0.01)

    def no_window_is_missing_or_told_twice(self, boots: int) -> None:
        """A window that was acknowledged as its agent died may come again: the same bytes."""
        windows: dict[tuple[str, int], bytes] = {}
        for text, message in self.of("telemetry"):
            key = message["boot_id"], message["seq"]
            assert windows.setdefault(key, text) == text, "two windows with one number"
        found: dict[str, list[int]] = {}
        for boot, seq in windows:
            found.setdefault(boot, []).append(seq)
        assert len(found) == boots
        for numbers in found.values():
            assert sorted(numbers) == list(range(1, len(numbers) + 1)), "a gap"
        again = len(self.of("telemetry")) - len(windows)
        assert again <= 20 * boots
