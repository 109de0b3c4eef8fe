"""The doors: an ASGI application, Open Inference Protocol v2 over REST, ``/metrics`` and ``/status``.

No framework: a few paths, split by hand. A body is read in pieces and refused (413) before it outgrows the limit;
of an inference only the envelope is parsed here, the tensors stay bytes until the worker. Whatever a client sends,
the answer is a document with ``error`` and the agent lives on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import msgspec

from aios_edge.errors import AiosEdgeError, RequestError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, LIVE, error_body, parse_json_length
from aios_edge.oip.repository import Action
from device_agent.compression import Inflater
from device_agent.values import Completion

log = logging.getLogger("device_agent.http")

JSON = "application/json"
_JSON_LENGTH = JSON_LENGTH_HEADER.lower().encode()
#: Key of the ASGI scope: the set of those that the door calls when this client goes away.
ON_GONE = "aios_edge.on_gone"
#: Key of the ASGI scope: the :meth:`device_agent.inbound.Coming.unpacking` of this request's body.
UNPACKING = "aios_edge.unpacking"
#: True once the body of a request was read to its end.
_WHOLE = "aios_edge.whole"

_COMMON_PATH_BYTES = 256

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole HTTP response. ``completion`` is recorded once it was sent. ``retry_after_s``: what the header of that
    name says in whole seconds."""

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    completion: Completion | None = None
    retry_after_s: float | None = None


class Inference(NamedTuple):
    """Which model a request is for; ``version`` None: whichever is here."""

    model: str
    version: str | None


class Desk(Protocol):
    """What stands behind the doors; :class:`device_agent.desk.FrontDesk` does."""

    def server_metadata(self) -> bytes: ...

    def ready(self) -> bool: ...

    def model_metadata(self, model: str, version: str | None) -> bytes: ...

    def model_ready(self, model: str, version: str | None) -> bool: ...

    def repository_index(self) -> bytes: ...

    async def repository_change(self, model: str, action: Action, body: bytes) -> Reply: ...

    async def infer(self, model: str, version: str | None, body: bytes, json_length: int | None) -> Reply: ...

    def metrics(self) -> bytes: ...

    def status(self) -> bytes: ...


class DirectDesk(Protocol):
    """A desk that takes inferences without a task for each; :class:`device_agent.desk.FrontDesk` does."""

    def submit(
        self,
        model: str,
        version: str | None,
        body: bytes,
        json_length: int | None,
        on_reply: Callable[[Reply], None],
    ) -> Callable[[], None]: ...


class HttpApp:
    """The ASGI callable. ``direct``: where a door that can may bring inferences, past ASGI."""

    def __init__(
        self,
        desk: Desk,
        *,
        max_body_bytes: int,
        record: Callable[[Completion], None],
        direct: DirectDesk | None = None,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.record = record
        self.direct = direct
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        completion: Completion | None = None
        try:
            reply = await self._answer(scope, receive)
        except _Gone as gone:
            if gone.completion is not None:
                self.record(gone.completion)
            return
        except AiosEdgeError as error:
            reply = Reply(status=error.http_status, body=error_body(str(error)))
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            reply = internal_error()
        completion = reply.completion
        try:
            await respond(scope, send, reply)
        finally:
            if completion is not None:
                self.record(completion)

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        method = scope["method"]
        read = method in ("GET", "HEAD")
        match path_parts(scope):
            case ["v2"]:
                return _only(read, "GET") or Reply(body=self._desk.server_metadata())
            case ["v2", "health", "live"]:
                return _only(read, "GET") or Reply(body=LIVE)
            case ["v2", "health", "ready"]:
                return _only(read, "GET") or _ready(self._desk.ready(), b"ready")
            case ["v2", "models", model, *rest]:
                return await self._model(scope, receive, model, rest, read)
            case ["v2", "repository", "index"]:
                return _only(method == "POST", "POST") or Reply(body=self._desk.repository_index())
            case ["v2", "repository", "models", model, "load" | "unload" as action]:
                if refused := _only(method == "POST", "POST"):
                    return refused
                body = await self._body(dict(scope["headers"]), receive)
                # Not cancelled when the client goes away: what was asked is done.
                return await self._desk.repository_change(model, action, body)
            case ["metrics"]:
                return _only(read, "GET") or Reply(
                    body=self._desk.metrics(), content_type="text/plain; version=0.0.4; charset=utf-8"
                )
            case ["status"]:
                return _only(read, "GET") or Reply(body=self._desk.status())
        return Reply(status=404, body=error_body(f"there is nothing at {scope['path']}"))

    async def _model(self, scope: Scope, receive: Receive, model: str, rest: list[str], read: bool) -> Reply:
        version: str | None = None
        if len(rest) >= 2 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
        if not rest:
            return _only(read, "GET") or Reply(body=self._desk.model_metadata(model, version))
        if rest == ["ready"]:
            return _only(read, "GET") or _ready(self._desk.model_ready(model, version), b"ready", model)
        if rest != ["infer"]:
            return Reply(status=404, body=error_body(f"there is nothing at {scope['path']}"))
        refused = _only(scope["method"] == "POST", "POST")
        if refused:
            return refused
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b"gzip"):
            raise RequestError(
                f"bodies with Content-Encoding {encoding[:40].decode('latin-1')} are not accepted",
                status=415,
                remedy="Send the body as it is, or as gzip",
            )
        inflater = Inflater(self.max_body_bytes) if encoding == b"gzip" else None
        body = await self._body(headers, receive, inflater, scope.get(UNPACKING))
        scope[_WHOLE] = True
        json_length = parse_json_length(headers.get(_JSON_LENGTH))
        return await _unless_gone(self._desk.infer(model, version, body, json_length), scope, receive)

    async def _body(
        self,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        inflater: Inflater | None = None,
        unpacked: Callable[[int], None] | None = None,
    ) -> bytes:
        coding = headers.get(b"transfer-encoding", b"chunked").strip().lower()
        if coding != b"chunked":
            raise RequestError(
                f"bodies with Transfer-Encoding {coding[:40].decode('latin-1')} are not accepted",
                status=501,
                remedy="Send the body as it is, with its length or chunked",
            )
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            raise self._too_long()
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            piece = message.get("body", b"")
            size += len(piece)
            if size > self.max_body_bytes:
                raise self._too_long()
            if inflater is not None:
                before = inflater.size_bytes
                inflater.feed(piece)
                if not message.get("more_body"):
                    return inflater.finish()
                if unpacked is not None:
                    unpacked(inflater.size_bytes - before)
                continue
            pieces.append(piece)
            if not message.get("more_body"):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_long(self) -> RequestError:
        return RequestError(
            f"the body is longer than {self.max_body_bytes} bytes",
            status=413,
            remedy="Send smaller batches, or raise http.max_body_bytes",
        )


