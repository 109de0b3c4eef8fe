"""What of a tenant's request reaches the cloud: the tensors and what holds of its parameters, never its key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from quick_constants import UNREHEARSED

from aios_edge.client import Client
from device_agent.metadata import model_metadata
from device_agent.tenants import key_sha256, new_key

CLOUD_KEY = "the-key-of-the-cloud"
OUTPUTS = [
    {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["positive"]},
    {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.9]},
    {"name": "probabilities", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 0.9]},
]


class Recorder:
    """A server that writes down every byte it is sent, and answers as our model would."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(metadata)

            def do_POST(self) -> None:
                recorder.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self._answer({"model_name": "x", "outputs": OUTPUTS, "parameters": {"priority": 1}})

            def _answer(self, document: Any) -> None:
                recorder.heads.append(f"{self.requestline}\n{self.headers}")
                body = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cloud(tiny_bundle: Any) -> Iterator[Recorder]:
    recorder = Recorder(msgspec.to_builtins(model_metadata(tiny_bundle.manifest)))
    yield recorder
    recorder.server.shutdown()
    recorder.server.server_close()


def test_a_key_stays_here_and_a_lowered_priority_goes_along(start_agent: Any, cloud: Recorder, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "bearer").write_text(CLOUD_KEY)
    device = start_agent(
        f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nbearer_file = "{tmp_path / "bearer"}"\n'
        "[policy]\nqueue_limit = 1\n[emulate]\nslowdown = 1000.0\n"  # the queue is full for a second or two
        f'[[tenant]]\nid = "shop"\nkey_sha256 = "{key_sha256(key)}"\nadmin = true\npriority_ceiling = 5\n',
        constants=UNREHEARSED,
    )
    tensors = {"text": np.array([b"a good film"], dtype=np.object_)}

    def ask(priority: int = 0) -> dict[str, Any]:
        with Client(device.url, bearer=key) as client:
            return client.infer("tiny", tensors, priority=priority).parameters

    with Client(device.url, bearer=key) as client, ThreadPoolExecutor(2) as pool:

        def until(condition: Callable[[Any], bool]) -> None:
            end = time.monotonic() + 30
            while not condition(client.status()):
                assert time.monotonic() < end, device.log()

        until(lambda status: bool(status["cloud"]["c"]["models"]["tiny"]["usable"]))
        first = pool.submit(ask)
        until(lambda status: status["models"]["tiny"]["running"] == 1)
        second = pool.submit(ask, 1)
        until(lambda status: status["models"]["tiny"]["queued"] == 1)
        lowered, modest = ask(priority=1), ask(priority=7)
        assert first.result()["route"] == "local" and second.result()["priority"] == 5
    assert lowered["route"] == "cloud" and lowered["priority"] == 5
    assert modest["route"] == "cloud" and modest["priority"] == 1, "what the cloud says of its own"
    everything = "\n".join(cloud.heads) + b"\n".join(cloud.bodies).decode("latin-1")
    assert key not in everything and key_sha256(key) not in everything and "aios_" not in everything
    assert everything.count(f"Bearer {CLOUD_KEY}") == len(cloud.heads)
    sent = [body.decode("latin-1") for body in cloud.bodies]
    assert len(sent) == 2 and '"priority":5' in sent[0] and '"priority":7' in sent[1]
    assert device.stop() == 0
