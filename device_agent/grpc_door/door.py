"""The door: from a call of gRPC's to a request, and from its outcome to a status. All of grpcio's objects end here.

Every method is taken as a stream, also where one message is all: so who calls, and whether they may, is known before a
byte of the message is read, and nothing holds the message once it is understood.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from aios_edge.errors import AiosEdgeError, RequestError
from device_agent.grpc_door.callers import Callers, Outcome, Visit
from device_agent.grpc_door.calls import Asked, Infer, answered, failed, understood
from device_agent.grpc_door.messages import METHODS, SERVICE, ModelInferResponse, ModelStreamInferResponse
from device_agent.grpc_door.refusal import refusal
from device_agent.grpc_door.slow_calls import SlowCalls
from device_agent.http import Unheard
from device_agent.values import Reason

#: Requests of one stream that are answered at once; the next is read when the first of them is done.
STREAM_AT_ONCE = 64
_OPEN = ("ServerLive", "ServerReady")
_STREAM = "ModelStreamInfer"
_STOPPING = Outcome(status=503, refusal=refusal(503, "the agent is stopping", reason=Reason.DRAINING.value))


class GrpcDoor(grpc.GenericRpcHandler):  # type: ignore[misc]
    """What grpcio asks for each call. ``in_flight``: calls that aren't over."""

    def __init__(self, callers: Callers, slow: SlowCalls) -> None:
        self.in_flight = 0
        self.streams: set[_Stream] = set()
        self.slow = slow
        self._callers = callers

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; nothing of its message was read yet."""
        path, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        service, _, method = path.lstrip("/").partition("/")
        if service != SERVICE:
            method = ""
        visit = self._callers.stranger(path) if method in _OPEN else self._callers.visit(metadata, path)
        if visit is None:
            return self._sending_away(path, sent=self._callers.sent_a_key(metadata))
        if method == _STREAM:  # its messages are the requests
            return grpc.stream_stream_rpc_method_handler(_Stream(self, visit).serve)
        try:
            visit.enter()
            if method not in METHODS:
                known = ", ".join(METHODS)
                raise RequestError(f"there is no method {path[:200]}", status=501, remedy=f"{SERVICE} has {known}")
        except RequestError as error:
            return self._refusing(visit, failed(error, visit, path))

        async def serve(_: Any, context: Any) -> bytes:
            outcome: Outcome | None = None
            self.in_flight += 1
            try:
                asked = self.understood(visit, method, await self.slow.read(context), context.time_remaining())
                outcome = await self.answered(visit, method, asked)
            finally:
                self.in_flight -= 1
                visit.end(outcome)
            self.slow.last_answer(context)
            return await _send(context, outcome)

        return grpc.stream_unary_rpc_method_handler(serve)

    def drain(self) -> None:
        """Streams take no more requests, and end with the last answer: else an idle one would hold up the end. So would
        a message that is still coming."""
        self.slow.drain(_STOPPING)
        for stream in self.streams:
            stream.drain()

    def _refusing(self, visit: Visit, outcome: Outcome) -> Any:
        """A handler that reads nothing."""

        async def refuse(_: Any, context: Any) -> None:
            visit.end(outcome)
            self.slow.unread(context)
            await _send(context, outcome)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _sending_away(self, path: str, *, sent: bool) -> Any:
        """The same for a caller without a known key."""

        async def refuse(_: Any, context: Any) -> None:
            self._callers.sent_away(context.peer(), path, key_sent=sent)
            self.slow.unread(context)
            await _send(context, _unauthenticated(sent=sent))

        return grpc.stream_stream_rpc_method_handler(refuse)

    def understood(
        self, visit: Visit, method: str, data: bytes | Outcome | None, remaining_s: float | None
    ) -> Asked | Outcome:
        """What a message asks for, or why that can't be told."""
        if isinstance(data, Outcome):
            return data
        try:
            return understood(visit, method, data, remaining_s)
        except Exception as error:
            return failed(error, visit, visit.path)

    async def answered(self, visit: Visit, method: str, asked: Asked | Outcome) -> Outcome:
        """What becomes of it."""
        if isinstance(asked, Outcome):
            return asked
        try:
            return await answered(visit, method, asked)
        except Unheard as gone:
            visit.unheard = gone.reply.completion
            raise
        except Exception as error:
            return failed(error, visit, visit.path)


class _Stream:
    """One call of ``ModelStreamInfer``: its requests are answered side by side, and told in the order they came."""

    def __init__(self, door: GrpcDoor, visit: Visit) -> None:
        self._door = door
        self._visit = visit
        self._slots = asyncio.Semaphore(STREAM_AT_ONCE)
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._draining = False
        self._refused: Outcome | None = None

    async def serve(self, _: Any, context: Any) -> None:
        """Until the client has no more requests, or goes away."""
        self._door.in_flight += 1
        self._door.streams.add(self)
        self._reader = self._start(self._read(context))
        if self._door.slow.draining is not None:
            self.drain()
        try:
            while (answer := await self._answers.get()) is not None:
                message = await answer
                with self._door.slow.answering(context):
                    await context.write(message)
                self._slots.release()
            if self._refused is not None:
                await _send(context, self._refused)
            if self._draining:
                await _send(context, _STOPPING)
        finally:
            self._door.in_flight -= 1
            self._door.streams.discard(self)
            for task in self._tasks:
                task.cancel()

    def drain(self) -> None:
        """Read no more."""
        self._draining = True
        if self._reader is not None:
            self._reader.cancel()

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read(self, context: Any) -> None:
        try:
            while True:
                await self._slots.acquire()
                data = await self._door.slow.read(context, stream=True)
                if data is None:
                    return
                visit = self._visit.again()
                if isinstance(data, Outcome):
                    self._refused = data
                    visit.end(data)
                    return
                work = self._answer(visit, self._asked(visit, data, context.time_remaining()))
                self._answers.put_nowait(self._start(work))
                del data  # while the next one is awaited
        finally:
            self._answers.put_nowait(None)

    def _asked(self, visit: Visit, data: bytes, remaining_s: float | None) -> Asked | Outcome:
        try:
            visit.enter()
        except AiosEdgeError as error:
            return failed(error, visit, visit.path)
        return self._door.understood(visit, _STREAM, data, remaining_s)

    async def _answer(self, visit: Visit, asked: Asked | Outcome) -> bytes:
        outcome: Outcome | None = None
        request_id = asked.id if isinstance(asked, Infer) else ""
        try:
            outcome = await self._door.answered(visit, _STREAM, asked)
        finally:
            visit.end(outcome)
        answer = ModelStreamInferResponse()
        if outcome.refusal is not None:
            answer.error_message = outcome.refusal.text
            answer.infer_response.CopyFrom(ModelInferResponse(id=request_id))
        else:
            answer.infer_response.ParseFromString(outcome.message)
        message: bytes = answer.SerializeToString()
        return message


async def _send(context: Any, outcome: Outcome) -> bytes:
    if outcome.refusal is not None:
        refused = outcome.refusal
        await context.abort(grpc.StatusCode[refused.code], refused.text, refused.metadata)
    return outcome.message


def _unauthenticated(*, sent: bool) -> Outcome:
    text = "this key is nobody's here" if sent else "a key is needed"
    return Outcome(status=401, refusal=refusal(401, f"{text}. Send the metadata authorization: Bearer KEY"))
