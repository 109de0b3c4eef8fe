"""A broker without manners: it lets everybody in, and says to the agent's door whatever a test wants."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading

from aios_edge.mqtt_client import publish_properties
from aios_edge.mqtt_message import MessageProperties, Publication
from aios_edge.mqtt_packet import read_publish

WAIT_S = 20.0


def publish(
    topic: str | bytes, payload: bytes, *, mid: int = 1, dup: bool = False, properties: bytes | None = None
) -> bytes:
    """A PUBLISH of QoS 1; ``properties`` as they stand on the wire, with their length."""
    name = topic.encode() if isinstance(topic, str) else topic
    content = struct.pack(">H", len(name)) + name + struct.pack(">H", mid) + (properties or b"\0") + payload
    return bytes((0x32 | dup << 3,)) + varint(len(content)) + content


def packed(properties: MessageProperties) -> bytes:
    """Those that paho can write."""
    made = publish_properties(properties)
    assert made is not None
    data: bytes = made.pack()  # type: ignore[no-untyped-call]
    return data


def text_property(kind: int, value: bytes) -> bytes:
    """One that it can't, alone."""
    return varint(3 + len(value)) + bytes((kind,)) + struct.pack(">H", len(value)) + value


def varint(value: int) -> bytes:
    data = b""
    while True:
        value, byte = divmod(value, 128)
        data += bytes((byte | (128 if value else 0),))
        if not value:
            return data


class RawBroker:
    """``answers``: what the agent's door published. It hangs up over a topic that ``poison`` is a part of."""

    def __init__(self, poison: str = "\0") -> None:
        self.answers: queue.SimpleQueue[Publication] = queue.SimpleQueue()
        self.acknowledged: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.doors: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()  # each connection that asks for requests
        self._poison = poison
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def door(self) -> socket.socket:
        """The next connection of the agent's door."""
        return self.doors.get(timeout=WAIT_S)

    def next(self) -> Publication:
        return self.answers.get(timeout=WAIT_S)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def __enter__(self) -> RawBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._server.accept()[0]
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        is_door = False
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError, IndexError):
            while True:
                first = stream.read(1)[0]
                length, place = 0, 0
                while True:
                    byte = stream.read(1)[0]
                    length, place = length | (byte & 127) << place, place + 7
                    if not byte & 128:
                        break
                packet = stream.read(length)
                match first >> 4:
                    case 1:
                        connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK
                    case 8:
                        connection.sendall(b"\x90\x04" + packet[:2] + b"\x00\x01")  # SUBACK
                        if b"/infer/+" in packet:
                            is_door = True
                            self.doors.put(connection)
                    case 3:
                        mid, message = read_publish(first, packet, five=True)
                        if self._poison in message.topic:
                            connection.shutdown(socket.SHUT_RDWR)
                            return
                        if is_door:
                            self.answers.put(message)
                        if mid:
                            connection.sendall(b"\x40\x02" + struct.pack(">H", mid))  # PUBACK
                    case 4:
                        self.acknowledged.put(struct.unpack_from(">H", packet)[0])
                    case 12:
                        connection.sendall(b"\xd0\x00")
