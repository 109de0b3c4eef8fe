"""Calls whose client hardly moves, and messages that are still coming in: bounded as at the HTTP door, by its rules
(:mod:`device_agent.slow_clients`, :mod:`device_agent.inbound`).

grpcio hands over a message when it is whole. What there is of the others is told from their connection's bytes
(:mod:`device_agent.grpc_door.wires`): what has come, without what whole messages account for, in equal parts for all
that are awaited there. So one connection with many calls must bring so much more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import grpc

from device_agent.grpc_door.callers import Outcome
from device_agent.grpc_door.refusal import refusal
from device_agent.grpc_door.wires import Counts
from device_agent.inbound import FREE_BYTES, Coming, Inbound
from device_agent.seldom import Seldom
from device_agent.slow_clients import LEAST_BYTES, Part, Progress, SlowClients
from device_agent.values import Reason

LOOK_S = 0.25  # between two looks
_LOOKS = 64  # one of so many is at every connection, to forget those that have ended
_RETRY_S = 1.0

# What comes with a message: the heads of the call and of a few frames, each entry of its metadata, and of what is long
# the heads of more frames and of TLS's records, as a part of it.
_AROUND_BYTES = 512
_ENTRY_BYTES = 32
_FRAMED = 128

_seldom = Seldom(logging.getLogger("device_agent.grpc"))


class Line(Protocol):
    """A connection; :class:`device_agent.grpc_door.wires.Wire` is one."""

    def counts(self) -> Counts | None:
        """Bytes so far; None: it has ended."""
        ...

    def cut(self) -> None:
        """End it."""
        ...


Find = Callable[[Collection[str]], Awaitable[Mapping[str, Line]]]  # the connections of peers that are there


class _Call:
    """A call while it waits for its client. ``stream``: one that may say nothing for hours."""

    def __init__(self, task: asyncio.Task[Any], peer: str, part: Part, *, stream: bool) -> None:
        self.task = task
        self.peer = peer
        self.part: Part = part
        self.stream = stream
        self.refused: Outcome | None = None
        self.watch: _Watch | None = None
        self.coming: Coming | None = None
        self.moved_bytes = 0.0
        self.held_bytes = 0  # of its message

    def progress(self) -> Progress | None:
        """What it waits for, and how far that may be."""
        if self.watch is None or self.refused is not None or (self.stream and self.part == "body"):
            return None
        return Progress(self.part, 0, int(self.moved_bytes))

    def too_slow(self, part: Part, limit_s: float) -> None:
        """Its client had its time."""
        if part == "answer":
            _seldom.warn(part, "a client read too little of its answer within %g s and is cut off", limit_s)
            if self.watch is not None:
                self.watch.line.cut()
            return
        _seldom.warn(part, "a client sent too little of a message within %g s and is refused", limit_s)
        self._refuse(408, refusal(408, f"the message brought less than {LEAST_BYTES} bytes within {limit_s:g} s"))

    def too_much(self) -> None:
        """More is coming in than may."""
        _seldom.warn("inbound", "more bytes of messages came in at once than in_flight_bytes: the longest is refused")
        text = "too many bytes of messages are coming in at once [queue_full]; retry after 1.00 s"
        self._refuse(503, refusal(503, text, reason=Reason.QUEUE_FULL.value, retry_after_s=_RETRY_S))

    def _refuse(self, status: int, refused: Any) -> None:
        self.refused = Outcome(status=status, refusal=refused)
        self.task.cancel()  # it reads


class _Watch:
    """A connection that calls came on. ``whole_bytes``: accounted for since the last look."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._before = Counts(0, 0)
        self._held_bytes = 0  # of messages that aren't whole

    def look(self, calls: list[_Call], whole_bytes: int, inbound: Inbound, most_bytes: int) -> bool:
        """Share out what has come and gone since the last look, to each message no more than ``most_bytes``. False: the
        connection has ended."""
        counts = self.line.counts()
        if counts is None:
            return False
        before, self._before = self._before, counts
        came, went = counts.received - before.received, counts.acknowledged - before.acknowledged
        alike = Counter((call.part, call.stream) for call in calls)
        for call in calls:
            call.watch = self
            call.moved_bytes += (came if call.part == "body" else went) / alike[call.part, call.stream]
        bodies = [call for call in calls if call.part == "body"]
        self._held_bytes = max(0, min(self._held_bytes + came - whole_bytes, most_bytes * len(bodies)))
        for call in bodies:
            call.held_bytes = self._held_bytes // len(bodies)
            call.coming = call.coming or Coming(inbound, call.too_much)
            call.coming.over()
            call.coming.grew(call.held_bytes)
        return True


