"""HTTP/1.1 under the doors: uvicorn's protocol, with refusals in our words and a bound on the head of a request.

What isn't HTTP never reaches :class:`device_agent.http.HttpApp`; it gets ``{"error"}`` here. The parser itself takes
heads of any length, which would let one client fill a small device's memory.
"""

from __future__ import annotations

import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aios_edge.oip.envelope import error_body

log = logging.getLogger("device_agent.http")

#: Of a request line with its headers. What arrives in one piece may be longer by the size of a read.
MAX_HEAD_BYTES = 64 * 1024


class DoorProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head = True
    _head_bytes = 0
    _turned = False  # whether a head or a body ended within the piece of data that is being read

    def data_received(self, data: bytes) -> None:
        """Bytes from the client; closes the connection when they can't become a request."""
        self._turned = False
        super().data_received(data)
        if self._turned or not self._in_head:
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
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; what follows is the next head."""
        self._in_head, self._turned = True, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser couldn't read."""
        self._refuse(b"400 Bad Request", "this is not HTTP/1.1, or its body doesn't follow its headers")

    def _refuse(self, status: bytes, text: str) -> None:
        body = error_body(text)
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(head % (status, len(body)) + body)
        self.transport.close()