def path_parts(scope: Scope) -> list[str]:
    """The path of a request, split. The raw one, so that a model's name may hold an encoded slash."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return _parts(raw) if len(raw) <= _COMMON_PATH_BYTES else _split(raw)


def inference(url: bytes) -> Inference | None:
    """What the path of an inference names; None for any other path."""
    match _split(url) if url.startswith(b"/") else []:
        case ["v2", "models", model, "infer"]:
            return Inference(model, None)
        case ["v2", "models", model, "versions", version, "infer"]:
            return Inference(model, version)
    return None


def reply_headers(reply: Reply, *, whole: bool) -> list[tuple[bytes, bytes]]:
    """The headers of a response. ``whole``: the request's body was read to its end."""
    return [
        (b"content-type", reply.content_type.encode()),
        (b"content-length", b"%d" % len(reply.body)),
        *more_headers(reply, whole=whole),
    ]


def more_headers(reply: Reply, *, whole: bool) -> list[tuple[bytes, bytes]]:
    """Those of them that most replies don't have."""
    headers = [*reply.headers]
    if reply.status == 413 and not whole:
        headers.append((b"connection", b"close"))  # the rest of the body is only thrown away
    if reply.status == 415:
        headers.append((b"accept-encoding", b"gzip"))
    return headers


def internal_error() -> Reply:
    """What a client is told of a fault of ours."""
    return Reply(status=500, body=error_body("an internal error; the agent's log has it"))


async def respond(scope: Scope, send: Send, reply: Reply) -> None:
    """Send a whole response."""
    headers = reply_headers(reply, whole=scope.get(_WHOLE, False))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})


class Unheard(asyncio.CancelledError):
    """Whoever asked has gone when the answer was there, and before it was told: the inference was made all the same."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


class _Gone(Exception):
    """The client went away: nobody to answer. ``completion``: of an answer that was there."""

    def __init__(self, completion: Completion | None = None) -> None:
        super().__init__()
        self.completion = completion


async def _unless_gone(answer: Awaitable[Reply], scope: Scope, receive: Receive) -> Reply:
    """Await the answer, but cancel it when the client disconnects.

    ASGI would have a second task wait for ``http.disconnect``, which is a quarter of what a request costs here; so our
    door is told whom to call instead.
    """
    task = asyncio.current_task()
    gone = False

    def leave(watch: asyncio.Future[MutableMapping[str, Any]] | None = None) -> None:
        nonlocal gone
        gone = task is not None and task.cancel()

    door: set[Callable[[], None]] | None = scope.get(ON_GONE)
    watch: asyncio.Future[MutableMapping[str, Any]] | None = None
    if door is not None:
        door.add(leave)
    else:  # a server that isn't ours; after the body, the only message left is http.disconnect
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(leave)
    try:
        return await answer
    except asyncio.CancelledError as left:
        if gone:
            raise _Gone(left.reply.completion if isinstance(left, Unheard) else None) from None
        raise
    finally:
        if door is not None:
            door.discard(leave)
        elif watch is not None:
            watch.remove_done_callback(leave)
            watch.cancel()


def _split(raw: bytes) -> list[str]:
    return [unquote(part) for part in raw.split(b"?")[0].decode("latin-1").strip("/").split("/")]


_parts = functools.lru_cache(maxsize=128)(_split)  # nearly all requests are for the same few paths


def _only(allowed: bool, methods: str) -> Reply | None:
    if allowed:
        return None
    body = error_body(f"method not allowed; this path takes {methods}")
    return Reply(status=405, body=body, headers=((b"allow", methods.encode()),))


def _ready(ready: bool, key: bytes, model: str | None = None) -> Reply:
    name = b"" if model is None else b'"name":' + msgspec.json.encode(model) + b","
    return Reply(
        status=200 if ready else 503, body=b"{" + name + b'"' + key + b'":' + (b"true" if ready else b"false") + b"}"
    )


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """The Retry-After header: whole seconds, at least one."""
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()
