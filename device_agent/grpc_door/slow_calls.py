"""Calls whose client hardly moves, and messages that are still coming in: bounded as at the HTTP door, by its rules
(:mod:`device_agent.slow_clients`, :mod:`device_agent.inbound`).

grpcio hands over a message when it is whole; what there is of the others is told from their connection's bytes
(:mod:`device_agent.grpc_door.held`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

import grpc

from device_agent.grpc_door.callers import Outcome
from device_agent.grpc_door.held import Connection, Line
from device_agent.grpc_door.refusal import refusal
from device_agent.inbound import Coming, Inbound
from device_agent.seldom import Seldom
from device_agent.slow_clients import LEAST_BYTES, Part, Progress, SlowClients
from device_agent.values import Reason

LOOK_S = 0.25  # between two looks
_LOOKS = 64  # one of so many is at every connection, to forget those that have ended
_RETRY_S = 1.0

_seldom = Seldom(logging.getLogger("device_agent.grpc"))

Find = Callable[[Collection[str]], Awaitable[Mapping[str, Line]]]  # the connections of peers that are there


class Call:
    """One that waits for its client: for a message (``body``), or until an answer is read. ``stream``: it may say
    nothing for hours."""

    def __init__(
        self, task: asyncio.Task[Any], connection: Connection, inbound: Inbound, part: Part, *, stream: bool
    ) -> None:
        self.connection = connection
        self.part: Part = part
        self.stream = stream
        self.began = connection.seen  # what of its connection was seen then
        self.refused: Outcome | None = None
        self.moved_bytes = 0.0
        self.held_bytes = 0  # of its message
        self._task = task
        self._coming = Coming(inbound, self._too_much)

    def holds(self, held_bytes: int) -> None:
        """So much of its message is there."""
        if held_bytes != self.held_bytes:
            self.held_bytes = held_bytes
            self._coming.over()
            self._coming.grew(held_bytes)

    def over(self) -> None:
        """It waits no more."""
        self._coming.over()

    def progress(self) -> Progress | None:
        """What it waits for, and how far that may be."""
        silent = self.stream and self.part == "body"
        if silent or self.refused is not None or self.connection.line is None:
            return None
        return Progress(self.part, 0, int(self.moved_bytes))

    def too_slow(self, part: Part, limit_s: float) -> None:
        """Its client had its time."""
        if part == "answer":
            _seldom.warn(part, "a client read too little of its answers within %g s and is cut off", limit_s)
            self.connection.cut()
            return
        _seldom.warn(part, "a client sent too little of a message within %g s and is refused", limit_s)
        text = f"the message brought less than {LEAST_BYTES} bytes within {limit_s:g} s"
        self.refuse(Outcome(status=408, refusal=refusal(408, text)))

    def _too_much(self) -> None:
        _seldom.warn("inbound", "more bytes of messages came in at once than in_flight_bytes: the longest is refused")
        text = "too many bytes of messages are coming in at once [queue_full]; retry after 1.00 s"
        self.connection.refused(self.held_bytes, stream=self.stream)
        refused = refusal(503, text, reason=Reason.QUEUE_FULL.value, retry_after_s=_RETRY_S)
        self.refuse(Outcome(status=503, refusal=refused))

    def refuse(self, outcome: Outcome) -> None:
        """Its message is read no further."""
        self.refused = outcome
        self._task.cancel()


class SlowCalls:
    """All of them; :meth:`look` every ``LOOK_S``. ``limit_s``: of a client that hardly moves; ``most_bytes``: of one
    message."""

    def __init__(
        self, limit_s: float, most_bytes: int, inbound: Inbound, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slow = SlowClients(limit_s)
        self._most_bytes = most_bytes
        self._inbound = inbound
        self._clock = clock
        self._calls: dict[asyncio.Task[Any], Call] = {}  # in the order in which they began to wait
        self._connections: dict[str, Connection] = {}  # by peer
        self._looks = 0
        self.draining: Outcome | None = None  # what messages that aren't whole are told

    async def read(self, context: Any, *, stream: bool = False) -> bytes | Outcome | None:
        """The next message; None when there is none any more, or the refusal of one that comes too slowly or is too
        much. ``stream``: it may also never come."""
        with self._waiting(context, "body", stream=stream) as call:
            if self.draining is not None and not stream:
                return self.draining
            try:
                data = await context.read()
            except asyncio.CancelledError:
                if call.refused is None:
                    call.connection.taken_back(stream=stream)
                    raise
                return call.refused
        if data is grpc.aio.EOF:  # also of one that is too long
            call.connection.taken_back(stream=stream)
            return None
        message: bytes = data
        call.connection.whole(len(message), call.began.received, stream=stream)
        return message

    @contextlib.contextmanager
    def answering(self, context: Any) -> Iterator[None]:
        """While an answer is on its way, of a call that goes on."""
        with self._waiting(context, "answer", stream=True) as call:
            yield
        call.connection.answered += 1

    def last_answer(self, context: Any) -> None:
        """The task that runs now is about to end with an answer: until that is sent it waits for its client."""
        task, call = self._begin(context, "answer", stream=False)

        def sent(_: Any) -> None:
            call.connection.answered += 1
            self._end(task, call)

        task.add_done_callback(sent)

    def unread(self, context: Any) -> None:
        """The call that runs now ends with a refusal, and what comes of its message is thrown away."""
        self._connection(context.peer()).others()

    def drain(self, outcome: Outcome) -> None:
        """Refuse messages that aren't whole. Streams end otherwise."""
        self.draining = outcome
        for call in tuple(self._calls.values()):
            if call.part == "body" and not call.stream:
                call.refuse(outcome)

    async def look(self, find: Find) -> None:
        """Refuse whoever had his time, and what is too much."""
        unknown = {peer for peer, connection in self._connections.items() if connection.line is None}
        found = await find(unknown) if unknown else {}
        waiting: dict[Connection, list[Call]] = {}
        for call in self._calls.values():
            waiting.setdefault(call.connection, []).append(call)
        self._looks += 1
        everywhere = self._looks % _LOOKS == 0
        for peer, connection in tuple(self._connections.items()):
            if connection.line is None:
                if peer not in unknown:  # it came during the search
                    continue
                connection.line = found.get(peer)
            calls = waiting.get(connection, ())
            if not (calls or connection.touched or everywhere):
                continue
            if not connection.look(calls, self._most_bytes) and not calls:
                del self._connections[peer]
        self._inbound.settle()
        self._slow.look(self._calls.values(), self._clock())

    def _connection(self, peer: str) -> Connection:
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = Connection()
        connection.touched = True
        return connection

    def _begin(self, context: Any, part: Part, *, stream: bool) -> tuple[asyncio.Task[Any], Call]:
        task = asyncio.current_task()
        assert task is not None, "grpcio calls from tasks"
        connection = self._connection(context.peer())
        call = self._calls[task] = Call(task, connection, self._inbound, part, stream=stream)
        return task, call

    def _end(self, task: asyncio.Task[Any], call: Call) -> None:
        if self._calls.get(task) is call:
            del self._calls[task]
        call.over()
        if call.part == "body" and not call.stream:
            call.connection.others()

    @contextlib.contextmanager
    def _waiting(self, context: Any, part: Part, *, stream: bool) -> Iterator[Call]:
        task, call = self._begin(context, part, stream=stream)
        try:
            yield call
        finally:
            self._end(task, call)
