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

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aios_edge.oip.envelope import error_body

log = logging.getLogger("device_agent.http")

#: Of a request line with its headers. What arrives in one piece may be longer by the size of a read.
MAX_HEAD_BYTES = 64 * 1024
#: How much, and how long, a refused client may go on sending until it is cut off.
LINGER_BYTES = 256 * 1024 * 1024
LINGER_S = 20.0
#: Where in a scope's ``state`` the user id of the process at the other end is: an int on the Unix socket, else None.
PEER_UID = "peer_uid"
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred


class DoorProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head = True
    _head_bytes = 0
    _turned = False  # whether a head or a body ended within the piece of data that is being read
    _cut_off: asyncio.TimerHandle | None = None  # set while what comes is thrown away
    _left_bytes = LINGER_BYTES
    _owed: tuple[bytes, str] | None = None  # a refusal that waits for the answers to whole requests before it
    _peer_uid: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._peer_uid = _peer_uid(transport)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; closes the connection when they can't become a request."""
        if self.lingers:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                self.transport.close()
            return
        if self._owed is not None:
            return
        self._turned = False
        super().data_received(data)
        if self._turned or not self._in_head or self.lingers or self._owed is not None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            log.warning("a client's request line and headers are longer than %d bytes", MAX_HEAD_BYTES)
            text = f"request line and headers are longer than {MAX_HEAD_BYTES} bytes"
            self._refuse(b"431 Request Header Fields Too Large", text)

    def on_headers_complete(self) -> None:
        """The head is whole; what follows is its body."""
        self._in_head, self._turned = False, True
        self._head_bytes = 0
        self.scope["state"][PEER_UID] = self._peer_uid
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self)  # its task begins later

    def on_message_complete(self) -> None:
        """The body is whole; what follows is the next head."""
        self._in_head, self._turned = True, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser couldn't read."""
        self._refuse(b"400 Bad Request", "this is not HTTP/1.1, or its body doesn't follow its headers")

    def on_response_complete(self) -> None:
        """A request is answered, and the next one of the pipeline begins."""
        was_last = not self.pipeline
        super().on_response_complete()
        if was_last and self._owed is not None:
            self._send_refusal(*self._owed)
        if self.lingers:
            self._unset_keepalive_if_required()  # what ends it is the cut-off, however long a connection is kept

    @property
    def lingers(self) -> bool:
        """Whether what comes is thrown away, and nothing is sent any more."""
        return self._cut_off is not None

    def hang_up(self) -> None:
        """Close: at once when the request is whole, else as soon as the client has stopped sending."""
        if self._in_head:
            self.transport.close()
        else:
            self._linger()

    def shutdown(self) -> None:
        """The agent stops: nobody is waited for who was answered."""
        if self.lingers:
            self.transport.close()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        if self._cut_off is not None:
            self._cut_off.cancel()
        super().connection_lost(exc)

    def _linger(self) -> None:
        """Send nothing more, and throw away what comes until the client ends too, or sends too much or too long."""
        if self.lingers or self.transport.is_closing():
            return
        self._cut_off = self.loop.call_later(LINGER_S, self.transport.close)
        self.pipeline.clear()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever it finds, it can't be sent any more
            self.cycle.message_event.set()
        try:
            if self.transport.can_write_eof():  # TLS can't end one direction alone; the answer's length is told anyway
                self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.close()
        else:
            self.flow.resume_reading()

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
        body = error_body(text)
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(head % (status, len(body)) + body)
        self._linger()


class _AnswerTransport(asyncio.Transport):
    """What an answer is written to. uvicorn closes it behind the last byte, however much of the request is to come."""

    def __init__(self, door: DoorProtocol) -> None:
        super().__init__()
        self._door = door

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._door.lingers:  # else another request on this connection was the last that is answered
            self._door.transport.write(data)

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
