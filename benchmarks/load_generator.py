"""Closed-loop load over HTTP/1.1 keep-alive connections: wrk where it is installed, else this file's own generator.

    python benchmarks/load_generator.py REQUEST.json

Either is a process of its own; the processor time it took is counted with the result. wrk (apt install wrk) is C and
takes the least of the cores that the server needs. Our own is one Python thread over epoll, takes some 20 µs a request,
and is the one that reads answers: batch sizes are told by it alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

WRK = shutil.which("wrk")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send: the bodies in turn, each connection its next request when the last was answered."""

    port: int
    path: str
    bodies: tuple[str, ...]  # JSON
    connections: int
    seconds: float
    read_batch_sizes: bool = False


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came back; ``failed`` counts answers other than 200. ``cpu_s`` is the generator's own processor time."""

    generator: str
    requests: int
    failed: int
    seconds: float
    p50_s: float
    p99_s: float
    cpu_s: float
    batch_sizes: dict[int, int] = {}
    first_cpu_s: float = 0.0  # of the server's first process, where whoever asked has added it
    server_cpu_s: float = 0.0  # of all its processes

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def run(load: Load) -> Result:
    """Send it and wait for the end."""
    return _wrk(load) if WRK and not load.read_batch_sizes else _own(load)


_LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local bodies, at = {}, 0
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
wrk.body = bodies[1]
if #bodies > 1 then
  request = function()
    at = at % #bodies + 1
    return wrk.format("POST", nil, nil, bodies[at])
  end
end
function done(summary, latency)
  local failed = summary.errors.status + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, failed, summary.duration,
    latency:percentile(50), latency:percentile(99)))
end
"""


def _wrk(load: Load) -> Result:
    assert WRK is not None
    with tempfile.TemporaryDirectory() as folder:
        script, bodies = Path(folder) / "load.lua", Path(folder) / "bodies"
        script.write_text(_LUA)
        bodies.write_text("\n".join(load.bodies))
        command = [WRK, "-t1", f"-c{load.connections}", f"-d{max(1, round(load.seconds))}s", "--timeout", "30s"]
        command += ["-s", str(script), f"http://127.0.0.1:{load.port}{load.path}"]
        before = os.times()
        done = subprocess.run(
            command, env=os.environ | {"BODIES": str(bodies)}, capture_output=True, text=True, check=True
        )
        after = os.times()
    cpu_s = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    requests, failed, micros, p50, p99 = (int(figure) for figure in line.split()[1:])
    return Result(
        generator="wrk, 1 thread",
        requests=requests,
        failed=failed,
        seconds=micros / 1e6,
        p50_s=p50 / 1e6,
        p99_s=p99 / 1e6,
        cpu_s=cpu_s,
    )


def _own(load: Load) -> Result:
    with tempfile.NamedTemporaryFile() as file:
        file.write(msgspec.json.encode(load))
        file.flush()
        done = subprocess.run([sys.executable, __file__, file.name], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load broke off: {done.stderr.decode(errors='replace')[-300:]}")
    return msgspec.json.decode(done.stdout, type=Result)


class Connection:
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_at = 0.0
        self.received = bytearray()

    def send(self, request: bytes) -> None:
        self.received.clear()
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def answer(self) -> tuple[int, bytes] | None:
        """Read what is there; status and body when the answer is whole."""
        piece = self.socket.recv(256 * 1024)
        if not piece:
            raise ConnectionError("the server closed the connection")
        self.received += piece
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self.received[:end]).lower()
        start = head.find(b"content-length:")
        if start < 0:  # chunked
            if not self.received.endswith(b"0\r\n\r\n"):
                return None
            return int(head[9:12]), b""
        length = int(head[start + 15 :].split(b"\r\n", 1)[0])
        if len(self.received) < end + 4 + length:
            return None
        return int(head[9:12]), bytes(self.received[end + 4 :])


def main(path: str) -> None:
    """The generator's process."""
    load = msgspec.json.decode(Path(path).read_bytes(), type=Load)
    requests = itertools.cycle([_request(load, body.encode()) for body in load.bodies])
    selector = selectors.EpollSelector()
    connections = [Connection(load.port) for _ in range(load.connections)]
    latencies: list[float] = []
    sizes: Counter[int] = Counter()
    failed = 0
    started = time.perf_counter()
    end = started + load.seconds
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(next(requests))
    waiting = len(connections)
    while waiting:
        for key, _ in selector.select():
            connection: Any = key.data
            answer = connection.answer()
            if answer is None:
                continue
            now = time.perf_counter()
            latencies.append(now - connection.sent_at)
            failed += answer[0] != 200
            if load.read_batch_sizes and answer[0] == 200:
                sizes[_batch_size(answer[1])] += 1
            if now < end:
                connection.send(next(requests))
            else:
                waiting -= 1
    seconds = time.perf_counter() - started
    latencies.sort()
    result = Result(
        generator="our own, 1 Python thread",
        requests=len(latencies),
        failed=failed,
        seconds=seconds,
        p50_s=latencies[len(latencies) // 2],
        p99_s=latencies[len(latencies) * 99 // 100],
        cpu_s=time.process_time(),
        batch_sizes=dict(sizes),
    )
    sys.stdout.buffer.write(msgspec.json.encode(result))


class _Answer(msgspec.Struct):
    parameters: dict[str, Any] = {}


_answers = msgspec.json.Decoder(_Answer)


def _batch_size(body: bytes) -> int:
    with contextlib.suppress(msgspec.MsgspecError):
        return int(_answers.decode(body).parameters.get("batch_size") or 1)
    return 1


def _request(load: Load, body: bytes) -> bytes:
    lines = [f"POST {load.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


if __name__ == "__main__":
    main(sys.argv[1])
