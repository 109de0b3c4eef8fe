"""Between supervisor and worker: messages over one Unix socketpair.

The socket is ``SOCK_SEQPACKET``, so a message is one datagram and never half read:

    u32 little-endian header length | header (msgpack, one of the structs below) | payload

When header and payload together exceed 64 KiB they travel in a sealed memfd passed with the datagram (SCM_RIGHTS),
which then holds the length alone. The payload is the concatenation of byte regions; the header says where each
lies. The first message carries the protocol version, and everything about a batch carries the worker's generation:
a reply of an old generation is dropped.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import struct

import msgspec

from device_agent.values import ActivationReport, Engines

PROTOCOL_VERSION = 4
INLINE_LIMIT_BYTES = 64 * 1024  # far below Linux's default SO_SNDBUF, the limit of one datagram
_HEADER = struct.Struct("<I")
_DATAGRAM_LIMIT_BYTES = _HEADER.size + INLINE_LIMIT_BYTES
# As a plain number: Python's flags are objects, and making two of them takes as long as the rest of a short message.
_CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_ONE_DESCRIPTOR = socket.CMSG_LEN(array.array("i").itemsize)  # more arrive as MSG_CTRUNC
# A sealed memfd can't shrink under the receiver's mapping, so a dying peer never becomes a SIGBUS on this side.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Region(msgspec.Struct, frozen=True, array_like=True):
    """Bytes ``[start, start + length)`` of the message's payload."""

    start: int
    length: int

    def of(self, payload: bytes | memoryview) -> memoryview:
        """The region's bytes, not copied; :class:`ConnectionError` if it lies outside the payload."""
        if self.start < 0 or self.length < 0 or self.start + self.length > len(payload):
            raise ConnectionError(f"a region outside its message: {self} of {len(payload)} bytes")
        return memoryview(payload)[self.start : self.start + self.length]


class RawModel(msgspec.Struct, frozen=True, array_like=True):
    """A model without a bundle. ``digest``: over its files when it went live; None before."""

    name: str
    version: str
    digest: str | None


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Supervisor to worker, first message: load this bundle and check its contract.

    ``profile`` is a device profile as TOML file path or shipped name. ``check`` is ``full`` for an activation;
    ``quick`` after a crash: digests and a handful of golden samples, no latency and memory runs; ``engine`` builds
    TensorRT's engine and serves nobody. ``engines``: when TensorRT is used. ``slowdown``
    emulates a weaker device: every batch is held for its compute time times this. ``state_dir``: where engines that
    take minutes to build are kept; None: nowhere. ``raw``: what ``bundle_path`` holds instead of a bundle.
    ``bundle_id``: the bundle that is meant, whatever lies there now; None: any. ``cpus``: those it keeps to; empty: the
    profile's.
    """

    bundle_path: str
    profile: str
    generation: int
    raw: RawModel | None = None
    check: str = "full"
    slowdown: float = 1.0
    state_dir: str | None = None
    bundle_id: str | None = None
    engines: Engines = "build"
    version: int = PROTOCOL_VERSION
    cpus: tuple[int, ...] = ()


class RunItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One request of a batch: its whole Open Inference Protocol body. ``deadline_at`` is CLOCK_MONOTONIC."""

    request_id: int
    body: Region
    json_length: int | None
    deadline_at: float | None


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Supervisor to worker: answer these requests, together where their inputs allow it. ``classes``: say as well which
    class each row got."""

    batch_id: int
    generation: int
    items: tuple[RunItem, ...]
    classes: bool = False


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Supervisor to worker: give a sign of life when nothing else is to be done."""


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Supervisor to worker: finish what you have and exit."""


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Worker to supervisor: a stage of the activation began."""

    generation: int
    stage: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Worker to supervisor: the bundle is loaded and its contract holds here."""

    generation: int
    report: ActivationReport


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Worker to supervisor: the bundle must not go live; ``check`` is the name of the check that failed."""

    generation: int
    check: str
    detail: str
    report: ActivationReport | None = None


class DoneItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The answer to one request.

    ``status`` 200: ``outputs`` is the JSON array of output tensors and ``binary`` the tensors behind it. Else
    ``error`` says what was wrong. ``length`` is the true input length (tokens for text), 0 if unknown;
    ``batch_size`` counts the requests that shared the model run, 0: it had no rows, so none was needed.
    ``confidence``: the probability of the label that the model gave, the lowest of the request's rows (0 for an answer
    that is no number); None where there is none. ``classes``: each row's index in the manifest's labels, -1 for an
    answer that is no number; None where nobody asked, or there are none.
    """

    request_id: int
    status: int
    outputs: Region = Region(0, 0)
    binary: Region = Region(0, 0)
    error: str | None = None
    length: int = 0
    batch_size: int = 1
    compute_s: float = 0.0
    confidence: float | None = None
    classes: tuple[int, ...] | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Worker to supervisor: a whole batch is answered.

    ``busy_s`` is how long the worker was occupied with it (emulated slowness included), ``rss_bytes`` the worker
    process's resident set then, or some milliseconds before.
    """

    batch_id: int
    generation: int
    busy_s: float
    rss_bytes: int
    items: tuple[DoneItem, ...]


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Worker to supervisor: a sign of life, and nothing else."""

    generation: int


Message = Load | Run | Ping | Stop | Loading | Ready | Refused | Done | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair: the supervisor's end (non-blocking) and the worker's (blocking)."""
    supervisor, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor.setblocking(False)
    return supervisor, worker


def send(sock: socket.socket, message: Message, payload: bytes | bytearray = b"") -> None:
    """Send one message. On a non-blocking socket raises BlockingIOError when the buffer is full (nothing was sent
    then); OSError if the peer is gone."""
    header = _encoder.encode(message)
    prefix = _HEADER.pack(len(header))
    if len(header) + len(payload) <= INLINE_LIMIT_BYTES:
        sock.sendmsg([prefix, header, payload])
        return
    fd = os.memfd_create("aios-edge-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in (header, payload):
            view = memoryview(part)
            while view:
                view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        sock.sendmsg([prefix], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    finally:
        os.close(fd)


def receive(sock: socket.socket) -> tuple[Message, memoryview] | None:
    """Receive one message and its payload; None when the peer closed or died.

    BlockingIOError as ``recvmsg`` raises it; :class:`ConnectionError` for a datagram that isn't ours, after which
    the connection is of no use.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(_DATAGRAM_LIMIT_BYTES, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # the peer died with messages of ours unread
        return None
    fds = _descriptors(ancillary) if ancillary else ()
    try:
        if not data:
            return None
        if flags & _CUT_SHORT or len(data) < _HEADER.size:
            raise ConnectionError("a truncated message between supervisor and worker")
        (header_length,) = _HEADER.unpack_from(data)
        content = _mapped(fds[0]) if fds else memoryview(data)[_HEADER.size :]
        if header_length > len(content):
            raise ConnectionError("a message shorter than the header it announces")
        try:
            return _decoder.decode(content[:header_length]), content[header_length:]
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ConnectionError(f"a message that is not of this protocol: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    """Those that came with a datagram."""
    fds = array.array("i")
    for level, kind, control in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(control[: len(control) - len(control) % fds.itemsize])
    return tuple(fds)


def _mapped(fd: int) -> memoryview:
    """The content of a sealed memfd; the mapping lives as long as the view and doesn't need the descriptor."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ConnectionError("a payload that its sender could still change")
        return memoryview(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:  # not a memfd, or an empty one
        if isinstance(error, ConnectionError):
            raise
        raise ConnectionError(f"a payload that can't be mapped: {error}") from error
