"""Real agents in processes of their own."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what test files here share: cloud_server


@dataclass
class AgentProcess:
    """A running ``aios-edge agent run``; ``url`` is the TCP door the system chose, ``grpc`` host and port of gRPC's."""

    process: subprocess.Popen[bytes]
    log_path: Path
    config: Path
    url: str = ""
    grpc: str = ""
    socket_path: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.loads(response.read())

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read(), "utf-8")

    def post(self, path: str) -> None:
        """With an empty body; raises for what isn't a 200."""
        with urllib.request.urlopen(self.url + path, b"", timeout=30):
            pass

    def status(self) -> Any:
        return self.get("/status")

    def infer(
        self, text: str | list[str] = "a good film", *, model: str = "tiny", **parameters: Any
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, document and headers of one natural request."""
        texts = [text] if isinstance(text, str) else text
        body = {
            "id": "7",
            "parameters": parameters,
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}],
        }
        request = urllib.request.Request(
            f"{self.url}/v2/models/{model}/infer", json.dumps(body).encode(), method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)

    def until(self, condition: Callable[[Any], Any], limit_s: float = 15.0) -> Any:
        """Poll /status until the condition holds; its value."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if value := condition(self.status()):
                return value
            time.sleep(0.01)
        raise AssertionError(f"never happened; log:\n{self.log()}")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event["detail"] for event in self.status()["events"] if event["kind"] == kind]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


StartAgent = Callable[..., AgentProcess]

#: ``aios-edge`` with other constants than its own, which no setting changes.
OTHERWISE = """
import importlib, json, sys
from aios_edge.cli.main import main

for path, value in json.loads(sys.argv.pop(1)).items():
    module, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    assert isinstance(getattr(owner, name), type(value)), path
    setattr(owner, name, value)
main()
"""


@pytest.fixture(scope="session")
def agent_toml(tiny_bundle: Any) -> Callable[..., str]:
    """Text of an agent.toml for a bundle (the tiny one by default), with more of it appended."""

    def make(
        more: str = "",
        *,
        bundle: Path | None = None,
        bind: str = "127.0.0.1:0",
        device: str = "",
        http: str = "",
        profile: Path | str = "x86-gateway",
    ) -> str:
        return (
            f'[device]\nid = "dev"\nprofile = "{profile}"\nstate_dir = "state"\n{device}\n'
            f'[http]\nbind = "{bind}"\n{http}\n[[bundle]]\npath = "{bundle or tiny_bundle.path}"\n{more}\n'
        )

    return make


@pytest.fixture(scope="module")
def small_batches(make_bundle: Any) -> Path:
    """The tiny model, one request a batch: a queue builds up."""
    path: Path = make_bundle(max_batch_size=1).path
    return path


@pytest.fixture(scope="module")
def start_agent(tmp_path_factory: pytest.TempPathFactory, agent_toml: Callable[..., str]) -> Iterator[StartAgent]:
    """Start agents and wait until they are ready; all are ended with the module."""
    running: list[AgentProcess] = []

    def start(
        more: str = "",
        *,
        wait: bool = True,
        limit_s: float = 40.0,
        again: AgentProcess | None = None,
        constants: dict[str, float] | None = None,
        **options: Any,
    ) -> AgentProcess:
        """``again``: an agent that ended; another one goes on with its file and state. ``constants``: other values for
        those of the agent's modules (``quick_constants.py`` has some)."""
        folder = tmp_path_factory.mktemp("agent") if again is None else again.config.parent
        config = folder / "agent.toml"
        if again is None:
            config.write_text(agent_toml(more, **options))
        log_path = folder / "log"
        program = ["-m", "aios_edge.cli.main"] if constants is None else ["-c", OTHERWISE, json.dumps(constants)]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *program, "agent", "run", "--config", str(config)],
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )
        agent = AgentProcess(process, log_path, config)
        running.append(agent)
        end = time.monotonic() + limit_s
        while wait and time.monotonic() < end:
            line = next((line for line in agent.log().splitlines() if "ready on " in line), None)
            if line:
                doors = line.split("ready on ")[1].split(", ")
                agent.url = next((door for door in doors if door.startswith("http")), "")
                agent.grpc = next((door for door in doors if door.startswith("grpc")), "").partition("://")[2]
                return agent
            if process.poll() is not None:
                break
            time.sleep(0.02)
        if wait:
            raise AssertionError(f"not ready:\n{agent.log()}")
        return agent

    yield start
    for agent in running:
        if agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()


class RecordingCloud:
    """An Open Inference Protocol server that keeps every byte it gets. ``metadata`` answers a GET, ``answer`` a POST
    (None: never); it is in threads of its own, so that it hears whatever a test does."""

    def __init__(self, metadata: bytes) -> None:
        self.metadata = metadata
        self.answer: Callable[[], tuple[int, bytes] | None] = lambda: (500, b"{}")
        self.received = bytearray()
        self.posts: list[bytes] = []
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with connection:
            while chunk := connection.recv(1 << 16):
                self.received += chunk
                data += chunk
                while b"\r\n\r\n" in data:
                    head, _, rest = data.partition(b"\r\n\r\n")
                    length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
                    if len(rest) < length:
                        break
                    body, data = rest[:length], rest[length:]
                    status, reply = 200, self.metadata
                    if head.startswith(b"POST"):
                        self.posts.append(body)
                        answered = self.answer()
                        if answered is None:
                            self._ended.wait()
                            return
                        status, reply = answered
                    connection.sendall(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(reply)) + reply)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()


@pytest.fixture
def recording_cloud(tiny_bundle: Any) -> Iterator[RecordingCloud]:
    """A cloud that has the tiny model, natural input included."""
    from device_agent.metadata import model_metadata

    cloud = RecordingCloud(msgspec.json.encode(model_metadata(tiny_bundle.manifest)))
    yield cloud
    cloud.close()