class SlowCalls:
    """All of them; :meth:`look` every ``LOOK_S``. ``limit_s``: of a client that hardly moves; ``most_bytes``: of one
    message."""

    def __init__(
        self, limit_s: float, most_bytes: int, inbound: Inbound, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slow = SlowClients(limit_s)
        self._inbound = inbound
        self._most_bytes = most_bytes
        self._clock = clock
        self._calls: dict[asyncio.Task[Any], _Call] = {}
        self._watched: dict[str, _Watch] = {}
        self._whole: Counter[str] = Counter()  # bytes since the last look, by peer
        self._looks = 0

    async def read(self, context: Any, *, stream: bool = False) -> bytes | Outcome | None:
        """The next message; None when there is none any more, or the refusal of one that comes too slowly or is too
        much. ``stream``: it may also never come."""
        call = self._begin(context, "body", stream=stream)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            self._whole[call.peer] += FREE_BYTES if call.watch is None else call.held_bytes
            if call.refused is None:
                raise
            return call.refused
        finally:
            self._end(call)
        if data is grpc.aio.EOF:
            return None
        around = _AROUND_BYTES + sum(len(name) + len(value) + _ENTRY_BYTES for name, value in _metadata(context))
        self._whole[call.peer] += len(data) + len(data) // _FRAMED + around
        whole: bytes = data
        return whole

    def unread(self, context: Any) -> None:
        """The call that runs now ends with a refusal, and what has come of its message is thrown away."""
        self._whole[context.peer()] += FREE_BYTES

    def answering(self, context: Any) -> None:
        """The task that runs now is about to end with an answer: until that is sent it waits for its client."""
        call = self._begin(context, "answer", stream=False)
        call.task.add_done_callback(lambda _: self._end(call))

    async def look(self, find: Find) -> None:
        """Refuse whoever had his time, and what is too much."""
        wanted = {*self._whole, *(call.peer for call in self._calls.values())} - self._watched.keys()
        found = await find(wanted) if wanted else {}
        for peer, line in found.items():
            self._watched[peer] = _Watch(line)
        calls: dict[str, list[_Call]] = {}
        for call in self._calls.values():
            calls.setdefault(call.peer, []).append(call)
        self._looks += 1
        for peer in self._watched.keys() & (self._watched if self._looks % _LOOKS == 0 else {*calls, *self._whole}):
            waiting, whole_bytes = calls.get(peer, []), self._whole.pop(peer, 0)
            if not self._watched[peer].look(waiting, whole_bytes, self._inbound, self._most_bytes):
                del self._watched[peer]
        for peer in wanted - found.keys():
            self._whole.pop(peer, None)  # it has ended
        self._inbound.settle()
        self._slow.look(self._calls.values(), self._clock())

    def _begin(self, context: Any, part: Part, *, stream: bool) -> _Call:
        task = asyncio.current_task()
        assert task is not None, "grpcio calls from tasks"
        call = self._calls[task] = _Call(task, context.peer(), part, stream=stream)
        return call

    def _end(self, call: _Call) -> None:
        if self._calls.get(call.task) is call:
            del self._calls[call.task]
        if call.coming is not None:
            call.coming.over()


def _metadata(context: Any) -> Iterable[tuple[str, str | bytes]]:
    return context.invocation_metadata() or ()
