"""One question, one answer, whichever door it comes through: 500 sentences through each of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.cli.demo.processes import AgentProcess, free_port
from aios_edge.client import Client

COUNT = 500
MODEL = "tiny"
BATCH = 20


@pytest.fixture(scope="module")
def sentences(words: tuple[str, ...]) -> list[str]:
    """Sentences of many lengths, with accents, symbols and words the tokenizer doesn't know."""
    random = np.random.default_rng(5)
    return [" ".join(random.choice(words, size=random.integers(1, 40))) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def agents(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Urls: ``http``, ``unix`` and ``grpc`` of an agent, and ``late``, ``late_grpc``: a device so slow that deadlines
    send it to the cloud."""
    folder = tmp_path_factory.mktemp("doors")

    def config(name: str, port: int, more: str) -> str:
        return (
            f'[device]\nid = "{name}"\nprofile = "{tiny_bundle.manifest.profile}"\n'
            f'state_dir = "{folder / name / "state"}"\n[http]\nbind = "127.0.0.1:{port}"\n{more}\n'
            f'[[bundle]]\npath = "{tiny_bundle.path}"\n'
        )

    with ExitStack() as running, tempfile.TemporaryDirectory() as short:  # a Unix socket's path has 107 bytes
        socket = Path(short) / "agent.sock"
        port, late_port, grpc_port, late_grpc_port = (free_port() for _ in range(4))
        url, late_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{late_port}"
        grpc, late_grpc = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{late_grpc_port}"
        doors = f'unix_socket = "{socket}"\ngrpc_bind = "{grpc}"'
        first = AgentProcess(url, config("first", port, doors), folder / "first")
        running.enter_context(first)
        cloud = f'grpc_bind = "{late_grpc}"\n[[cloud]]\nname = "cloud"\nurl = "{url}"\n[emulate]\nslowdown = 1000.0'
        running.enter_context(AgentProcess(late_url, config("late", late_port, cloud), folder / "late"))
        yield {"http": url, "unix": f"unix://{socket}", "late": late_url, "grpc": grpc, "late_grpc": late_grpc}


@pytest.fixture(scope="module")
def expected(
    tiny_bundle: Any, sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, float]]:
    """What ``aios-edge infer`` says."""
    path = tmp_path_factory.mktemp("infer") / "sentences.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", "infer", str(tiny_bundle.path), "--file", str(path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [answer["input"] for answer in answers] == sentences
    return [(answer["label"], answer["score"]) for answer in answers]


def agree(got: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert len(got) == COUNT
    assert [label for label, _ in got] == [label for label, _ in expected]
    assert np.allclose([score for _, score in got], [score for _, score in expected], atol=1e-5)


@pytest.mark.parametrize("door", ["http", "unix"])
def test_our_client(door: str, agents: dict[str, str], sentences: list[str], expected: list[tuple[str, float]]) -> None:
    client = Client(agents[door])
    answers = [client.classify(MODEL, [text])[0] for text in sentences]
    assert {answer.route for answer in answers} == {"local"}
    agree([(answer.label, answer.score) for answer in answers], expected)


def test_the_cloud_route(agents: dict[str, str], sentences: list[str], expected: list[tuple[str, float]]) -> None:
    client = Client(agents["late"], timeout_s=60.0)
    client.classify(MODEL, sentences[:1])  # now the device knows how slow it is
    answers = [client.classify(MODEL, [text], deadline_s=0.2)[0] for text in sentences]
    assert {answer.route for answer in answers} == {"cloud"}
    assert {answer.reason for answer in answers} == {"predicted_late"}
    agree([(answer.label, answer.score) for answer in answers], expected)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("door", ["grpc", "late_grpc"])
def test_grpc_here_and_from_the_cloud(
    door: str, raw: bool, agents: dict[str, str], sentences: list[str], expected: list[tuple[str, float]]
) -> None:
    import grpc

    from device_agent.grpc_door.messages import METHODS, SERVICE

    takes, gives = METHODS["ModelInfer"]
    got: list[tuple[str, float]] = []
    routes = set()
    with grpc.insecure_channel(agents[door]) as channel:
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer", takes.SerializeToString, gives.FromString)
        for index, text in enumerate([sentences[0], *sentences]):
            request = takes(model_name=MODEL)
            given = request.inputs.add(name="text", datatype="BYTES", shape=[1])
            data = text.encode()
            if raw:
                request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
            else:
                given.contents.bytes_contents.append(data)
            for name in ("label", "score"):
                request.outputs.add(name=name)
            if index == 0:  # now the device knows how slow it is
                stub(request, timeout=60)
                continue
            answer = stub(request, timeout=0.2 if door == "late_grpc" else 60)
            routes.add(answer.parameters["route"].string_param)
            if raw:
                label, score = answer.raw_output_contents
                got.append((label[4:].decode(), float(np.frombuffer(score, "<f4")[0])))
            else:
                label, score = (output.contents for output in answer.outputs)
                got.append((label.bytes_contents[0].decode(), score.fp32_contents[0]))
    assert routes == {"cloud" if door == "late_grpc" else "local"}
    agree(got, expected)


def test_tritonclient_in_binary(
    agents: dict[str, str], sentences: list[str], expected: list[tuple[str, float]]
) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(agents["http"].removeprefix("http://"))
    got: list[tuple[str, float]] = []
    for start in range(0, COUNT, BATCH):
        texts = np.array([text.encode() for text in sentences[start : start + BATCH]], dtype=np.object_)
        tensor = InferInput("text", [len(texts)], "BYTES")
        tensor.set_data_from_numpy(texts, binary_data=True)
        wanted = [InferRequestedOutput(name, binary_data=True) for name in ("label", "score")]
        result = client.infer(MODEL, [tensor], outputs=wanted)
        labels = [label.decode() for label in result.as_numpy("label").reshape(-1)]
        got += zip(labels, result.as_numpy("score").reshape(-1).tolist(), strict=True)
    client.close()
    agree(got, expected)


def test_kserve_client(agents: dict[str, str], sentences: list[str], expected: list[tuple[str, float]]) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    async def ask() -> list[tuple[str, float]]:
        client = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await client.is_server_live(agents["http"])
        assert await client.is_server_ready(agents["http"])
        assert await client.is_model_ready(agents["http"], MODEL)
        got: list[tuple[str, float]] = []
        for start in range(0, COUNT, BATCH):
            texts = sentences[start : start + BATCH]
            request = InferRequest(MODEL, [InferInput("text", [len(texts)], "BYTES", data=texts)])
            response = await client.infer(agents["http"], request, model_name=MODEL)
            outputs = {output.name: output.data for output in response.outputs}
            got += zip(outputs["label"], outputs["score"], strict=True)
        return got

    agree(asyncio.run(ask()), expected)
