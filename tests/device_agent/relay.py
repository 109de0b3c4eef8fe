"""A TCP connection that brings a real client's bytes up to a point, and the answers at once."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """``with Relay(to) as relay:`` clients connect to ``relay.address``. Of each connection the first ``free_bytes``
    pass, and the others after :meth:`open`."""

    def __init__(self, to: str, *, free_bytes: int) -> None:
        host, port = to.split(":")
        self._to = host, int(port)
        self._free_bytes = free_bytes
        self._open = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def open(self) -> None:
        """From now on everything passes."""
        self._open.set()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        for end in (self._listening, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._to)
                self._ends += [client, server]
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        left = self._free_bytes
        with contextlib.suppress(OSError):
            while data := client.recv(min(65536, left) if left else 65536):
                server.sendall(data)
                left = max(0, left - len(data))
                if not left:
                    self._open.wait()
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
