"""The doors of a real agent with a real worker: the protocol's clients, and everything that isn't the protocol."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from aios_edge.client import Client, HttpError
from device_agent.http_protocol import LINGER_BYTES, DoorProtocol

BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}]}


def texts(count: int) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [count], "data": ["x"] * count}]}


def tensors(ids: list[int], mask: list[int]) -> bytes:
    shapes = {"input_ids": ids, "attention_mask": mask}
    return json.dumps(
        {
            "inputs": [
                {"name": name, "datatype": "INT64", "shape": shape, "data": [1] * (shape[0] * shape[1])}
                for name, shape in shapes.items()
            ]
        }
    ).encode()


@pytest.fixture(scope="module")
def agent(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = Path(f"/tmp/aios-{os.getpid()}-{tmp_path_factory.mktemp('s').name}.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))  # left behind: nobody listens
    stale.close()
    agent = start_agent(http=f'unix_socket = "{path}"\nmax_body_bytes = 2000000')
    agent.socket_path = path
    yield agent
    assert agent.stop() == 0
    assert not path.exists()


def post(agent: Any, path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> Any:
    request = urllib.request.Request(agent.url + path, body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_an_answer_says_what_happened(agent: Any) -> None:
    status, document, _ = agent.infer(["a good film", "a bad plot"])
    assert status == 200, document
    outputs = {output["name"]: output["data"] for output in document["outputs"]}
    assert outputs["label"] == ["positive", "negative"]
    assert document["id"] == "7" and document["model_name"] == "tiny" and document["model_version"] == "1.0.0"
    parameters = document["parameters"]
    assert parameters["route"] == "local" and parameters["reason"] == "no_deadline"
    assert parameters["queue_us"] >= 0 and parameters["compute_us"] > 0 and parameters["batch_size"] >= 1
    assert "energy_j" in parameters and parameters["energy_method"]
    assert agent.infer(timeout=5_000_000)[1]["parameters"]["reason"] == "idle"
    assert agent.infer(timeout=5_000_000, privacy="local-only")[1]["parameters"]["reason"] == "local_only"


def test_metadata_health_and_repository(agent: Any) -> None:
    assert agent.get("/v2")["name"] == "aios-edge"
    extensions = ["binary_tensor_data", "model_repository", "model_repository(unload_dependents)"]
    assert agent.get("/v2")["extensions"] == extensions
    assert agent.get("/v2/health/live") == {"live": True}
    assert agent.get("/v2/health/ready") == {"ready": True}
    metadata = agent.get("/v2/models/tiny")
    assert metadata == agent.get("/v2/models/tiny/versions/1.0.0")
    assert metadata["labels"] == ["negative", "positive"] and metadata["platform"] == "onnx_onnxv1"
    assert {tensor["name"] for tensor in metadata["inputs"]} == {"input_ids", "attention_mask"}
    assert agent.get("/v2/models/tiny/ready")["ready"] is True
    assert post(agent, "/v2/repository/index", b"{}") == (
        200,
        b'[{"name":"tiny","version":"1.0.0","state":"READY","reason":""}]',
    )


def test_tritonclient_binary_and_kserve_agree(agent: Any) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from tritonclient import http as triton

    ids = np.array([[2, 4, 30, 3], [2, 14, 28, 3]], dtype=np.int64)
    mask = np.ones_like(ids)
    client = triton.InferenceServerClient(agent.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    inputs = []
    for name, array in (("input_ids", ids), ("attention_mask", mask)):
        inputs.append(triton.InferInput(name, list(array.shape), "INT64"))
        inputs[-1].set_data_from_numpy(array, binary_data=True)
    wanted = [triton.InferRequestedOutput("logits", binary_data=True)]
    binary = client.infer("tiny", inputs, outputs=wanted, request_id="9", timeout=5_000_000)
    assert binary.get_response()["id"] == "9"
    packed = client.infer("tiny", inputs, outputs=wanted, request_compression_algorithm="gzip")
    assert np.array_equal(packed.as_numpy("logits"), binary.as_numpy("logits"))
    client.close()

    async def ask() -> Any:
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await rest.is_server_ready(agent.url) and await rest.is_model_ready(agent.url, "tiny")
        request = InferRequest(
            model_name="tiny",
            infer_inputs=[
                InferInput("input_ids", [2, 4], "INT64", ids.tolist()),
                InferInput("attention_mask", [2, 4], "INT64", mask.tolist()),
            ],
        )
        answer = await rest.infer(agent.url, request, model_name="tiny")
        await rest.close()
        return answer

    answer = asyncio.run(ask())
    logits = next(output for output in answer.outputs if output.name == "logits").as_numpy()
    np.testing.assert_allclose(binary.as_numpy("logits"), logits, atol=1e-6)
    assert binary.as_numpy("logits").argmax(1).tolist() == [1, 0]


def test_the_unix_socket_answers_and_belongs_to_owner_and_group(agent: Any) -> None:
    assert stat.S_IMODE(agent.socket_path.stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(agent.socket_path))
        body = json.dumps(BODY).encode()
        lines = ("POST /v2/models/tiny/infer HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}")
        sock.sendall("\r\n".join((*lines, "", "")).encode() + body)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and b'"positive"' in answer


@pytest.mark.parametrize(
    ("path", "body", "headers", "method", "expected"),
    [
        ("/v2/models/tiny/infer", b"", {}, "POST", 400),
        ("/v2/models/tiny/infer", b"{", {}, "POST", 400),
        ("/v2/models/tiny/infer", b'{"inputs": []}', {}, "POST", 400),
        ("/v2/models/tiny/infer", b'{"inputs": 5}', {}, "POST", 400),
        ("/v2/models/tiny/infer", b"\xff\xfe", {}, "POST", 400),
        ("/v2/models/tiny/infer", b"[" * 100_000, {}, "POST", 400),
        (
            "/v2/models/tiny/infer",
            b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[2],"data":["x"]}]}',
            {},
            "POST",
            400,
        ),
        (
            "/v2/models/tiny/infer",
            b'{"inputs":[{"name":"text","datatype":"FP32","shape":[1],"data":[1]}]}',
            {},
            "POST",
            400,
        ),
        (
            "/v2/models/tiny/infer",
            b'{"inputs":[{"name":"who","datatype":"FP32","shape":[1],"data":[1]}]}',
            {},
            "POST",
            400,
        ),
        (
            "/v2/models/tiny/infer",
            b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
            {},
            "POST",
            400,
        ),
        ("/v2/models/tiny/infer", json.dumps({**BODY, "parameters": {"timeout": -1}}).encode(), {}, "POST", 400),
        ("/v2/models/tiny/infer", json.dumps({**BODY, "parameters": {"privacy": "x"}}).encode(), {}, "POST", 400),
        ("/v2/models/tiny/infer", b"{}", {"Inference-Header-Content-Length": "99"}, "POST", 400),
        ("/v2/models/tiny/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, "POST", 400),
        ("/v2/models/tiny/infer", b"{}", {"Content-Encoding": "br"}, "POST", 415),
        ("/v2/models/tiny/infer", b"{}", {"Content-Encoding": "gzip, gzip"}, "POST", 415),
        ("/v2/models/tiny/infer", b"{}", {"Content-Encoding": "gzip"}, "POST", 400),
        ("/v2/models/tiny/infer", gzip.compress(bytes(40_000_000)), {"Content-Encoding": "gzip"}, "POST", 413),
        ("/v2/models/tiny/infer", b"x" * 2_000_001, {}, "POST", 413),
        ("/v2/models/tiny/infer", tensors([0, 3], [1, 3]), {}, "POST", 400),
        ("/v2/models/tiny/infer", tensors([1, 0], [1, 0]), {}, "POST", 400),
        ("/v2/models/tiny/infer", tensors([1, 3], [1, 1]), {}, "POST", 400),
        ("/v2/models/tiny/infer", json.dumps(texts(4097)).encode(), {}, "POST", 413),
        ("/v2/models/nobody/infer", b"{}", {}, "POST", 404),
        ("/v2/models/tiny/versions/9/infer", b"{}", {}, "POST", 404),
        ("/v2/models/tiny/infer", None, {}, "GET", 405),
        ("/v2/health/live", b"", {}, "POST", 405),
        ("/v2/models/tiny/nothing", None, {}, "GET", 404),
        ("/nothing", None, {}, "GET", 404),
    ],
)
def test_what_is_not_the_protocol_is_answered_with_an_error(
    agent: Any, path: str, body: bytes | None, headers: dict[str, str], method: str, expected: int
) -> None:
    status, answer = post(agent, path, body, headers, method)  # type: ignore[arg-type]
    assert status == expected, answer
    assert json.loads(answer)["error"]
    assert agent.infer()[0] == 200


def raw(agent: Any, data: bytes, *, chunks: int = 0) -> bytes:
    host, port = agent.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        answer = b""
        try:
            sock.sendall(data)
            for _ in range(chunks):
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # refused while we were still sending
        try:
            while data := sock.recv(65536):
                answer += data
        except OSError:
            pass
        return answer


def test_hostile_bytes_end_in_an_error_and_not_in_the_agent(agent: Any) -> None:
    start = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
    announced = raw(agent, start + b"Content-Length: 104857600\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413"), announced[:80]
    chunked = raw(agent, start + b"Transfer-Encoding: chunked\r\n\r\n", chunks=1600)  # 100 MB, if it were read
    assert chunked.startswith(b"HTTP/1.1 413"), chunked[:80]
    for junk in (
        b"\x16\x03\x01\x00\xa5\r\n\r\n",
        start + b"Content-Length: x\r\n\r\n",
        start + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n",
    ):
        answer = raw(agent, junk)
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert agent.infer()[0] == 200
    assert agent.status()["in_flight_bytes"] == 0
    assert "Traceback" not in agent.log()


@pytest.mark.parametrize("whole", [1, 3])
@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x00\xa5\r\n\r\n",
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n",
    ],
)
def test_whole_requests_before_what_is_no_http_are_answered_first(agent: Any, junk: bytes, whole: int) -> None:
    body = json.dumps(BODY).encode()
    request = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    answer = raw(agent, request * whole + junk + request)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200"] * whole + [b"400"], answer
    assert answer.count(b'"positive"') == whole
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
    assert agent.status()["in_flight_bytes"] == 0 and "Traceback" not in agent.log()


@pytest.mark.parametrize("shape", ["one header", "many headers", "url"])
def test_a_head_without_end_is_refused_before_it_fills_the_memory(agent: Any, shape: str) -> None:
    head = {
        "one header": b"GET /v2 HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n",
        "many headers": b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 500_000 + b"\r\n",
        "url": b"GET /" + b"a" * 3_000_000 + b" HTTP/1.1\r\n\r\n",
    }[shape]
    answer = raw(agent, head)
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), answer[:80]
    assert agent.infer()[0] == 200


@pytest.mark.parametrize("path", ["/v2/models/tiny/infer", "/v2/models/tiny/versions/1.0.0/infer", "/status", "/none"])
def test_who_still_sends_a_body_reads_why_it_is_refused(agent: Any, path: str) -> None:
    body = b"x" * 40_000_000  # more than the sockets of both sides hold
    expected = {"/status": 405, "/none": 404}.get(path, 413)
    status, answer = post(agent, path, body)  # urllib, which asks for the connection to be closed
    assert (status, list(json.loads(answer))) == (expected, ["error"])
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=20)
    connection.request("POST", path, iter([body]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, list(json.loads(response.read()))) == (expected, ["error"])
    connection.close()
    assert agent.infer()[0] == 200


@pytest.mark.parametrize("door", ["http", "unix"])
def test_our_client_says_that_a_body_was_too_long(agent: Any, door: str) -> None:
    url = agent.url if door == "http" else f"unix://{agent.socket_path}"
    with Client(url) as client:
        for _ in range(2):
            with pytest.raises(HttpError, match="longer than 2000000 bytes") as caught:
                client.classify("tiny", ["a" * 40_000_000])
            assert caught.value.status == 413
        assert client.classify("tiny", ["a good film"])[0].label == "positive"


def test_a_refused_client_that_never_ends_is_left_alone_at_last(agent: Any) -> None:
    host, port = agent.url.removeprefix("http://").split(":")
    head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(head)
        sent = 0
        with pytest.raises(OSError):
            while sent < 4 * LINGER_BYTES:
                sent += sock.send(bytes(1 << 20))
    assert sent >= LINGER_BYTES // 2
    assert agent.status()["in_flight_bytes"] == 0


def test_a_refused_client_may_go_on_sending_longer_than_a_connection_is_kept() -> None:
    async def refuse(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def scenario() -> None:
        config = uvicorn.Config(
            refuse, http=DoorProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=0
        )
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 40000000\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
            for _ in range(40):
                writer.write(bytes(1_000_000))
                await writer.drain()
            writer.close()
            await writer.wait_closed()
            server.should_exit = True
            await serving

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_body_that_comes_with_its_head_is_no_head(agent: Any) -> None:
    host, port = agent.url.removeprefix("http://").split(":")
    body = json.dumps({"id": "x" * 150_000, **BODY}).encode()
    request = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection((host, int(port)), timeout=10) as sock, sock.makefile("rb") as answers:
        for _ in range(3):  # one after the other on a kept connection
            sock.sendall(request)
            assert b" 200 " in answers.readline()
            length = 0
            while (line := answers.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            assert json.loads(answers.read(length))["id"] == "x" * 150_000


def test_metrics_parse_as_prometheus_text(agent: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    agent.infer(timeout=5_000_000)
    with urllib.request.urlopen(agent.url + "/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    samples = {
        (sample.labels["route"], sample.labels["reason"]): sample.value
        for sample in families["aios_requests"].samples
        if sample.labels["status"] == "200"
    }
    assert samples["local", "idle"] >= 1
    assert families["aios_request_latency_seconds"].type == "histogram"
    assert families["aios_build_info"].samples[0].labels["profile"] == "x86-gateway"
    for name in (
        "aios_queue_depth",
        "aios_waiting_limit",
        "aios_batch_size",
        "aios_worker_restarts",
        "aios_model_ready",
        "aios_outbox_depth",
    ):
        assert name in families


def test_status_has_what_a_person_asks_first(agent: Any) -> None:
    status = agent.status()
    model = status["models"]["tiny"]
    assert status["state"] == "ready" and status["emulate"] == {"slowdown": 1.0}
    assert model["state"] == "ready" and model["queued"] == 0 and model["running"] == 0
    assert {check["name"] for check in model["activation"]["checks"]} >= {"digest", "golden"}
    assert "CPUExecutionProvider" in model["activation"]["providers_active"]
    stat_line = Path(f"/proc/{model['worker_pid']}/stat").read_text()
    assert int(stat_line.rsplit(")", 1)[1].split()[1]) == agent.process.pid
    listing = subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", "agent", "status", "--url", agent.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "model tiny 1.0.0  ready" in listing.stdout


def test_the_supervisor_maps_neither_numpy_nor_onnxruntime(agent: Any) -> None:
    assert agent.infer()[0] == 200
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "numpy" not in maps and "onnxruntime" not in maps and "tokenizers" not in maps


def test_requests_that_wait_share_batches(agent: Any) -> None:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(agent.infer())) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * 24
