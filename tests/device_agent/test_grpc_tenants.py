"""Tenants and TLS at the gRPC door: the rules of the HTTP door, and limits that the two share."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import self_signed
from grpc_clients import call, refused, told, triton
from quick_constants import UNREHEARSED

from device_agent.grpc_door.messages import METHODS, SERVICE, ModelInferRequest
from device_agent.tenants import key_sha256, new_key

KEYS = {name: new_key() for name in ("shop", "lab", "root", "slow", "little")}
GRPC = 'grpc_bind = "127.0.0.1:0"'


def tenant(name: str, more: str = "") -> str:
    return f'[[tenant]]\nid = "{name}"\nkey_sha256 = "{key_sha256(KEYS[name])}"\n{more}\n'


@pytest.fixture(scope="module")
def agent(start_agent: Any, make_bundle: Any) -> Iterator[Any]:
    """Models ``tiny`` and ``secret``; ``shop`` has the first, ``lab`` the second, ``root`` is an admin."""
    agent = start_agent(
        f'[[bundle]]\npath = "{make_bundle(name="secret").path}"\n'
        + tenant("shop", 'models = ["tiny"]\npriority_ceiling = 5')
        + tenant("lab", 'models = ["secret"]')
        + tenant("root", "admin = true")
        + tenant("slow", 'models = ["tiny"]\nrequests_per_s = 0.001\nburst = 4')
        + tenant("little", 'models = ["tiny"]\nbytes_per_day = 300'),
        http=f"{GRPC}\nmax_body_bytes = 1000000",
    )
    yield agent
    assert agent.stop() == 0
    log = agent.log()
    assert "Traceback" not in log and not any(key in log for key in KEYS.values())


@pytest.fixture
def channel(agent: Any) -> Iterator[Any]:
    with grpc.insecure_channel(agent.grpc) as channel:
        yield channel


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS.get(name, name)}"),)


def request(model: str = "tiny", text: str = "a good film", **integers: int) -> Any:
    asked = ModelInferRequest(model_name=model, id="q1")
    asked.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    for name, value in integers.items():
        asked.parameters[name].int64_param = value
    return asked


def over_http(agent: Any, path: str, name: str) -> Any:
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=20)
    connection.request("GET", path, headers={"Authorization": f"Bearer {KEYS[name]}"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


OPEN = ("ServerLive", "ServerReady")


@pytest.mark.parametrize("method", [*METHODS, "Unknown", "modelinfer", "ServerLive/x", ""])
def test_without_a_key_nothing_but_health_answers(channel: Any, method: str) -> None:
    almost = ["", "Bearer", "Bearer x", f"Basic {KEYS['shop']}", KEYS["shop"], f"Bearer {KEYS['shop']}x"]
    for metadata in ((), *((("authorization", value),) for value in almost), bearer("shop") + bearer("shop")):
        if method in OPEN:
            assert call(channel, method, metadata=metadata)
            continue
        error = refused(channel, method, data=b"", metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, (method, metadata)
        assert "authorization: Bearer KEY" in error.details() and KEYS["shop"] not in error.details()


def test_strangers_are_counted_and_refused_before_they_have_sent_anything(agent: Any, channel: Any) -> None:
    never = threading.Event()

    def nothing_yet() -> Any:
        never.wait(60)
        yield b""

    before = strangers(agent)
    for method in ("ModelInfer", "ModelStreamInfer"):
        stub = channel.stream_stream(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(nothing_yet(), timeout=30))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    never.set()
    assert strangers(agent) == before + 2


def strangers(agent: Any) -> float:
    page = over_http(agent, "/metrics", "root")[1].decode()
    return float(next(line for line in page.splitlines() if line.startswith("aios_unauthorized_total ")).split()[1])


def test_every_tenant_asks_its_own_models(channel: Any) -> None:
    metadata, ready, index = (METHODS[name][0] for name in ("ModelMetadata", "ModelReady", "RepositoryIndex"))
    for name, model in (("shop", "tiny"), ("lab", "secret"), ("root", "tiny"), ("root", "secret")):
        answer = call(channel, "ModelInfer", request(model), metadata=bearer(name))
        assert answer.model_name == model and answer.id == "q1"
        assert call(channel, "ModelMetadata", metadata(name=model), metadata=bearer(name)).name == model
        assert call(channel, "ModelReady", ready(name=model), metadata=bearer(name)).ready
    seen = {
        name: [model.name for model in call(channel, "RepositoryIndex", index(), metadata=bearer(name)).models]
        for name in ("shop", "lab", "root")
    }
    assert seen == {"shop": ["tiny"], "lab": ["secret"], "root": ["tiny", "secret"]}


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ModelReady", "ModelStreamInfer"])
@pytest.mark.parametrize("version", ["", "1.0.0", "9"])
def test_what_is_not_allowed_answers_as_what_does_not_exist(channel: Any, method: str, version: str) -> None:
    def answer(model: str) -> tuple[Any, ...]:
        infer = method.endswith("Infer")
        asked = request(model) if infer else METHODS[method][0](name=model)
        setattr(asked, "model_version" if infer else "version", version)
        if method == "ModelStreamInfer":
            stub = channel.stream_stream(f"/{SERVICE}/{method}")
            (found,) = stub(iter([asked.SerializeToString()]), metadata=bearer("shop"), timeout=30)
            return (found.replace(model.encode(), b"NAME"),)
        error = refused(channel, method, asked, metadata=bearer("shop"))
        assert error.code() is grpc.StatusCode.NOT_FOUND and "tiny" in error.details()
        return error.code(), error.details().replace(model, "NAME"), told(error)

    assert answer("secret") == answer("nobody")  # as long as each other


def test_loading_and_unloading_is_for_admins(channel: Any) -> None:
    for action, model in itertools.product(("Load", "Unload"), ("tiny", "secret", "nobody")):
        method = f"RepositoryModel{action}"
        error = refused(channel, method, METHODS[method][0](model_name=model), metadata=bearer("shop"))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    load, unload = METHODS["RepositoryModelLoad"][0], METHODS["RepositoryModelUnload"][0]
    assert call(channel, "RepositoryModelUnload", unload(model_name="secret"), metadata=bearer("root")).isUnloaded
    unloaded = {
        name: refused(channel, "ModelInfer", request("secret"), metadata=bearer(name)) for name in ("root", "shop")
    }
    assert "secret is unloaded" in unloaded["root"].details()
    assert "there is no model 'secret'" in unloaded["shop"].details()
    assert call(channel, "RepositoryModelLoad", load(model_name="secret"), metadata=bearer("root")).isLoaded


def test_a_priority_above_the_ceiling_is_lowered_and_that_is_said(channel: Any) -> None:
    answer = call(channel, "ModelInfer", request(priority=1), metadata=bearer("shop"))
    assert answer.parameters["priority"].int64_param == 5
    answer = call(channel, "ModelInfer", request(priority=1), metadata=bearer("root"))
    assert "priority" not in answer.parameters


def test_a_rate_counts_at_both_doors_and_for_each_message_of_a_stream(agent: Any, channel: Any) -> None:
    assert over_http(agent, "/v2/models/tiny", "slow")[0] == 200
    assert call(channel, "ServerMetadata", metadata=bearer("slow")).name == "aios-edge"
    messages = iter([request().SerializeToString()] * 3)
    stub = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    takes = METHODS["ModelStreamInfer"][1]
    found = [takes.FromString(answer) for answer in stub(messages, metadata=bearer("slow"), timeout=30)]
    assert [bool(answer.error_message) for answer in found] == [False, False, True]
    assert "[requests_per_s]" in found[2].error_message
    error = refused(channel, "ModelInfer", request(), metadata=bearer("slow"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "[requests_per_s]" in error.details()
    assert 900_000 < int(told(error)["grpc-retry-pushback-ms"]) <= 1_000_000
    assert over_http(agent, "/v2", "slow")[0] == 429, "the other door knows of it"
    assert call(channel, "ModelInfer", request(), metadata=bearer("shop"))


def test_bytes_of_a_day_count_and_of_packed_messages_those_unpacked(agent: Any, channel: Any) -> None:
    size = len(request().SerializeToString())
    assert call(channel, "ModelInfer", request(), metadata=bearer("little"))
    assert json.loads(over_http(agent, "/status", "little")[1])["bytes_left"] == 300 - size
    error = refused(channel, "ModelInfer", request(text="x" * 300), metadata=bearer("little"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "[bytes_per_day]" in error.details()
    assert told(error)["grpc-retry-pushback-ms"] == "-1", "it will never fit"
    packed = request(text="a good film " * 1000)
    error = refused(channel, "ModelInfer", packed, metadata=bearer("little"), compression=grpc.Compression.Gzip)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "unpacked it is too long"


def lines_of(agent: Any, name: str) -> list[dict[str, Any]]:
    path = agent.config.parent / "state" / "audit" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def audited(agent: Any, name: str, count: int) -> list[dict[str, Any]]:
    """The last lines; a thread writes them, so the agent is asked meanwhile."""
    for _ in range(1000):
        if len(lines := lines_of(agent, name)) >= count:
            return lines
        over_http(agent, "/v2/health/live", name)
    raise AssertionError("never written")


def test_the_audit_has_what_was_asked_and_nothing_of_what_was_in_it(agent: Any, channel: Any) -> None:
    key = bearer("lab")
    before = len(lines_of(agent, "lab"))
    call(channel, "ServerMetadata", metadata=key)  # who only looks is not written down
    asked = request("secret", "private words")
    call(channel, "ModelInfer", asked, metadata=key)
    refused(channel, "ModelInfer", request("tiny"), metadata=key)
    refused(channel, "ModelInfer", data=b"\xff", metadata=key)
    list(
        channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
            iter([asked.SerializeToString()]), metadata=key, timeout=30
        )
    )
    refused(channel, "Unknown", metadata=key)
    lines = [line for line in audited(agent, "lab", before + 5) if line["path"].startswith(f"/{SERVICE}")][-5:]
    good, foreign, malformed, streamed, unknown = lines
    assert (good["tenant"], good["model"], good["route"], good["status"]) == ("lab", "secret", "local", 200)
    assert (good["id"], good["bytes_in"], good["method"]) == ("q1", len(asked.SerializeToString()), "POST")
    assert good["path"] == f"/{SERVICE}/ModelInfer" and good["request_id"] >= 1 and good["bytes_out"] > 100
    assert (foreign["status"], foreign["model"], foreign["route"]) == (404, "tiny", None)
    assert (malformed["status"], malformed["model"], unknown["status"]) == (400, None, 501)
    assert (streamed["status"], streamed["path"]) == (200, f"/{SERVICE}/ModelStreamInfer")
    assert "private words" not in json.dumps(lines)


def test_who_goes_away_is_written_down_as_such(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(
        tenant("shop") + tenant("root", "admin = true") + "[emulate]\nslowdown = 600.0",
        bundle=small_batches,
        http=GRPC,
        constants=UNREHEARSED,
    )
    with grpc.insecure_channel(agent.grpc) as channel:
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        calls = [stub.future(request().SerializeToString(), metadata=bearer("shop")) for _ in range(2)]

        def models() -> Any:
            return json.loads(over_http(agent, "/status", "root")[1])["models"]["tiny"]

        for _ in range(1000):
            if models()["queued"]:
                break
        calls[0].cancel()
        calls[1].cancel()
        lines = audited(agent, "shop", 2)
    assert [(line["status"], line["route"]) for line in lines] == [(None, None)] * 2
    agent.process.kill()


def test_tritonclient_with_its_key(agent: Any) -> None:
    given = triton.InferInput("text", [1], "BYTES")
    given.set_data_from_numpy(np.array([b"a good film"], dtype=np.object_))
    headers = {"authorization": f"Bearer {KEYS['shop']}"}
    with triton.InferenceServerClient(agent.grpc) as client:
        assert client.is_server_live() and client.is_server_ready(), "without a key"
        with pytest.raises(triton.InferenceServerException, match="a key is needed"):
            client.get_model_metadata("tiny")
        answer = client.infer("tiny", [given], headers=headers)
        assert answer.as_numpy("label").tolist() == [b"positive"]
        with pytest.raises(triton.InferenceServerException, match="there is no model 'secret'"):
            client.infer("secret", [given], headers=headers)


# TLS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    self_signed(folder)
    return folder


@pytest.fixture(scope="module")
def secure(start_agent: Any, folder: Path) -> Iterator[Any]:
    """Reachable from other machines, so it must have both."""
    agent = start_agent(
        tenant("shop", 'models = ["tiny"]'),
        http=f'grpc_bind = "0.0.0.0:0"\ntls_cert = "{folder}/door.pem"\ntls_key = "{folder}/door.key"',
    )
    agent.grpc = agent.grpc.replace("0.0.0.0", "127.0.0.1")
    yield agent
    assert agent.stop() == 0


def test_clients_ask_over_tls(secure: Any, folder: Path) -> None:
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    assert "grpcs://0.0.0.0:" in secure.log()
    root = str(folder / "door.pem")
    with triton.InferenceServerClient(secure.grpc, ssl=True, root_certificates=root) as client:
        assert client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="a key is needed"):
            client.get_model_metadata("tiny")
        headers = {"authorization": f"Bearer {KEYS['shop']}"}
        assert client.get_model_metadata("tiny", headers=headers).name == "tiny"

    async def ask() -> Any:
        async with InferenceGRPCClient(secure.grpc, use_ssl=True, root_certificates=root) as client:
            text = InferInput("text", [1], "BYTES", ["a bad film"])
            return await client.infer(InferRequest("tiny", [text]), headers=bearer("shop"))

    assert asyncio.run(asyncio.wait_for(ask(), 60)).outputs[0].as_numpy().tolist() in (["negative"], [b"negative"])


def test_who_speaks_no_tls_or_trusts_nobody_gets_nothing(secure: Any) -> None:
    for channel in (
        grpc.insecure_channel(secure.grpc),
        grpc.secure_channel(secure.grpc, grpc.ssl_channel_credentials()),
    ):
        with channel:
            assert refused(channel, "ServerLive", timeout=5).code() is grpc.StatusCode.UNAVAILABLE


def test_strangers_are_written_down_by_address_and_without_their_key(agent: Any, channel: Any) -> None:
    refused(channel, "ModelInfer", data=b"", metadata=(("authorization", "Bearer aios_nobodys"),))
    path = agent.config.parent / "state" / "audit" / "_unauthorized.jsonl"
    while not path.exists() or not path.read_text().endswith("\n"):
        pass
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["address"] for line in lines} == {"127.0.0.1"} and {line["method"] for line in lines} == {"POST"}
    assert all(key not in path.read_text() for key in ("nobodys", *KEYS.values()))
