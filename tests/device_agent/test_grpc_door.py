"""The gRPC door of a real agent with a real worker: the protocol's clients, and everything that isn't the protocol."""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_clients import call, refused, told, triton, triton_aio
from quick_constants import UNREHEARSED

from aios_edge.client import Client
from device_agent.grpc_door.messages import METHODS, SERVICE, ModelInferRequest

LIMIT = 2_000_000
GRPC = 'grpc_bind = "127.0.0.1:0"'


@pytest.fixture(scope="module")
def agent(start_agent: Any) -> Iterator[Any]:
    agent = start_agent(http=f"{GRPC}\nmax_body_bytes = {LIMIT}")
    yield agent
    assert agent.stop() == 0
    assert "Traceback" not in agent.log() and "never retrieved" not in agent.log()


@pytest.fixture
def channel(agent: Any) -> Iterator[Any]:
    with grpc.insecure_channel(agent.grpc) as channel:
        yield channel


def text_input(texts: list[str]) -> Any:
    given = triton.InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_))
    return given


def request(texts: list[str], **parameters: Any) -> Any:
    """A typed request for the tiny model."""
    asked = ModelInferRequest(model_name="tiny", id="7")
    asked.inputs.add(name="text", datatype="BYTES", shape=[len(texts)]).contents.bytes_contents.extend(
        text.encode() for text in texts
    )
    for name, value in parameters.items():
        kind = {bool: "bool", int: "int64", str: "string", float: "double"}[type(value)]
        setattr(asked.parameters[name], f"{kind}_param", value)
    return asked


def of(parameters: Any) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}


def test_tritonclient_finds_its_way(agent: Any) -> None:
    with triton.InferenceServerClient(agent.grpc) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny", "1.0.0")
        server = client.get_server_metadata()
        assert (server.name, server.extensions[0]) == ("aios-edge", "binary_tensor_data")
        metadata = client.get_model_metadata("tiny", as_json=True)
        assert metadata["versions"] == ["1.0.0"] and metadata["platform"] == "onnx_onnxv1"
        assert metadata["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": ["-1", "-1"]}
        index = client.get_model_repository_index(as_json=True)
        assert index == {"models": [{"name": "tiny", "version": "1.0.0", "state": "READY"}]}
        given = text_input(["a good film", "a bad plot"])
        wanted = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("probabilities")]
        answer = client.infer("tiny", [given], request_id="9", outputs=wanted, priority=3, timeout=5_000_000)
        assert answer.as_numpy("label").tolist() == [b"positive", b"negative"]
        assert answer.as_numpy("probabilities").shape == (2, 2) and answer.as_numpy("score") is None
        response = answer.get_response()
        assert (response.id, response.model_name, response.model_version) == ("9", "tiny", "1.0.0")
        told_us = of(response.parameters)
        assert told_us["route"] == "local" and told_us["reason"] == "idle" and told_us["batch_size"] == 1
        assert told_us["queue_us"] >= 0 and told_us["compute_us"] > 0 and told_us["energy_method"]
        packed = client.infer("tiny", [given], outputs=wanted, compression_algorithm="gzip")
        assert packed.as_numpy("label").tolist() == [b"positive", b"negative"]
        assert of(packed.get_response().parameters)["reason"] == "no_deadline", "neither parameter nor call has one"
        held: queue.Queue[Any] = queue.Queue()
        client.async_infer("tiny", [given], lambda result, error: held.put((result, error)))
        result, error = held.get(timeout=30)
        assert error is None and result.as_numpy("label").tolist() == [b"positive", b"negative"]


def test_tritonclient_loads_and_unloads(agent: Any) -> None:
    with triton.InferenceServerClient(agent.grpc) as client:
        client.unload_model("tiny")
        assert not client.is_model_ready("tiny")
        with pytest.raises(triton.InferenceServerException, match="unloaded") as caught:
            client.infer("tiny", [text_input(["a good film"])])
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        index = client.get_model_repository_index(as_json=True)["models"]
        assert [(model["state"], model["reason"]) for model in index] == [("UNAVAILABLE", "unloaded")]
        with pytest.raises(triton.InferenceServerException, match="not available"):
            client.load_model("tiny", config='{"a": 1}')
        client.load_model("tiny")
        assert client.is_model_ready("tiny")


