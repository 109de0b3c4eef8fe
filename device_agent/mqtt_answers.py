"""Answers on their way to the broker: sent at once, and kept until it has them.

An answer of QoS 1 is kept until the broker acknowledged it, over new connections too, as long as it is worth something.
One of QoS 0 is sent once. What waits is bounded; an answer for which there is no room, or no connection any more, is
lost, and counted.

A broker may hang up over an answer, for its topic say, which was the asker's choice. Whichever was on its way when a
connection ended is suspect: on the next one the suspects go last and one by one, so that the one that it is takes no
other along, and after ``MAX_TRIES`` it is lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aios_edge.mqtt import Delivery
from aios_edge.mqtt_message import Publication

MAX_WAITING = 1024
MAX_TRIES = 3
#: How long an answer is kept for the broker whose request didn't say how long it is worth something.
KEEP_S = 60.0

Publish = Callable[[Publication, Callable[[Delivery], None]], bool]
Instead = Callable[[str], Publication]  # of the reason


@dataclass
class _Waiting:
    answer: Publication
    worthless_at: float
    instead: Instead | None
    tries: int = 0  # connections that it was sent on


class Answers:
    """``publish`` is :meth:`aios_edge.mqtt.MqttLink.publish`. Belongs to the event loop's thread."""

    def __init__(self, publish: Publish, *, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.delivered = 0
        self.lost = 0
        self.lost_reason: str | None = None
        self.on_empty: Callable[[], None] = lambda: None
        self._publish = publish
        self._max_bytes = max_bytes
        self._clock = clock
        self._waiting: dict[int, _Waiting] = {}
        self._suspects: deque[int] = deque()
        self._alone: int | None = None  # the suspect that is on its way
        self._bytes = 0
        self._number = 0
        self._connected = False  # as this thread was told: what is sent before would be sent again then

    def __len__(self) -> int:
        return len(self._waiting)

    def post(self, answer: Publication, *, worthless_at: float, instead: Instead | None = None) -> None:
        """Send it. Where the broker refuses it, ``instead`` makes what goes there then."""
        if len(self._waiting) >= MAX_WAITING or (self._waiting and self._bytes + answer.size_bytes > self._max_bytes):
            self._lose("too many answers wait for the broker")
            return
        self._number += 1
        self._waiting[self._number] = _Waiting(answer, worthless_at, instead)
        self._bytes += answer.size_bytes
        self._send(self._number)

    def link_changed(self, *, connected: bool) -> None:
        """There is another connection, or none any more."""
        self._connected = connected
        self._suspects.clear()
        self._alone = None
        for number, waiting in list(self._waiting.items()):
            if waiting.answer.qos == 0:
                self._take(number)
                self._lose("the connection ended")
            elif waiting.worthless_at <= self._clock():
                self._take(number)
                self._lose("nobody waits for it any more")
            elif waiting.tries >= MAX_TRIES:
                self._take(number)
                self._lose(f"the connection ended each of the {MAX_TRIES} times it was sent")
            elif waiting.tries:
                self._suspects.append(number)
            elif connected:
                self._send(number)
        self._send_suspect()

    def _send_suspect(self) -> None:
        while self._connected and self._alone is None and self._suspects:
            number = self._suspects.popleft()
            if number in self._waiting:  # an early acknowledgement may have taken it
                self._alone = number
                self._send(number)

    def _send(self, number: int) -> None:
        answer = self._waiting[number].answer
        sent = self._connected and self._publish(answer, partial(self._heard_of, number))
        if sent and number in self._waiting:
            self._waiting[number].tries += 1
        if not sent and answer.qos == 0:
            self._take(number)
            self._lose("there is no connection to the broker")

    def _heard_of(self, number: int, delivery: Delivery) -> None:
        waiting = self._take(number)
        if waiting is None:  # given up, or sent twice
            return
        if delivery.ok:
            self.delivered += 1
        else:
            self._lose(delivery.reason or "the broker refused it")
            if waiting.instead is not None:
                self.post(waiting.instead(delivery.reason or "refused"), worthless_at=waiting.worthless_at)
        if number == self._alone:
            self._alone = None
            self._send_suspect()

    def _take(self, number: int) -> _Waiting | None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._bytes -= waiting.answer.size_bytes
            if not self._waiting:
                self.on_empty()
        return waiting

    def _lose(self, reason: str) -> None:
        self.lost += 1
        self.lost_reason = reason
