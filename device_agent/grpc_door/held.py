"""How much there is of messages that aren't whole, by connection: an estimate, from what the kernel counts.

What has come since the oldest call began that waits for its message, without what whole messages account for, is of
those that wait, in equal parts: so one connection with many calls must bring so much more. Calls that were taken back
or refused count until that one has its message; where none waits nothing is held.

A stream may wait for hours, and what came meanwhile without being accounted for would add up. So what streams hold
grows only while nothing else is on the connection, and what comes behind that is forgiven until a look finds it quiet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from device_agent.grpc_door.wires import Counts
from device_agent.slow_clients import LEAST_BYTES, Part

# What comes with a message: the heads of the call and of a few frames, and of what is long the heads of more frames and
# of TLS's records, as a part of it.
_AROUND_BYTES = 512
_FRAMED = 128
_QUIET_BYTES = 256  # in a look: pings and the like


class Line(Protocol):
    """A connection; :class:`device_agent.grpc_door.wires.Wire` is one."""

    def counts(self) -> Counts | None:
        """Bytes so far; None: it has ended."""
        ...

    def cut(self) -> None:
        """End it."""
        ...


class Waiting(Protocol):
    """A call that waits for its client; :class:`device_agent.grpc_door.slow_calls.Call` is one."""

    part: Part
    stream: bool
    began: Seen
    moved_bytes: float

    def holds(self, held_bytes: int) -> None:
        """So much of its message is there."""
        ...


class Seen(msgspec.Struct, frozen=True):
    """Of a connection at a look, in bytes since it began: what has come, what whole messages account for, and what the
    client has acknowledged."""

    received: int = 0
    whole: int = 0
    acknowledged: int = 0


class Connection:
    """One that calls came on; without a ``line`` until it is found. ``answered``: answers that were sent since the last
    look; ``touched``: there is something to look at."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.seen = Seen()
        self.answered = 0
        self.touched = True
        self._whole: list[tuple[int, int]] = []  # since the last look: what had come before, its size
        self._whole_of_streams = 0  # since the last look
        self._streams_hold = 0
        self._mixed = False  # something else than streams was there since the last look
        self._forgiving = False  # or before, and has left something behind

    def others(self) -> None:
        """Something else than a stream is there, or was."""
        self.touched = self._mixed = True

    def whole(self, message_bytes: int, received_before: int, *, stream: bool) -> None:
        """A message is whole; when it began to be awaited so much had been received. One of a stream may have come
        before that."""
        self.touched = True
        if stream:
            self._whole_of_streams += _framed(message_bytes)
        else:
            self._whole.append((received_before, message_bytes))

    def taken_back(self, *, stream: bool) -> None:
        """A call has left without its message."""
        self.others()
        if stream:  # which may have been all that is held
            self._streams_hold = 0

    def refused(self, held_bytes: int, *, stream: bool) -> None:
        """What a call held is thrown away."""
        if stream:
            self._streams_hold -= held_bytes
        else:
            self.seen = msgspec.structs.replace(self.seen, whole=self.seen.whole + held_bytes)

    def cut(self) -> None:
        """End it."""
        if self.line is not None:
            self.line.cut()

    def look(self, calls: Sequence[Waiting], most_bytes: int) -> bool:
        """Tell each of the ``calls`` on it, the oldest first, how much it has moved and holds: no more than
        ``most_bytes``. False: the connection has ended, or isn't known."""
        counts = None if self.line is None else self.line.counts()
        if self.line is not None and (counts is None or counts.received < self.seen.received):
            self._begins_anew(calls)
        if counts is None:
            self.line = None
            return False
        before = self.seen
        whole = sum(_accounted(size, counts.received - received_before) for received_before, size in self._whole)
        accounted = min(before.whole + whole + self._whole_of_streams, counts.received)
        self.seen = Seen(counts.received, accounted, counts.acknowledged)
        came, went = counts.received - before.received, counts.acknowledged - before.acknowledged
        self._moved(calls, came, went + self.answered * LEAST_BYTES)
        bodies = [call for call in calls if call.part == "body"]
        unary, streams = [call for call in bodies if not call.stream], [call for call in bodies if call.stream]
        if unary:
            began = unary[0].began
            _share(unary, self.seen.received - began.received - (self.seen.whole - began.whole), most_bytes)
        self._streams_grow(came - whole, mixed=self._mixed or bool(unary))
        self._streams_hold = self._streams_hold if streams else 0
        _share(streams, self._streams_hold, most_bytes)
        self._whole, self._whole_of_streams, self.answered = [], 0, 0
        self._mixed = self.touched = False
        return True

    def _begins_anew(self, calls: Sequence[Waiting]) -> None:
        """It has ended; the ``calls`` are those of the next one from the same address, which counts from zero."""
        self.seen = Seen()
        self._whole, self._whole_of_streams, self._streams_hold = [], 0, 0
        for call in calls:
            call.began = self.seen

    def _streams_grow(self, came: int, *, mixed: bool) -> None:
        if mixed:
            self._forgiving = True
        elif came - self._whole_of_streams < _QUIET_BYTES:
            self._forgiving = False
            came = min(came, self._whole_of_streams)
        came = 0 if self._forgiving else came
        self._streams_hold = max(0, self._streams_hold + came - self._whole_of_streams)

    @staticmethod
    def _moved(calls: Sequence[Waiting], came: int, went: int) -> None:
        """A message has moved by its part of what came; an answer by all that the client took of any, as one that it
        leaves for later ends the connection for the others too."""
        alike = Counter(call.stream for call in calls if call.part == "body")
        for call in calls:
            call.moved_bytes += came / alike[call.stream] if call.part == "body" else went


def _framed(message_bytes: int) -> int:
    return message_bytes + message_bytes // _FRAMED + _AROUND_BYTES


def _accounted(message_bytes: int, came_bytes: int) -> int:
    """Of what came in its time. One that is longer was packed, and nobody knows how much of that is its."""
    return min(_framed(message_bytes), came_bytes) if message_bytes <= came_bytes else 0


def _share(calls: Sequence[Waiting], held_bytes: int, most_bytes: int) -> None:
    for call in calls:
        call.holds(max(0, min(held_bytes // len(calls), most_bytes)))
