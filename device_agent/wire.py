"""Between supervisor and worker: messages over one Unix socketpair.

The socket is ``SOCK_SEQPACKET``, so a message is one datagram and never half read:

    u32 little-endian header length | header (msgpack, one of the structs below) | payload

A payload above 64 KiB travels in a memfd passed with the datagram (SCM_RIGHTS) instead of behind the header. The
payload is the concatenation of byte regions; the header says where each lies. Every message carries the protocol
version, and everything about a batch carries the worker's generation: a reply of an old generation is dropped.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct

import msgspec

from device_agent.values import ActivationReport

PROTOCOL_VERSION = 1
INLINE_LIMIT_BYTES = 64 * 1024
_HEADER = struct.Struct("<I")
_DATAGRAM_LIMIT_BYTES = 160 * 1024  # header and inline payload; below Linux's default SO_SNDBUF of 208 KiB


class Region(msgspec.Struct, frozen=True, array_like=True):
    """Bytes ``[start, start + length)`` of the message's payload."""

    start: int
    length: int

    def of(self, payload: bytes | memoryview) -> memoryview:
        """The region's bytes, not copied."""
        return memoryview(payload)[self.start : self.start + self.length]


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor to worker, first message: load this bundle and check its contract.

    ``profile`` is a device profile as TOML file path or shipped name. ``check`` is ``full`` for an activation;
    ``quick`` after a crash: digests and a handful of golden samples, no latency and memory runs.
    """

    bundle_path: str
    profile: str
    generation: int
    check: str = "full"
    slowdown: float = 1.0
    version: int = PROTOCOL_VERSION


class RunItem(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch: its whole Open Inference Protocol body. ``deadline_at`` is CLOCK_MONOTONIC."""

    request_id: int
    body: Region
    json_length: int | None
    deadline_at: float | None


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor to worker: answer these requests, together where their inputs allow it."""

    batch_id: int
    generation: int
    items: tuple[RunItem, ...]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker: finish what you have and exit."""


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to supervisor: a stage of the activation began."""

    generation: int
    stage: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to supervisor: the bundle is loaded and its contract holds here."""

    generation: int
    report: ActivationReport


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to supervisor: the bundle must not go live; ``check`` is the name of the check that failed."""

    generation: int
    check: str
    detail: str
    report: ActivationReport | None = None


class DoneItem(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request.

    ``status`` 200: ``outputs`` is the JSON array of output tensors and ``binary`` the tensors behind it. Else
    ``error`` says what was wrong. ``length`` is the true input length (tokens for text), 0 if unknown;
    ``batch_size`` counts the requests that shared the model run.
    """

    request_id: int
    status: int
    outputs: Region = Region(0, 0)
    binary: Region = Region(0, 0)
    error: str | None = None
    length: int = 0
    batch_size: int = 1
    compute_s: float = 0.0


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to supervisor: a whole batch is answered; ``busy_s`` is how long the worker was occupied with it."""

    batch_id: int
    generation: int
    busy_s: float
    cpu_s: float
    rss_bytes: int
    items: tuple[DoneItem, ...]


Message = Load | Run | Stop | Loading | Ready | Refused | Done

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair: the supervisor's end (non-blocking) and the worker's (blocking)."""
    supervisor, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor.setblocking(False)
    return supervisor, worker


def send(sock: socket.socket, message: Message, payload: bytes | bytearray = b"") -> None:
    """Send one message. On a non-blocking socket raises BlockingIOError when the buffer is full; OSError if the
    peer is gone."""
    header = _encoder.encode(message)
    parts: list[bytes | bytearray] = [_HEADER.pack(len(header)), header]
    if len(payload) <= INLINE_LIMIT_BYTES and len(header) + len(payload) <= _DATAGRAM_LIMIT_BYTES:
        parts.append(payload)
        sock.sendmsg(parts)
        return
    fd = os.memfd_create("aios-edge-payload", os.MFD_CLOEXEC)
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(fd, view) :]
        sock.sendmsg(parts, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    finally:
        os.close(fd)


def receive(sock: socket.socket) -> tuple[Message, memoryview] | None:
    """Receive one message and its payload; None when the peer closed. BlockingIOError as ``recvmsg`` raises it;
    :class:`ConnectionError` for a datagram that isn't ours."""
    data, ancillary, flags, _ = sock.recvmsg(_DATAGRAM_LIMIT_BYTES + INLINE_LIMIT_BYTES, socket.CMSG_LEN(4))
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        if not data:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) < _HEADER.size:
            raise ConnectionError("a truncated message between supervisor and worker")
        (header_length,) = _HEADER.unpack_from(data)
        end = _HEADER.size + header_length
        try:
            message = _decoder.decode(memoryview(data)[_HEADER.size : end])
        except msgspec.MsgspecError as error:
            raise ConnectionError(f"a message that is not of this protocol: {error}") from error
        if not fds:
            return message, memoryview(data)[end:]
        size = os.fstat(fds[0]).st_size
        return message, memoryview(mmap.mmap(fds[0], size, prot=mmap.PROT_READ)) if size else memoryview(b"")
    finally:
        for fd in fds:
            os.close(fd)
