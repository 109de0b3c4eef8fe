"""An inference from the parser to the desk and back to the socket, without ASGI between: no scope, no task, no turn of
the event loop beyond the two in which its bytes came and its answer is there.

It takes the place of uvicorn's cycle on the connection for requests of the common kind (:meth:`DirectCycle.takes`);
all others go the long way, and are answered the same.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from aios_edge.errors import AiosEdgeError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, error_body, parse_json_length
from device_agent.http import DirectDesk, Inference, Reply, inference, internal_error, more_headers
from device_agent.values import Completion

log = logging.getLogger("device_agent.http")

_JSON_LENGTH = JSON_LENGTH_HEADER.lower().encode()
#: What only the long way knows what to do with.
_UNCOMMON = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))

_CLOSE = (b"connection", b"close")

Headers = list[tuple[bytes, bytes]]


class Connection(Protocol):
    """The door that the request came through."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def common_headers(self) -> Headers: ...

    def hang_up(self) -> None: ...

    def on_response_complete(self) -> None: ...


class _Nobody:
    """uvicorn wakes whoever reads the body when a connection ends; here nobody does."""

    def set(self) -> None:
        pass


class DirectCycle:
    """One request; what uvicorn's protocol looks at in its cycle is here under the same names."""

    message_event = _Nobody()

    def __init__(
        self,
        door: Connection,
        desk: DirectDesk,
        record: Callable[[Completion], None],
        asked: Inference,
        headers: Mapping[bytes, bytes],
        *,
        keep_alive: bool,
    ) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        self._door = door
        self._desk = desk
        self._record = record
        self._asked = asked
        self._headers = headers
        self._pieces: list[bytes] = []
        self._leave: Callable[[], None] | None = None
        self._submitting = False

    @staticmethod
    def takes(url: bytes, headers: Mapping[bytes, bytes], max_body_bytes: int) -> Inference | None:
        """What a POST asks for that can go this way: its length is told beforehand and within the limit, and its body
        is sent as it is."""
        length = headers.get(b"content-length")
        if length is None or not length.isdigit() or int(length) > max_body_bytes or not _UNCOMMON.isdisjoint(headers):
            return None
        return _inference(url) if len(url) <= _COMMON_URL_BYTES else inference(url)

    @property
    def response_started(self) -> bool:
        """Head and body are sent at once."""
        return self.response_complete

    def feed(self, piece: bytes) -> None:
        """A piece of the body."""
        self._pieces.append(piece)

    def run(self) -> None:
        """The body is whole."""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()  # the connection keeps this until there is another request
        self._submitting = True
        try:
            header = self._headers.get(_JSON_LENGTH)
            json_length = None if header is None else parse_json_length(header)
            model, version = self._asked
            self._leave = self._desk.submit(model, version, body, json_length, self._reply)
        except AiosEdgeError as error:
            self._reply(Reply(status=error.http_status, body=error_body(str(error))))
        except Exception:
            log.exception("an inference of %s failed", self._asked.model)
            self._reply(internal_error())
        finally:
            self._submitting = False

    def leave(self) -> None:
        """The client has gone."""
        self.disconnected = True
        self._pieces.clear()
        if self._leave is not None and not self.response_complete:
            self._leave()

    def _reply(self, reply: Reply) -> None:
        if self._submitting:  # the parser has more to say first, perhaps another request
            self._door.loop.call_soon(self._send, reply)
        else:
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        self._leave = None  # which has the request with its body
        try:
            if not self.disconnected:
                self._write(reply)
        finally:
            if reply.completion is not None:
                self._record(reply.completion)

    def _write(self, reply: Reply) -> None:
        headers = more_headers(reply, whole=True)
        if _CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append(_CLOSE)
        head = _head(reply.status, reply.content_type, *self._door.common_headers())
        more = b"".join([b"\r\n%b: %b" % header for header in headers]) if headers else b""
        self._door.transport.write(b"%b%d%b\r\n\r\n%b" % (head, len(reply.body), more, reply.body))
        self.response_complete = True
        if not self.keep_alive:
            self._door.hang_up()
        self._door.on_response_complete()


@functools.lru_cache(maxsize=16)  # the common ones change once a second
def _head(status: int, content_type: str, *common: tuple[bytes, bytes]) -> bytes:
    """Up to the length of the body."""
    headers = (*common, (b"content-type", content_type.encode()))
    return STATUS_LINE[status] + b"".join([b"%b: %b\r\n" % header for header in headers]) + b"content-length: "


_COMMON_URL_BYTES = 256
_inference = functools.lru_cache(maxsize=128)(inference)  # nearly all requests are for the same few models
