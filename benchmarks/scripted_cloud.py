"""A cloud that can be told to misbehave: an Open Inference Protocol server of one model, in a process of its own.

    python benchmarks/scripted_cloud.py SCRIPT.json

Its mood is read from standard input, a word a line: ``ok``, ``slow``, ``flapping``, ``corrupt``. To be lost it is
killed. Every request body that arrives adds one letter to a file, so that a kill loses no count: ``p`` for one that
carries the secret that must not leave the device, else ``.``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from pathlib import Path

import msgspec

OK, SLOW, FLAPPING, CORRUPT = "ok", "slow", "flapping", "corrupt"
ANSWER_S = 0.005
SLOW_S = 1.0  # longer than any deadline here
FLAP_S = 1.0  # away, and then there


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What it is, and what it says."""

    port: int
    metadata: str
    answer: str
    secret: str
    heard: str  # the file of letters


class Cloud:
    """The process, as whoever started it sees it."""

    def __init__(self, script: Script, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._script = script
        self._path = folder / "cloud.json"
        self._path.write_bytes(msgspec.json.encode(script))
        Path(script.heard).write_bytes(b"")
        self.start()

    def start(self) -> None:
        """Come up, or come back."""
        self._process = subprocess.Popen([sys.executable, __file__, str(self._path)], stdin=subprocess.PIPE)

    def tell(self, mood: str) -> None:
        """How it behaves from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{mood}\n".encode())
        self._process.stdin.flush()

    def kill(self) -> None:
        """It is lost."""
        self._process.kill()
        self._process.communicate()

    @property
    def lost(self) -> bool:
        """Whether it was killed, and is not back."""
        return self._process.poll() is not None

    def heard(self) -> tuple[int, int]:
        """Bodies that arrived, and how many of them should not have."""
        letters = Path(self._script.heard).read_bytes()
        return len(letters), letters.count(b"p")


class _Server:
    def __init__(self, script: Script) -> None:
        self._script = script
        self._heard = Path(script.heard).open("ab", buffering=0)  # noqa: SIM115 - as long as the process
        self._mood = OK
        self._since = 0.0
        answer = script.answer.encode()
        self._damaged = itertools.cycle(
            [
                _http(200, answer[: len(answer) // 2]),
                _http(200, bytes(range(128, 256))),
                _http(200, b"{}"),
                _http(200, answer, more=100),  # announces more than it sends
                _http(500, b"it broke"),
                b"\x00\x01 nonsense\r\n\r\n",
            ]
        )

    async def run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self._script.port)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._hear)
        await server.serve_forever()

    def _hear(self) -> None:
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)  # whoever started it is gone
        self._mood, self._since = line.strip(), time.monotonic()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer(reader, writer):
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection lives on."""
        head = await reader.readuntil(b"\r\n\r\n")
        asks = head.startswith(b"POST")
        if asks:
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            body = await reader.readexactly(int(length.split(b":")[1]))
            self._heard.write(b"p" if self._script.secret.encode() in body else b".")
        if self._mood == FLAPPING and int((time.monotonic() - self._since) / FLAP_S) % 2 == 0:
            return False
        await asyncio.sleep(SLOW_S if self._mood == SLOW else ANSWER_S)
        if not asks:
            writer.write(_http(200, self._script.metadata.encode()))
        elif self._mood == CORRUPT:
            writer.write(next(self._damaged))
            return False
        else:
            writer.write(_http(200, self._script.answer.encode()))
        return True


def _http(status: int, body: bytes, more: int = 0) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body) + more}\r\n\r\n"
    return head.encode() + body


if __name__ == "__main__":
    asyncio.run(_Server(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Script)).run())