def test_an_index_of_what_is_ready_and_kserves_way_to_load(channel: Any) -> None:
    unload, load = METHODS["RepositoryModelUnload"][0], METHODS["RepositoryModelLoad"][0]
    done = call(channel, "RepositoryModelUnload", unload(repository_name="tiny"))  # the first field is KServe's model
    assert done.isUnloaded and done.model_name == "tiny"
    index = METHODS["RepositoryIndex"][0]
    assert len(call(channel, "RepositoryIndex", index()).models) == 1
    assert len(call(channel, "RepositoryIndex", index(ready=True)).models) == 0
    assert call(channel, "RepositoryModelLoad", load(model_name="tiny")).isLoaded
    assert len(call(channel, "RepositoryIndex", index(ready=True)).models) == 1
    for method, asked in (
        ("RepositoryIndex", index(repository_name="x")),
        ("RepositoryModelLoad", load(model_name="no")),
    ):
        assert refused(channel, method, asked).code() is grpc.StatusCode.NOT_FOUND


def test_a_load_is_done_whoever_goes_away(agent: Any, channel: Any) -> None:
    asked = METHODS["RepositoryModelLoad"][0](model_name="tiny")
    call(channel, "RepositoryModelUnload", METHODS["RepositoryModelUnload"][0](model_name="tiny"))
    loading = channel.unary_unary(f"/{SERVICE}/RepositoryModelLoad").future(asked.SerializeToString())
    agent.until(lambda status: status["grpc"]["in_flight"])
    loading.cancel()
    agent.until(lambda status: not status["grpc"]["in_flight"])
    agent.until(lambda status: status["models"].get("tiny", {}).get("state") == "ready")


def test_metadata_has_labels_and_natural_tensors(channel: Any) -> None:
    metadata = call(channel, "ModelMetadata", METHODS["ModelMetadata"][0](name="tiny"))
    found = {name: json.loads(value) for name, value in metadata.properties.items()}
    assert found["labels"] == ["negative", "positive"] and found["natural_inputs"][0]["name"] == "text"


def test_tritonclient_with_asyncio_and_its_streams(agent: Any) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(agent.grpc) as client:
            assert await client.is_server_ready() and await client.is_model_ready("tiny")
            answers = await asyncio.gather(
                *(client.infer("tiny", [text_input(["a good film"])], request_id=str(index)) for index in range(20))
            )
            assert [answer.get_response().id for answer in answers] == [str(index) for index in range(20)]

            async def requests() -> Any:
                for index in range(100):
                    texts = ["a good film"] if index % 3 else ["a bad plot", "a good film"]
                    yield {"model_name": "tiny", "inputs": [text_input(texts)], "request_id": str(index)}

            index = 0
            async for answer, error in client.stream_infer(requests()):
                assert error is None and answer.get_response().id == str(index), "in the order they were sent"
                assert len(answer.as_numpy("label")) == (1 if index % 3 else 2)
                index += 1
            assert index == 100

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_stream_goes_on_after_a_request_that_failed(agent: Any) -> None:
    held: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(agent.grpc) as client:
        client.start_stream(lambda result, error: held.put((result, error)))
        client.async_stream_infer("nobody", [text_input(["x"])])
        client.async_stream_infer("tiny", [text_input(["a good film"])])
        result, error = held.get(timeout=30)
        assert result is None and "there is no model 'nobody'" in error.message()
        result, error = held.get(timeout=30)
        assert error is None and result.as_numpy("label").tolist() == [b"positive"]
        client.stop_stream()


