"""What goes to a broker and comes from it, in values; and how much of it may wait for whoever takes it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

_FRAME_BYTES = 16  # of a PUBLISH: header, length, packet id
_PROPERTY_BYTES = 5  # around each property: its code, and up to two lengths
_LOOK_S = 0.2
#: Of one message that are read.
MAX_PROPERTIES_BYTES = 32_768


class MessageProperties(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Those of MQTT 5 that are used here. Over 3.1.1 they are left out, and none arrive.

    ``expiry_s``: how long the message is still worth something; the broker counts down what it kept it for.
    ``unread_bytes``: how long they were, where that was more than :data:`MAX_PROPERTIES_BYTES`: none of them was read.
    """

    response_topic: str | None = None
    correlation_data: bytes | None = None
    content_type: str | None = None
    expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()
    unread_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """At most, on the wire."""
        texts = (self.response_topic, self.content_type, *(text for pair in self.user for text in pair))
        given = [len(text.encode()) for text in texts if text is not None]
        given += [len(data) for data in (self.correlation_data,) if data is not None]
        return sum(given) + _PROPERTY_BYTES * (len(given) + 2)


NONE = MessageProperties()


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """A message to or from the broker."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    properties: MessageProperties = NONE

    @property
    def size_bytes(self) -> int:
        """At most, on the wire."""
        return len(self.payload) + len(self.topic.encode()) + _FRAME_BYTES + self.properties.size_bytes


class Backlog:
    """Messages that were handed to another thread and not looked at yet: so many, and so many bytes of them.

    While it is full the network's thread waits, so TCP slows the broker down, which has a limit of its own.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages = self._bytes = 0
        self._changed = threading.Condition()

    def enter(self, size_bytes: int, given_up: Callable[[], bool]) -> bool:
        """Wait for room; one message always has it. False when ``given_up`` says so meanwhile."""
        with self._changed:
            while self._messages and not self._has_room(size_bytes):
                if given_up():
                    return False
                self._changed.wait(_LOOK_S)
            self._messages += 1
            self._bytes += size_bytes
            return True

    def leave(self, size_bytes: int) -> None:
        """It is being looked at."""
        with self._changed:
            self._messages -= 1
            self._bytes -= size_bytes
            self._changed.notify()

    def _has_room(self, size_bytes: int) -> bool:
        return self._messages < self._max_messages and self._bytes + size_bytes <= self._max_bytes
