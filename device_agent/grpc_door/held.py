"""How much there is of messages that aren't whole, by connection: an estimate, from what the kernel counts.

What has come since the oldest call began that waits for its message, without what whole messages account for, is of
those that wait, in equal parts: so one connection with many calls must bring so much more. Calls that were taken back
or refused count until that one has its message; where none waits nothing is held.

A stream may wait for hours, and what came meanwhile without being accounted for would add up. So what streams hold
grows only while nothing else is on the connection, and what may be left of other calls is forgiven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from device_agent.grpc_door.wires import Counts
from device_agent.slow_clients import LEAST_BYTES, Part

# What comes with a message: the heads of the call and of a few frames, each entry of its metadata, and of what is long
# the heads of more frames and of TLS's records, as a part of it.
_AROUND_BYTES = 512
_ENTRY_BYTES = 32
_FRAMED = 128


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
    """One that calls came on; without a ``line`` until it is found. ``mixed``: others than streams were there since the
    last look; ``answered``: answers that were sent since; ``touched``: there is something to look at."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.seen = Seen()
        self.mixed = False
        self.answered = 0
        self.touched = True
        self._whole: list[tuple[int, int, bool]] = []  # since the last look: what had come before, its size, stream
        self._streams_hold = 0
        self._forgiven = 0  # what may still come of others than streams

    def whole(self, received_before: int, size_bytes: int, *, stream: bool) -> None:
        """A message is whole that began when so much had been received."""
        self._whole.append((received_before, size_bytes, stream))

    def thrown_away(self, size_bytes: int, *, stream: bool) -> None:
        """So much of what was seen is held no more."""
        if stream:
            self._streams_hold -= size_bytes
        else:
            self.seen = msgspec.structs.replace(self.seen, whole=self.seen.whole + size_bytes)

    def look(self, calls: Sequence[Waiting], most_bytes: int) -> bool:
        """Tell each of the ``calls`` on it, the oldest first, how much it has moved and holds: no more than
        ``most_bytes``. False: the connection has ended."""
        counts = None if self.line is None else self.line.counts()
        if counts is None:
            return False
        before, answered = self.seen, self.answered
        whole = {False: 0, True: 0}
        for received_before, size, stream in self._whole:
            whole[stream] += min(size, counts.received - received_before)
        accounted = whole[False] + whole[True]
        self.seen = Seen(counts.received, before.whole + accounted, counts.acknowledged)
        came, went = counts.received - before.received, counts.acknowledged - before.acknowledged
        self._moved(calls, came, went + answered * LEAST_BYTES)
        bodies = [call for call in calls if call.part == "body"]
        unary, streams = [call for call in bodies if not call.stream], [call for call in bodies if call.stream]
        if unary:
            began = unary[0].began
            _share(unary, self.seen.received - began.received - (self.seen.whole - began.whole), most_bytes)
        self._streams_hold = self._of_streams(came - accounted, whole[True], most_bytes, mixed=bool(unary))
        self._streams_hold = self._streams_hold if streams else 0
        _share(streams, self._streams_hold, most_bytes)
        self._whole, self.answered = [], 0
        self.mixed = self.touched = False
        return True

    def _of_streams(self, grown: int, whole: int, most_bytes: int, *, mixed: bool) -> int:
        if mixed or self.mixed:
            self._forgiven = most_bytes
            return max(0, self._streams_hold - whole)
        forgiven = min(max(grown, 0), self._forgiven)
        self._forgiven -= forgiven
        return max(0, self._streams_hold + grown - forgiven)

    @staticmethod
    def _moved(calls: Sequence[Waiting], came: int, went: int) -> None:
        """A message has moved by its part of what came; an answer by all that the client took of any, as one that it
        leaves for later ends the connection for the others too."""
        alike = Counter(call.stream for call in calls if call.part == "body")
        for call in calls:
            call.moved_bytes += came / alike[call.stream] if call.part == "body" else went


def wire_bytes(message_bytes: int, metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """What a message accounts for, of a call with that metadata. One that came packed accounts for too much."""
    entries = sum(len(name) + len(value) + _ENTRY_BYTES for name, value in metadata)
    return message_bytes + message_bytes // _FRAMED + _AROUND_BYTES + entries


def _share(calls: Sequence[Waiting], held_bytes: int, most_bytes: int) -> None:
    for call in calls:
        call.holds(max(0, min(held_bytes // len(calls), most_bytes)))
