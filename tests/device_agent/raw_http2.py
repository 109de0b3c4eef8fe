"""HTTP/2 without a client's good manners: frames as bytes, for what no gRPC client would send."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections import Counter

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GO_AWAY, WINDOW, MORE_HEADERS = range(10)
END_STREAM, END_HEADERS = 1, 4
LIMIT_S = 20.0


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def headers(*pairs: tuple[str, str]) -> bytes:
    """HPACK, each one a literal that isn't remembered."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs)


def _text(value: str) -> bytes:
    data = value.encode("latin-1")
    if len(data) < 127:
        return bytes((len(data),)) + data
    length, rest = b"\x7f", len(data) - 127
    while rest >= 128:
        length, rest = length + bytes((rest % 128 | 128,)), rest // 128
    return length + bytes((rest,)) + data


def call(path: str = "/inference.GRPCInferenceService/ModelInfer", **changes: str) -> bytes:
    """The headers of a call; ``changes`` by name, ``_`` for ``-``."""
    given = {"content-type": "application/grpc", "te": "trailers"}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    method = given.pop("method", "POST")
    pseudo = ((":method", method), (":scheme", "http"), (":path", path), (":authority", "x"))
    return headers(*pseudo, *given.items())


def message(content: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC frames it; ``length``: what is said of it."""
    return struct.pack(">BI", flag, len(content) if length is None else length) + content


class Connection:
    """``with Connection(address):`` preface and settings are sent."""

    def __init__(self, address: str, *, settings: bytes = b"") -> None:
        host, port = address.split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=LIMIT_S)
        self.say(PREFACE + frame(SETTINGS, 0, 0, settings))
        self._left = b""

    def say(self, data: bytes) -> None:
        """Send it; a server that has hung up is no error here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def hear(self) -> tuple[int, int, int, bytes] | None:
        """The next frame: kind, flags, stream, content. None at the end. A ping is answered."""
        head = self._take(9)
        if head is None:
            return None
        length = int.from_bytes(head[:3], "big")
        content = self._take(length)
        if content is None:
            return None
        if head[3] == PING and not head[4]:
            self.say(frame(PING, 1, 0, content))
        return head[3], head[4], int.from_bytes(head[5:], "big"), content

    def hears_within(self, seconds: float) -> bool:
        """Whether there is more to hear."""
        return bool(self._left) or bool(select.select([self.sock], [], [], seconds)[0])

    def until(self, *kinds: int) -> tuple[int, int, int, bytes] | None:
        """The next frame of these kinds; None at the end."""
        while (heard := self.hear()) is not None:
            if heard[0] in kinds:
                return heard
        return None

    def say_side_by_side(self, left: dict[int, bytes], *, leave: int) -> dict[int, bytes]:
        """A frame of each stream's content in turn, as the other end's windows allow, up to the last ``leave`` bytes of
        each. Trailers that were heard meanwhile, by stream: nothing more is sent to these. What isn't sent yet is
        ``unsent``."""
        left = {stream: content[: len(content) - leave] for stream, content in left.items()}
        ended: dict[int, bytes] = {}
        first, room = 65535, Counter({0: 65535} | dict.fromkeys(left, 65535))
        while left := {stream: content for stream, content in left.items() if content and stream not in ended}:
            self.unsent, sent = left, False
            for stream, content in left.items():
                if (size := min(room[0], room[stream], 16384, len(content))) > 0:
                    self.say(frame(DATA, 0, stream, content[:size]))
                    left[stream], sent = content[size:], True
                    room.subtract({0: size, stream: size})
            while not sent or self.hears_within(0):
                if (heard := self.hear()) is None:
                    return ended  # hung up
                sent = True
                kind, flags, stream, content = heard
                if kind == WINDOW:
                    room[stream] += int.from_bytes(content, "big")
                elif kind == SETTINGS and not flags:
                    sizes = dict(struct.iter_unpack(">HI", content))
                    for each in left:
                        room[each] += sizes.get(4, first) - first
                    first = sizes.get(4, first)
                    self.say(frame(SETTINGS, 1, 0))
                elif kind == HEADERS and flags & END_STREAM:
                    ended[stream] = content
        return ended

    def _take(self, count: int) -> bytes | None:
        while len(self._left) < count:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._left += data
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
