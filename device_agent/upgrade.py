"""Requests that offer to go on in another protocol, as Java's client offers HTTP/2 each time: HTTP/1.1 answers them.

The parser stops behind the head of such a request, and takes its body for the other protocol's bytes. So the head is
written anew without the offer, and parsed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import httptools


def declined(parser: httptools.HttpRequestParser, url: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head that ``parser`` has just read, without its offer; names are in small letters."""
    lines = [b"%b %b HTTP/%b" % (parser.get_method(), url, parser.get_http_version().encode())]
    for name, value in headers:
        if name == b"connection":
            value = b",".join(word for word in value.split(b",") if word.strip().lower() != b"upgrade")
        if name != b"upgrade":
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join((*lines, b"", b""))
