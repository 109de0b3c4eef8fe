"""gzip for request bodies (RFC 1952): taken apart within a bound, and made where it pays. Pure."""

from __future__ import annotations

import zlib

from aios_edge.errors import RequestError

_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to say: with gzip's head and check sum
_STEP_BYTES = 256 * 1024

LEAST_BYTES = 4096  # a shorter body fits into a few packets as it is
SAMPLE_BYTES = 16 * 1024
PAYS = 0.9  # of its size at most, else it goes as it is
_LEVEL = 1  # the fastest: JSON shrinks to a third with any


class Inflater:
    """Takes a compressed body in pieces. No more than ``limit_bytes`` are ever made of it, whatever it claims."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._stream = zlib.decompressobj(_GZIP)
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def size_bytes(self) -> int:
        """What was made of it by now."""
        return self._size

    def feed(self, piece: bytes) -> None:
        """The next piece. Raises :class:`RequestError`: 413 beyond the limit, 400 for what isn't gzip."""
        while piece:
            if self._stream.eof:
                raise _broken("something follows its end")
            room = self._limit_bytes - self._size + 1
            try:
                made = self._stream.decompress(piece, min(_STEP_BYTES, room))
            except zlib.error as error:
                raise _broken(str(error)) from error
            self._size += len(made)
            if self._size > self._limit_bytes:
                raise RequestError(
                    f"the body is longer than {self._limit_bytes} bytes when it is unpacked",
                    status=413,
                    remedy="Send smaller batches, or raise http.max_body_bytes",
                )
            self._pieces.append(made)
            piece = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    def finish(self) -> bytes:
        """The whole body. Raises :class:`RequestError` (400) when it was cut off."""
        if not self._stream.eof:
            raise _broken("it ends too early")
        return b"".join(self._pieces)


def gzipped(body: bytes) -> bytes | None:
    """The body, compressed; None where that doesn't pay, as its beginning tells."""
    if len(body) < LEAST_BYTES:
        return None
    sample = body[:SAMPLE_BYTES]
    if len(zlib.compress(sample, _LEVEL)) > PAYS * len(sample):
        return None
    stream = zlib.compressobj(_LEVEL, wbits=_GZIP)
    packed = stream.compress(body) + stream.flush()
    return packed if len(packed) <= PAYS * len(body) else None


def _broken(why: str) -> RequestError:
    return RequestError(
        f"the body is not gzip, as its Content-Encoding says ({why})", remedy="Send it whole, or as it is"
    )