def test_kserves_client_asks_raw_and_typed(agent: Any) -> None:
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    async def ask() -> None:
        async with InferenceGRPCClient(agent.grpc) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready("tiny")
            ids = np.array([[2, 4, 30, 3], [2, 14, 28, 3]], dtype=np.int64)
            for binary in (True, False):
                inputs = [InferInput(name, [2, 4], "INT64") for name in ("input_ids", "attention_mask")]
                inputs[0].set_data_from_numpy(ids, binary_data=binary)
                inputs[1].set_data_from_numpy(np.ones_like(ids), binary_data=binary)
                answer = await client.infer(InferRequest("tiny", inputs, request_id="4"))
                assert answer.id == "4" and answer.parameters["route"].string_param == "local"
                assert answer.outputs[0].as_numpy().argmax(1).tolist() == [1, 0]
            text = InferInput("text", [1], "BYTES", ["a good film"])
            answer = await client.infer(InferRequest("tiny", [text], parameters={"privacy": "local-only"}))
            assert answer.outputs[0].as_numpy().tolist() in ([b"positive"], ["positive"])

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_the_same_answer_at_every_door(agent: Any) -> None:
    words = ["good", "bad", "great", "awful", "film", "the", "plot", "dull", "superb", "was", "ünbekannt", "日本"]
    texts = [" ".join(words[(index * 7 + k * 3) % len(words)] for k in range(1 + index % 25)) for index in range(520)]
    found: dict[str, list[Any]] = {"json": [], "binary": [], "raw": [], "typed": []}
    shape = {"name": "text", "datatype": "BYTES", "shape": [1]}
    with Client(agent.url) as rest, grpc.insecure_channel(agent.grpc) as channel:
        binary_client = triton.InferenceServerClient(agent.grpc)
        for text in texts:
            document = json.loads(agent_post(agent, {"inputs": [{**shape, "data": [text]}]}))
            values = {output["name"]: output["data"] for output in document["outputs"]}
            probabilities = np.array(values["probabilities"], dtype=np.float32)
            found["json"].append((values["label"][0], probabilities.tobytes()))
            given = np.array([text.encode()], dtype=np.object_)
            answer = rest.infer("tiny", {"text": given}).outputs
            found["binary"].append((answer["label"][0].decode(), answer["probabilities"].tobytes()))
            result = binary_client.infer("tiny", [text_input([text])])
            found["raw"].append((result.as_numpy("label")[0].decode(), result.as_numpy("probabilities").tobytes()))
            outputs = {output.name: output for output in call(channel, "ModelInfer", request([text])).outputs}
            typed = np.array(outputs["probabilities"].contents.fp32_contents, dtype=np.float32).tobytes()
            found["typed"].append((outputs["label"].contents.bytes_contents[0].decode(), typed))
        binary_client.close()
    assert len({label for label, _ in found["json"]}) == 2
    assert found["json"] == found["binary"] == found["raw"] == found["typed"]


def agent_post(agent: Any, body: Any) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"{agent.url}/v2/models/tiny/infer", json.dumps(body).encode(), timeout=30) as response:
        content: bytes = response.read()
    return content


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model_name": "nobody"}, "NOT_FOUND", "there is no model 'nobody'"),
        ({"model_name": ""}, "NOT_FOUND", "there is no model ''"),
        ({"model_version": "9"}, "NOT_FOUND", "has no version '9'"),
        ({"inputs": []}, "INVALID_ARGUMENT", "input"),
    ],
)
def test_what_cannot_be_answered_says_why(channel: Any, change: dict[str, Any], code: str, words: str) -> None:
    asked = request(["a good film"])
    for name, value in change.items():
        if value == []:
            asked.ClearField(name)
        else:
            setattr(asked, name, value)
    error = refused(channel, "ModelInfer", asked)
    assert error.code() is grpc.StatusCode[code] and words in error.details()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"timeout": -1}, "parameters.timeout"),
        ({"timeout": "soon"}, "parameters.timeout"),
        ({"priority": 0.5}, "parameters.priority"),
        ({"privacy": "please"}, "parameters.privacy"),
        ({"timout": 5}, "Did you mean 'timeout'"),
        ({"binary_data_output": "yes"}, "binary_data_output"),
    ],
)
def test_parameters_are_read_as_at_the_other_doors(channel: Any, parameters: dict[str, Any], words: str) -> None:
    error = refused(channel, "ModelInfer", request(["a good film"], **parameters))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and words in error.details()


def test_what_the_worker_refuses_comes_back_as_such(channel: Any) -> None:
    asked = request(["a good film"])
    asked.inputs[0].name = "texts"
    assert refused(channel, "ModelInfer", asked).code() is grpc.StatusCode.INVALID_ARGUMENT
    asked = request(["a good film"])
    asked.outputs.add(name="nothing")
    assert "there is no such output" in refused(channel, "ModelInfer", asked).details()
    asked = request(["a good film"])
    asked.raw_input_contents.append(b"\x05\0\0\0ab")
    asked.inputs[0].ClearField("contents")
    assert "longer than the data" in refused(channel, "ModelInfer", asked).details()
    shared = request(["a good film"])
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert "shared memory isn't supported" in refused(channel, "ModelInfer", shared).details()


