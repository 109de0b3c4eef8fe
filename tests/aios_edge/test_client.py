"""The client against real sockets: a small server that answers as an agent does, and some that misbehave."""

from __future__ import annotations

import json
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.client import Answer, Client, HttpError, Overloaded
from aios_edge.errors import RemoteError, RequestError, UsageError
from aios_edge.oip.datatypes import Tensor, narrow_bf16
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, encode_response, parse_json_length, parse_request
from aios_edge.oip.tensors import decode_inputs, encode_outputs

ROUTE = {"route": "cloud", "reason": "predicted_late", "queue_us": 250, "compute_us": 1500, "batch_size": 4}


class Handler(BaseHTTPRequestHandler):
    """Echoes tensors and classifies every text as its length; the server keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Any

    def address_string(self) -> str:
        return "client"  # a Unix socket has no address

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), self.connection))
        known: dict[str, Any] = {
            "/v2": {"name": "aios-edge", "version": "1", "extensions": []},
            "/v2/health/live": {"live": True},
            "/v2/models/m/ready": {"ready": True},
            "/v2/models/a%2Fb/versions/2": {
                "name": "a/b",
                "versions": ["2"],
                "platform": "onnx_onnxv1",
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
                "outputs": [],
                "labels": ["no", "yes"],
                "unknown": 1,
            },
            "/status": {"models": {}},
        }
        if self.path in known:
            self.reply(200, json.dumps(known[self.path]).encode())
        elif self.path == "/v2/health/ready":
            self.reply(503, b'{"error": "a model is loading"}')
        else:
            self.reply(404, b"<html>no such thing</html>")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        json_length = parse_json_length(self.headers[JSON_LENGTH_HEADER])
        self.server.seen.append((self.path, dict(self.headers), self.connection))
        self.server.envelope = parse_request(body, json_length)
        if self.path.startswith("/v2/models/shed/"):
            return self.reply(503, b'{"error": "busy"}', Retry_After="0.25")
        if self.path.startswith("/v2/models/late/"):
            return self.reply(504, b'{"error": "too late"}', Retry_After="1")
        if self.path.startswith("/v2/models/gateway/"):
            return self.reply(504, b"nobody answered")
        if self.path.startswith("/v2/models/stopping/"):
            return self.reply(503, b'{"error": "stopping"}')
        request = decode_inputs(body, json_length)
        tensors = request.inputs
        if "text" in tensors:
            texts = tensors["text"].array.ravel()
            size = len(texts) + self.path.startswith("/v2/models/odd/")
            tensors = {
                "label": Tensor("BYTES", np.array([str(len(t)).encode() for t in texts], dtype=np.object_)),
                "score": Tensor("FP32", np.full(size, 0.75, dtype=np.float32)),
                "probabilities": Tensor("FP32", np.tile(np.array([0.25, 0.75], dtype=np.float32), (len(texts), 1))),
            }
        outputs, binary = encode_outputs(tensors, request)
        parameters = {**ROUTE, "energy_j": None, "energy_method": None}
        content, length = encode_response(
            model_name="m", model_version="1", outputs=outputs, binary=binary, parameters=parameters
        )
        self.reply(200, content, **({} if length is None else {"Inference_Header_Content_Length": str(length)}))


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    seen: list[Any]
    envelope: Any


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    seen: list[Any]
    envelope: Any


@contextmanager
def running(server: Any) -> Iterator[Any]:
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(params=["tcp", "unix"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Client, Any]]:
    if request.param == "tcp":
        with (
            running(TcpServer(("127.0.0.1", 0), Handler)) as server,
            Client(f"http://127.0.0.1:{server.server_address[1]}", timeout_s=10) as client,
        ):
            yield client, server
        return
    with tempfile.TemporaryDirectory() as folder:  # a Unix socket's path has at most 107 bytes
        path = str(Path(folder) / "agent.sock")
        with running(UnixServer(path, Handler)) as server, Client(f"unix://{path}", timeout_s=10) as client:
            yield client, server


def test_health_metadata_and_status(served: tuple[Client, Any]) -> None:
    client, server = served
    assert (client.live(), client.ready(), client.model_ready("m"), client.model_ready("n")) == (
        True,
        False,
        True,
        False,
    )
    assert client.server_metadata().name == "aios-edge"
    metadata = client.model_metadata("a/b:2")
    assert (metadata.labels, metadata.inputs[0].shape) == (("no", "yes"), (-1,))
    assert client.status() == {"models": {}}
    assert len({id(connection) for _, _, connection in server.seen}) == 1  # one kept-alive connection


def test_texts_are_classified_in_one_request(served: tuple[Client, Any]) -> None:
    client, server = served
    answers = client.classify("m", ["ä", "", "three"], deadline_s=0.25, priority=2, local_only=True)
    assert [answer.label for answer in answers] == ["2", "0", "5"]
    first = answers[0]
    assert isinstance(first, Answer)
    assert (first.score, first.probabilities) == (0.75, (0.25, 0.75))
    assert (first.route, first.reason, first.batch_size) == ("cloud", "predicted_late", 4)
    assert (first.queue_s, first.compute_s) == pytest.approx((250e-6, 1500e-6))
    assert first.energy_j is None and first.latency_s > 0
    assert len(server.seen) == 1
    envelope = server.envelope
    assert (envelope.timeout_s, envelope.priority, envelope.local_only) == (0.25, 2, True)


def test_pairs_are_two_tensors(served: tuple[Client, Any]) -> None:
    client, server = served
    client.classify("m", [("a", "b"), ("c", "d")])
    assert [(tensor.name, tensor.shape) for tensor in server.envelope.inputs] == [("text", (2,)), ("text_pair", (2,))]
    assert (server.envelope.timeout_s, server.envelope.parameters) == (None, {"binary_data_output": True})
    with pytest.raises(UsageError, match="mixed"):
        client.classify("m", ["a", ("c", "d")])  # type: ignore[list-item]
    assert client.classify("m", []) == ()


def test_a_passed_deadline_is_not_no_deadline(served: tuple[Client, Any]) -> None:
    client, server = served
    client.classify("m", ["a"], deadline_s=0.0)
    assert server.envelope.timeout_s == 1e-6


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_there_and_back(served: tuple[Client, Any], binary: bool) -> None:
    client, server = served
    inputs = {
        "i": np.array([[1, -2]], dtype=np.int16),
        "f": np.array(0.5, dtype=np.float64),
        "s": np.array(["a", "ä"]),
        "b": Tensor("BF16", narrow_bf16(np.array([1.5], dtype=np.float32))),
    }
    result = client.infer("m", inputs, binary, outputs=["s", "b", "i", "f"])
    assert list(result.outputs) == ["s", "b", "i", "f"]
    assert result.outputs["i"].tolist() == [[1, -2]] and result.outputs["i"].dtype == np.int16
    assert result.outputs["f"].shape == () and result.outputs["f"] == 0.5
    assert result.outputs["s"].tolist() == [b"a", "ä".encode()]
    assert result.outputs["b"].tolist() == [1.5]
    assert result.parameters["route"] == "cloud" and result.model_name == "m"
    assert (JSON_LENGTH_HEADER in server.seen[0][1]) is binary


def test_nan_travels_in_binary_only(served: tuple[Client, Any]) -> None:
    client, _ = served
    nan = {"x": np.array([np.nan])}
    assert np.isnan(client.infer("m", nan).outputs["x"]).all()
    with pytest.raises(RequestError, match="binary"):
        client.infer("m", nan, binary=False)


def test_errors_carry_status_and_the_servers_words(served: tuple[Client, Any]) -> None:
    client, _ = served
    with pytest.raises(Overloaded, match="busy") as shed:
        client.classify("shed", ["a"])
    assert (shed.value.status, shed.value.retry_after_s, shed.value.text) == (503, 0.25, "busy")
    with pytest.raises(Overloaded, match="too late") as late:
        client.classify("late", ["a"])
    assert (late.value.status, late.value.retry_after_s) == (504, 1.0)
    with pytest.raises(HttpError, match="nobody answered") as gateway:
        client.classify("gateway", ["a"])
    assert not isinstance(gateway.value, Overloaded), "no agent's"
    with pytest.raises(HttpError, match="stopping") as stopping:
        client.classify("stopping", ["a"])
    assert not isinstance(stopping.value, Overloaded) and stopping.value.status == 503
    with pytest.raises(HttpError, match=r"404.*no such thing"):
        client.model_metadata("nobody")
    with pytest.raises(RemoteError, match="no classification"):
        client.classify("odd", ["a"])
    assert client.live()  # the connection is as good as before


def test_a_key_is_sent_as_bearer() -> None:
    with running(TcpServer(("127.0.0.1", 0), Handler)) as server:
        with Client(f"http://127.0.0.1:{server.server_address[1]}", bearer="key") as client:
            client.live()
        assert server.seen[0][1]["Authorization"] == "Bearer key"


@contextmanager
def scripted(script: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what ``script`` says with its listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=script, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


LIVE = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"live":true}'


def test_a_stale_connection_is_opened_again_once() -> None:
    closed = threading.Event()

    def closes_after_each_answer(listener: socket.socket) -> None:
        for _ in range(2):
            peer, _ = listener.accept()
            peer.recv(65536)
            peer.sendall(LIVE)  # keep-alive promised, and broken
            peer.close()
            closed.set()

    with scripted(closes_after_each_answer) as url, Client(url, timeout_s=10) as client:
        assert client.live()
        assert closed.wait(10)
        assert client.live()


def test_a_fresh_connection_that_dies_is_an_error_and_not_tried_again() -> None:
    accepted = []

    def hangs_up(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        accepted.append(peer.recv(65536))
        peer.close()

    with scripted(hangs_up) as url, Client(url, timeout_s=10) as client, pytest.raises(RemoteError, match="reached"):
        client.server_metadata()
    assert len(accepted) == 1


def test_a_refusal_is_read_although_sending_failed() -> None:
    def refuses_before_the_body_came(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        peer.recv(65536)
        text = b'{"error": "too long"}'
        peer.sendall(b"HTTP/1.1 413 Too Long\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        peer.close()  # with unread bytes: a reset

    with scripted(refuses_before_the_body_came) as url, Client(url, timeout_s=10) as client:
        with pytest.raises(HttpError, match="too long") as caught:
            client.classify("m", ["x" * 40_000_000])
        assert caught.value.status == 413


@pytest.mark.parametrize(
    "content",
    [
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
        LIVE.replace(b'"live"', b'\xff\xff"li"'),
    ],
)
def test_nonsense_is_a_remote_error(content: bytes) -> None:
    def answers_nonsense(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        peer.recv(65536)
        peer.sendall(content)
        peer.close()

    with scripted(answers_nonsense) as url, Client(url, timeout_s=10) as client, pytest.raises(RemoteError):
        client.server_metadata()


def test_waiting_has_an_end() -> None:
    done = threading.Event()

    def never_answers(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        done.wait(10)
        peer.close()

    with scripted(never_answers) as url, Client(url, timeout_s=0.2) as client:
        with pytest.raises(RemoteError, match="in time"):
            client.server_metadata()
        done.set()


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", f"unix://{tmp_path}/no.sock"):
        client = Client(url, timeout_s=5)
        assert (client.live(), client.ready(), client.model_ready("m")) == (False, False, False)
        with pytest.raises(RemoteError, match="agent runs"):
            client.status()


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8080", "ftp://x", "http://", "http://x:y", "http://x/path", "unix://a/b"]
)
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="unix:///path"):
        Client(url)
