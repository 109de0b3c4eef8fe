"""HTTP/1.1 under the doors: uvicorn's protocol, with refusals in our words and a bound on the head of a request.

What isn't HTTP never reaches :class:`device_agent.http.HttpApp`; it gets ``{"error"}`` here. The parser itself takes
heads of any length, which would let one client fill a small device's memory.

A connection that is closed while its client still sends is reset, and the reset overtakes the answer. So whoever is
refused before the end of a request is answered, and what still comes is thrown away, for a while, before the close.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from aios_edge.oip.envelope import error_body
from device_agent.descriptors import connection_limit
from device_agent.half_closed import INTERIM, HalfClosed
from device_agent.http import ON_GONE, UNPACKING, HttpApp, Scope
from device_agent.http_direct import DirectCycle, Headers
from device_agent.inbound import UNBOUNDED, Coming
from device_agent.seldom import Seldom
from device_agent.slow_clients import LEAST_BYTES, Part, Progress
from device_agent.upgrade import declined

log = logging.getLogger("device_agent.http")
_seldom = Seldom(log)

#: Of a request line with its headers. What arrives in one piece may be longer by the size of a read.
MAX_HEAD_BYTES = 64 * 1024
#: How much, and how long, a refused client may go on sending until it is cut off.
LINGER_BYTES = 256 * 1024 * 1024
LINGER_S = 20.0
LAST_S = 1.0  # when the agent stops
_GO_ON = b"HTTP/1.1 100 "  # no answer: what a client waits for that announced a body
#: Where in a scope's ``state`` the user id of the process at the other end is: an int on the Unix socket, else None.
PEER_UID = "peer_uid"
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred


class DoorProtocol(HttpToolsProtocol):
    """One connection. ``inbound``: the bodies of all of them."""

    inbound = UNBOUNDED
    _coming: Coming  # of this one's
    _in_head = True
    _head_bytes = 0
    _turned = False  # whether a head or a body ended within the piece of data that is being read
    _answer_head = b""
    _cut_off: asyncio.TimerHandle | None = None  # set while what comes is thrown away
    _left_bytes = LINGER_BYTES
    _owed: tuple[bytes, str] | None = None  # a refusal that waits for the answers to whole requests before it
    _on_gone: set[Callable[[], None]] | None = None  # who wait for an answer that only this client wants
    _peer_uid: int | None = None
    _direct: DirectCycle | None = None  # the request whose body is being read, where it goes the short way
    cycle: RequestResponseCycle | DirectCycle  # type: ignore[assignment]
    _answered_at = 0.0
    _quiet: asyncio.TimerHandle | None = None  # ends a connection that nobody uses
    _half_closed: HalfClosed | None = None  # once the client has ended its direction
    _begun = False  # a head, of which more is to come
    _heads = 0  # whole ones, on this connection
    _received_bytes = 0
    _declined: bytes | None = None  # a head that is to be read again
    _answering: RequestResponseCycle | DirectCycle | None = None  # uvicorn knows the latest of a pipeline only

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._peer_uid = _peer_uid(transport)
        self._coming = Coming(self.inbound, self._too_much)
        if len(self.connections) > connection_limit():
            _seldom.warn("full", "more than %d connections: those on top are refused", connection_limit())
            self._write_refusal(b"503 Service Unavailable", "too many connections. Try again later")
            transport.close()  # no lingering: that would keep the descriptor

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; closes the connection when they can't become a request."""
        if self._cut_off is not None:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                self.transport.close()
            return
        if self._owed is not None:
            return
        self._turned = False
        self._received_bytes += len(data)
        self._feed(data)
        self._coming.settle()
        if self._turned or self.lingers or self._owed is not None or not (self._in_head or self.headers):
            return
        self._head_bytes += len(data)  # or of a trailer, which comes in the place of headers
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            _seldom.warn("head", "a client's request line and headers are longer than %d bytes", MAX_HEAD_BYTES)
            text = f"request line and headers are longer than {MAX_HEAD_BYTES} bytes"
            self._refuse(b"431 Request Header Fields Too Large", text)

    def _feed(self, data: bytes) -> None:
        while True:
            body_at = 0
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:  # behind a head
                body_at = stopped.args[0]
            except httptools.HttpParserError as error:
                why = f" ({error})" if str(error) else ""
                _seldom.warn("junk", "a client's bytes are not HTTP/1.1%s", why)
                self._refuse(b"400 Bad Request", f"this is not HTTP/1.1, or its body doesn't follow its headers{why}")
                return
            if self._declined is None:
                return
            data, self._declined = self._declined + data[body_at:], None
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def on_message_begin(self) -> None:
        """A request begins. What ASGI wants to know of it is gathered when it is clear that ASGI will be asked."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._begun = True

    def on_headers_complete(self) -> None:
        """The head is whole; what follows is its body."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._declined = declined(self.parser, self.url, self.headers)
            return
        self._in_head, self._turned = False, True
        self._head_bytes = 0
        self._begun = False
        self._heads += 1
        if (direct := self._straight()) is not None:
            self._direct = self.cycle = self._answering = direct
            self.headers = []
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        self.scope["state"][PEER_UID] = self._peer_uid
        super().on_headers_complete()
        self.headers = []  # what comes behind the body is no header of this request, whatever its name
        assert isinstance(self.cycle, RequestResponseCycle)
        self.cycle.transport = _AnswerTransport(self)  # its task begins later
        if self._on_gone is None:
            self._on_gone = set()
        cast(Scope, self.cycle.scope)[ON_GONE] = self._on_gone
        cast(Scope, self.cycle.scope)[UNPACKING] = self._coming.unpacking()
        if isinstance(self._answering, DirectCycle) and len(self.pipeline) == 1:
            self.flow.resume_reading()  # uvicorn stopped: nobody would see the client go. The next one stops it

    def _straight(self) -> DirectCycle | None:
        """The request whose head is whole, where it is one for the short way and nothing is owed before it."""
        app, parser = self.app, self.parser
        if not isinstance(app, HttpApp) or app.direct is None or parser.get_method() != b"POST":
            return None
        if parser.get_http_version() != "1.1" or not (self.cycle is None or self.cycle.response_complete):
            return None
        if self.flow.write_paused or self.transport.is_closing():  # the long way waits for a client that doesn't read
            return None
        headers = dict(self.headers)
        asked = DirectCycle.takes(self.url, headers, app.max_body_bytes)
        if asked is None or parser.should_upgrade():
            return None
        keep_alive = parser.should_keep_alive()
        return DirectCycle(self, app.direct, app.record, asked, headers, keep_alive=keep_alive)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._coming.grew(len(body))
        if self._direct is not None:
            self._direct.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole; what follows is the next head."""
        if self._declined is not None:
            return
        self._in_head, self._turned = True, True
        self._head_bytes = 0
        self._coming.over()
        if self._direct is not None:
            direct, self._direct = self._direct, None
            direct.run()
        else:
            super().on_message_complete()

    def common_headers(self) -> Headers:
        """Those of every answer, as uvicorn keeps them: the date."""
        return self.server_state.default_headers

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. True keeps the connection: who has asked may wait for the answer."""
        if self.lingers or self.transport.is_closing() or self.scheme == "https":  # TLS ends both directions at once
            return False
        half_closed = HalfClosed(self.transport.get_extra_info("socket").fileno(), self.transport.abort)
        if half_closed.gone():
            return False
        unanswered = self.cycle is not None and not self.cycle.response_complete
        progress = self.progress()
        if progress is not None and progress.part != "answer" and self._received_bytes:
            self._refuse(b"400 Bad Request", f"the request ended within its {progress.part}")
        if self.lingers or not unanswered:
            return False
        self._half_closed = half_closed
        half_closed.watch()
        spoken = "1.1" if isinstance(self.cycle, DirectCycle) else self.scope.get("http_version")
        if not self.cycle.response_started and spoken == "1.1":
            self.transport.write(INTERIM)
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """A request is answered, and the next one of the pipeline begins."""
        was_last = not self.pipeline
        if self._answer_head:
            self.flush()
        self._go_on()
        if was_last and self._owed is not None:
            self._send_refusal(*self._owed)
        if was_last and self._half_closed is not None:
            self.transport.close()

    def _go_on(self) -> None:
        """With the next request of the pipeline, or with waiting for one. A timer that is set and taken back with each
        request would be a part of what one costs: ours looks again when it finds the connection in use."""
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._answered_at = self.loop.time()
        if self._quiet is None:
            self._quiet = self.loop.call_later(self.timeout_keep_alive, self._end_when_quiet)

    def _end_when_quiet(self) -> None:
        self._quiet = None
        left_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self.transport.is_closing() or self.lingers:
            return
        if left_s > 0 or not self.cycle.response_complete or not self._in_head or self._head_bytes:
            self._quiet = self.loop.call_later(max(left_s, 1.0), self._end_when_quiet)
        else:
            self.transport.close()

    @property
    def lingers(self) -> bool:
        """Whether what comes is thrown away, and nothing is sent any more."""
        return self._cut_off is not None

    def write_soon(self, head: bytes) -> None:
        """The head of an answer: it goes with the first bytes of the body, in one packet and one call."""
        self._answer_head = head

    def write_now(self, data: bytes) -> None:
        """What was held back, and this; nothing when another request on this connection was the last answered."""
        head, self._answer_head = self._answer_head, b""
        if not self.lingers:
            self.transport.write(head + data if head else data)

    def flush(self) -> None:
        """An answer without a body is its head alone."""
        if self._answer_head:
            self.write_now(b"")

    def hang_up(self) -> None:
        """Close: at once when the request is whole, else as soon as the client has stopped sending."""
        self.flush()
        if self._in_head:
            self.transport.close()
        else:
            self._linger()

    def shutdown(self) -> None:
        """The agent stops: nobody is waited for who was answered, nor who hasn't asked yet."""
        if self.lingers:
            self.transport.close()
        elif not self._in_head:  # when it was whole it would be told the same
            self._refuse(b"503 Service Unavailable", "the agent is stopping [draining]")
            self.loop.call_later(LAST_S, self.transport.close)
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        self._coming.over()
        for timer in (self._cut_off, self._quiet):
            if timer is not None:
                timer.cancel()
        if self._half_closed is not None:
            self._half_closed.end()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
        super().connection_lost(exc)
        self._leave()

    def progress(self) -> Progress | None:
        """What this client is to do next, and how far it is; None while it is our turn."""
        if unread_bytes := self.transport.get_write_buffer_size():
            return Progress("answer", self._heads, unread_bytes)
        if self.lingers or self._owed is not None or self.transport.is_closing() or self.flow.read_paused:
            return None
        if not self._in_head:
            return Progress("body", self._heads, self._received_bytes)
        begun = self.cycle is None or self._head_bytes > 0 or self._begun
        return Progress("head", self._heads, self._received_bytes) if begun else None

    def too_slow(self, part: Part, limit_s: float) -> None:
        """This client had its time: it reads why, unless it reads nothing, or asked nothing."""
        if part == "answer":
            _seldom.warn(part, "a client read too little of its answer within %g s and is cut off", limit_s)
            self.transport.abort()
        elif not self._received_bytes:
            self.transport.close()
        else:
            _seldom.warn(part, "a client sent too little of a request's %s within %g s and is refused", part, limit_s)
            least = "was not whole" if part == "head" else f"brought less than {LEAST_BYTES} bytes"
            self._refuse(b"408 Request Timeout", f"the request's {part} {least} within {limit_s:g} s")

    def _too_much(self) -> None:
        _seldom.warn(
            "inbound", "more bytes of request bodies came in at once than in_flight_bytes: the longest is refused"
        )
        text = "too many bytes of request bodies are coming in at once [queue_full]; retry after 1.00 s"
        self._refuse(b"503 Service Unavailable\r\nretry-after: 1", text)

    def _linger(self) -> None:
        """Send nothing more, and throw away what comes until the client ends too, or sends too much or too long."""
        if self.lingers or self.transport.is_closing():
            return
        self._cut_off = self.loop.call_later(LINGER_S, self.transport.close)
        self._coming.over()
        self.pipeline.clear()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever it finds, it can't be sent any more
            self.cycle.message_event.set()
            self._leave()
        try:
            if self.transport.can_write_eof():  # TLS can't end one direction alone; the answer's length is told anyway
                self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.close()
        else:
            self.flow.resume_reading()

    def _leave(self) -> None:
        if isinstance(self._answering, DirectCycle):
            self._answering.leave()
        for leave in tuple(self._on_gone or ()):
            leave()

    def _refuse(self, status: bytes, text: str) -> None:
        """Say that what comes can't be read, behind the answers to the whole requests before it."""
        waits = self._in_head and self.cycle is not None and not self.cycle.response_complete
        if not self._in_head and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()  # the request that can't be read to its end; another one is being answered
            waits = True
        if waits:
            self._owed = status, text
        else:
            self._send_refusal(status, text)

    def _send_refusal(self, status: bytes, text: str) -> None:
        if self.lingers or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self._write_refusal(status, text)
        self._linger()

    def _write_refusal(self, status: bytes, text: str) -> None:
        body = error_body(text)
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)


class _AnswerTransport(asyncio.Transport):
    """What an answer is written to. uvicorn closes it behind the last byte, however much of the request is to come."""

    # It knows nothing of its request, which knows it: a ring would be left to the garbage collector with each answer.

    def __init__(self, door: DoorProtocol) -> None:
        super().__init__()
        self._door = door
        self._begun = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        if self._begun or data.startswith(_GO_ON):
            self._door.write_now(data)
        else:
            self._begun = True
            self._door.write_soon(data)

    def is_closing(self) -> bool:
        return self._door.transport.is_closing()

    def close(self) -> None:
        self._door.hang_up()


def _peer_uid(transport: asyncio.Transport) -> int | None:
    """Whose process connected, as the kernel saw it then."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    uid: int = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    return uid