def test_messages_that_are_none(channel: Any) -> None:
    for data in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x1f\x8b\x08\0", b'{"inputs": []}', b"\x0a\x02\xff\xfe"):
        error = refused(channel, "ModelInfer", data=data)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, data
    for path in (f"/{SERVICE}/ModelConfig", "/other.Service/ModelInfer", "/x"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:  # a stream without a message where one is due
        channel.stream_unary(f"/{SERVICE}/ModelInfer")(iter(()), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert call(channel, "ServerLive").live


def test_long_errors_arrive(channel: Any) -> None:
    error = refused(channel, "ModelInfer", ModelInferRequest(model_name="ü" * 100_000))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "there is no model" in error.details()


def test_a_message_that_is_too_long_costs_no_memory(agent: Any) -> None:
    """What a connection may have on its way stays; the message doesn't come in."""
    Path(f"/proc/{agent.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    before = memory_bytes(agent, "VmRSS")
    with grpc.insecure_channel(agent.grpc, (("grpc.max_send_message_length", -1),)) as channel:
        for _ in range(10):
            assert refused(channel, "ModelInfer", data=b"x" * (LIMIT + 1)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = refused(channel, "ModelInfer", data=b"x" * 200_000_000)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.details()
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            packed = request(["x" * (LIMIT - 1000)])
            found = call(channel, "ModelInfer", packed, compression=compression)
            assert len(found.outputs) == 3
            error = refused(channel, "ModelInfer", data=b"x" * 200_000_000, compression=compression)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.details()
        assert call(channel, "ServerReady").ready
    assert memory_bytes(agent, "VmHWM") - before < 100_000_000


def memory_bytes(agent: Any, which: str) -> int:
    lines = Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) * 1000


def test_bytes_that_are_no_http2_end_their_own_connection_only(agent: Any, channel: Any) -> None:
    host, port = agent.grpc.split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for data in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 1000,
        preface + b"\xff" * 200,
        preface + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\5\1\4\0\0\0\1" + b"\xff\xff\xff\xff\xff",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    half = socket.create_connection((host, int(port)), timeout=30)
    half.sendall(preface[:10])
    assert call(channel, "ModelInfer", request(["a good film"])).outputs[0].contents.bytes_contents[0] == b"positive"
    half.close()


def test_a_connection_that_says_nothing_is_closed(start_agent: Any) -> None:
    agent = start_agent(http=f"{GRPC}\nreceive_timeout_s = 1.0")
    host, port = agent.grpc.split(":")
    for start in (b"", b"PRI * HTTP/2.0"):
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(start)
            while sock.recv(65536):  # it introduces itself, and ends
                pass
    code = (
        f"import grpc, threading; channel = grpc.insecure_channel('{agent.grpc}')\n"
        f"stub = channel.stream_stream('/{SERVICE}/ModelStreamInfer')\n"
        "list(stub(iter(lambda: threading.Event().wait(), None)))"
    )
    client = subprocess.Popen([sys.executable, "-c", code])
    agent.until(lambda status: status["grpc"]["in_flight"] == 1)
    client.send_signal(signal.SIGSTOP)  # its kernel is there, the client answers no more
    agent.until(lambda status: status["grpc"]["in_flight"] == 0, 30.0)
    client.kill()
    client.wait()
    assert agent.stop() == 0


def test_more_rows_than_allowed_are_refused_for_good(channel: Any) -> None:
    error = refused(channel, "ModelInfer", request(["x"] * 5000))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_rows" in error.details()
    assert told(error)["grpc-retry-pushback-ms"] == "-1"


def test_the_status_has_the_door(agent: Any, channel: Any) -> None:
    status = agent.status()
    address = f"grpc://{agent.grpc}"
    assert status["grpc"] == {"address": address, "serving": True, "in_flight": 0} and address in status["listen"]
    command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "status", "--url", agent.url]
    told_by = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{address}  serving  0 calls" in told_by.stdout
    call(channel, "ModelInfer", request(["a good film"], timeout=5_000_000))
    assert agent.status()["totals"]["local"] == status["totals"]["local"] + 1, "counted like any other"


@pytest.fixture(scope="module")
def slow(start_agent: Any, small_batches: Path) -> Iterator[Any]:
    """One request at a time, held for long: what waits can be seen."""
    more = "[policy]\nqueue_limit = 2\ndrain_s = 1.0\n[emulate]\nslowdown = 600.0\n"
    agent = start_agent(more, bundle=small_batches, http=GRPC, constants=UNREHEARSED)
    yield agent
    agent.process.kill()


def test_who_goes_away_leaves_the_queue(slow: Any) -> None:
    with grpc.insecure_channel(slow.grpc) as channel:
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        calls = [stub.future(request(["a good film"]).SerializeToString()) for _ in range(3)]
        slow.until(lambda status: status["models"]["tiny"]["queued"] == 2)
        assert slow.status()["grpc"]["in_flight"] == 3
        full = refused(channel, "ModelInfer", request(["a good film"]))
        assert full.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "[queue_full]" in full.details()
        assert told(full)["aios-reason"] == "queue_full" and int(told(full)["grpc-retry-pushback-ms"]) > 0
        before = slow.status()["totals"].get("local", 0)
        for each in calls:
            each.cancel()
        slow.until(lambda status: not status["models"]["tiny"]["queued"] and not status["grpc"]["in_flight"])
        assert slow.status()["in_flight"] == 0 and slow.status()["totals"].get("local", 0) == before, (
            "none was answered"
        )


def test_a_stream_that_goes_away_leaves_nothing(slow: Any) -> None:
    slow.until(lambda status: not status["models"]["tiny"]["running"], 60.0)
    go_on = threading.Event()

    def requests() -> Any:
        for _ in range(3):
            yield request(["a good film"]).SerializeToString()
        go_on.wait(30)

    with grpc.insecure_channel(slow.grpc) as channel:
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(requests())
        slow.until(lambda status: status["models"]["tiny"]["queued"] == 2)
        before = slow.status()["totals"].get("local", 0)
        stream.cancel()
        go_on.set()
        slow.until(lambda status: not status["models"]["tiny"]["queued"] and not status["grpc"]["in_flight"])
        assert slow.status()["in_flight"] == 0 and slow.status()["totals"].get("local", 0) == before, (
            "none was answered"
        )


def test_the_calls_deadline_is_the_requests(slow: Any) -> None:
    slow.until(lambda status: not status["models"]["tiny"]["running"], 60.0)
    with grpc.insecure_channel(slow.grpc) as channel:
        reason = refused(channel, "ModelInfer", request(["a good film"]), timeout=0.005)
        assert reason.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        running = stub.future(request(["a good film"] * 30).SerializeToString())
        slow.until(lambda status: status["models"]["tiny"]["running"])
        shed = refused(channel, "ModelInfer", request(["a good film"]), timeout=0.2)
        running.cancel()
    # Predicted late, and no cloud: told at once, with the reason, long before the client gives up.
    assert shed.code() is grpc.StatusCode.UNAVAILABLE and told(shed)["aios-reason"] == "cloud_unavailable"


def test_a_stop_answers_and_ends_streams(start_agent: Any) -> None:
    agent = start_agent("[policy]\ndrain_s = 15.0", http=GRPC)
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(agent.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("tiny", [text_input(["a good film"])])
        assert answers.get(timeout=30)[1] is None
        began = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - began < 10.0, "an idle stream doesn't hold up the end"
        result, error = answers.get(timeout=30)
        assert result is None and "stopping" in error.message() and error.status() == "StatusCode.UNAVAILABLE"
    assert "Traceback" not in agent.log()


def test_a_busy_port_is_said_and_nothing_is_started(start_agent: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent = start_agent(http=f'grpc_bind = "127.0.0.1:{port}"', wait=False)
        assert agent.process.wait(30) == 1
    assert f"http.grpc_bind: port {port} on 127.0.0.1 is in use" in agent.log() and "Traceback" not in agent.log()
    agent = start_agent(http='grpc_bind = "203.0.113.9:1"\nallow_insecure = true', wait=False)
    assert agent.process.wait(30) == 1
    assert "http.grpc_bind: 203.0.113.9:1 can't be bound" in agent.log()


def test_without_the_setting_nothing_of_grpc_is_loaded(start_agent: Any, agent: Any) -> None:
    plain = start_agent()
    assert plain.status()["grpc"] is None
    maps = Path(f"/proc/{plain.process.pid}/maps").read_text()
    assert "cygrpc" not in maps and "_upb" not in maps
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "cygrpc" in maps and "numpy" not in maps and "onnxruntime" not in maps
