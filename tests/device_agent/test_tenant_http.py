"""Tenants at the doors of a real agent: who gets in, what each sees, and that nobody sees anything of another."""

from __future__ import annotations

import ast
import asyncio
import http.client
import inspect
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.client import Client, HttpError, Overloaded
from device_agent import http as http_module
from device_agent.tenants import key_sha256, new_key

KEYS = {name: new_key() for name in ("shop", "lab", "root", "slow", "little")}
BODY = json.dumps(
    {"id": "q1", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}]}
)


def tenant(name: str, more: str = "") -> str:
    return f'[[tenant]]\nid = "{name}"\nkey_sha256 = "{key_sha256(KEYS[name])}"\n{more}\n'


@pytest.fixture(scope="module")
def agent(start_agent: Any, make_bundle: Any) -> Iterator[Any]:
    """Models ``tiny`` and ``secret``; ``shop`` has the first, ``lab`` the second, ``root`` is an admin."""
    path = Path(f"/tmp/aios-tenants-{os.getpid()}.sock")
    agent = start_agent(
        f'[[bundle]]\npath = "{make_bundle(name="secret").path}"\n'
        + tenant("shop", 'models = ["tiny"]\npriority_ceiling = 5')
        + tenant("lab", 'models = ["secret"]')
        + tenant("root", "admin = true")
        + tenant("slow", 'models = ["tiny"]\nrequests_per_s = 0.001\nburst = 3')
        + tenant("little", 'models = ["tiny"]\nbytes_per_day = 2000')
        + f'[[tenant]]\nid = "here"\nmodels = ["tiny"]\nunix_uids = [{os.getuid()}]\n',
        http=f'unix_socket = "{path}"\nmax_body_bytes = 1000000',
    )
    agent.socket_path = path
    yield agent
    assert agent.stop() == 0
    log = agent.log()
    assert "Traceback" not in log and not any(key in log for key in KEYS.values())


def ask(
    agent: Any,
    path: str,
    key: str | None = None,
    *,
    method: str = "GET",
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=20)
    bearer = {} if key is None else {"Authorization": f"Bearer {KEYS.get(key, key)}"}
    connection.request(method, path, body, {**bearer, **(headers or {})}, encode_chunked=body is not None)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    answered = {name.lower(): value for name, value in response.getheaders()}
    return response.status, answered, content


def infer(agent: Any, key: str | None, model: str = "tiny", body: Any = BODY) -> tuple[int, dict[str, str], Any]:
    status, headers, content = ask(agent, f"/v2/models/{model}/infer", key, method="POST", body=body)
    return status, headers, json.loads(content)


def parameters(key: str, agent: Any, **more: Any) -> Any:
    status, _, document = infer(agent, key, body=json.dumps({**json.loads(BODY), "parameters": more}))
    assert status == 200, document
    return document["parameters"]


def audit(agent: Any, name: str) -> list[dict[str, Any]]:
    path = agent.config.parent / "state" / "audit" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def paths_of_the_application() -> set[str]:
    """Every path that the application's ``match`` knows, from its source: also those that are added later."""
    tree = ast.parse(inspect.getsource(http_module))
    sequences = [node for node in ast.walk(tree) if isinstance(node, ast.MatchSequence)]
    known = {"/"}
    for sequence in sequences:
        choices: list[list[str]] = []
        for part in sequence.patterns:
            if isinstance(part, ast.MatchAs) and part.pattern is not None:
                part = part.pattern
            if isinstance(part, ast.MatchValue):
                choices.append([part.value.value])  # type: ignore[attr-defined]
            elif isinstance(part, ast.MatchOr):
                choices.append([one.value.value for one in part.patterns])  # type: ignore[attr-defined]
            elif isinstance(part, ast.MatchStar):
                tails = ["ready", "infer", "config", "stats", "load", "unload", "events", "other"]
                choices.append(["", *tails, "versions/1.0.0", *(f"versions/1.0.0/{tail}" for tail in tails)])
            else:
                choices.append(["tiny", "secret", "nobody"])
        known |= {"/" + "/".join(words).rstrip("/") for words in itertools.product(*choices)}
    return known


HEALTH = {"/v2/health/live", "/v2/health/ready"}
PATHS = sorted(paths_of_the_application())


def test_the_paths_were_found() -> None:
    expected = {"/v2", "/metrics", "/status", "/v2/models/tiny/infer", "/v2/repository/models/tiny/load"}
    assert expected | HEALTH <= set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_without_a_key_nothing_but_health_answers(agent: Any, path: str) -> None:
    for method, key in itertools.product(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"), (None, "aios_wrong")):
        status, headers, content = ask(agent, path, key, method=method, body=b"{}" if method == "POST" else None)
        if path in HEALTH:
            assert status == (200 if method in ("GET", "HEAD") else 405)
            continue
        assert status == 401, (method, path)
        assert headers["www-authenticate"].startswith('Bearer realm="aios-edge"')
        assert b"aios_wrong" not in content
        assert method == "HEAD" or list(json.loads(content)) == ["error"]


@pytest.mark.parametrize(
    "path", ["//v2//health/live", "/v2/health/live/x", "/v2/health/live/../../metrics", "/v2/health/..%2fstatus", "/%"]
)
def test_no_way_of_writing_a_path_leads_past_the_door(agent: Any, path: str) -> None:
    assert ask(agent, path)[0] == 401


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {hash}",
        "Bearer {key}, {key}",
    ],
)
def test_what_is_nearly_a_key_is_none(agent: Any, authorization: str) -> None:
    value = authorization.format(key=KEYS["shop"], hash=key_sha256(KEYS["shop"]))
    status, headers, content = ask(agent, "/v2/models/tiny", headers={"Authorization": value})
    assert status == 401 and "invalid_token" in headers["www-authenticate"]
    assert KEYS["shop"].encode() not in content


def test_requests_of_one_connection_have_their_own_keys(agent: Any) -> None:
    host, port = agent.url.removeprefix("http://").split(":")
    order = ["shop", "lab", None, "root", "shop"]
    heads = [
        "GET /v2/repository/none HTTP/1.1\r\nHost: x\r\n\r\n"
        if key is None
        else f"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[key]}\r\n\r\n"
        for key in order
    ]
    heads[-1] = heads[-1].replace("Host: x", "Host: x\r\nConnection: close")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall("".join(heads).encode())  # one behind the other, before any answer
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    bodies = [json.loads(part.partition("\r\n\r\n")[2]) for part in answer.split("HTTP/1.1 ")[1:]]
    assert [body.get("tenant", body.get("error", "whole")[:5]) for body in bodies] == [
        "shop",
        "lab",
        "a key",
        "whole",
        "shop",
    ]


def test_every_tenant_asks_its_own_models(agent: Any) -> None:
    for key, model in (("shop", "tiny"), ("lab", "secret"), ("root", "tiny"), ("root", "secret")):
        status, _, document = infer(agent, key, model)
        assert status == 200 and document["model_name"] == model and document["id"] == "q1"
        assert json.loads(ask(agent, f"/v2/models/{model}", key)[2])["name"] == model
        assert json.loads(ask(agent, f"/v2/models/{model}/ready", key)[2])["ready"] is True
    index = {
        key: [model["name"] for model in json.loads(ask(agent, "/v2/repository/index", key, method="POST")[2])]
        for key in ("shop", "lab", "root")
    }
    assert index == {"shop": ["tiny"], "lab": ["secret"], "root": ["tiny", "secret"]}


@pytest.mark.parametrize("tail", ["", "/ready", "/infer", "/versions/1.0.0", "/versions/9/infer", "/none", "/versions"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_what_is_not_allowed_answers_as_what_does_not_exist(agent: Any, tail: str, method: str) -> None:
    def told(model: str, body: str) -> Any:
        status, headers, content = ask(agent, f"/v2/models/{model}{tail}", "shop", method=method, body=body)
        del headers["date"]
        assert status in (404, 405)
        return status, headers, content.replace(model.encode(), b"NAME")

    for body in (BODY, "{", "x" * 1000):
        assert told("secret", body) == told("nobody", body)  # as long as each other
    assert b"tiny" in ask(agent, "/v2/models/nobody", "shop")[2], "the models it may ask for are named"


def test_metrics_and_status_tell_a_tenant_of_itself_only(agent: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    assert infer(agent, "shop")[0] == 200 and infer(agent, "lab", "secret")[0] == 200
    infer(agent, "lab", "secret", body="{")
    pages = {key: ask(agent, "/metrics", key)[2].decode() for key in ("shop", "lab", "root")}
    families = {
        key: {family.name: family for family in text_string_to_metric_families(page)} for key, page in pages.items()
    }
    for key, model, others in (
        ("shop", "tiny", ("secret", "lab", "root")),
        ("lab", "secret", ("tiny", "shop", "root")),
    ):
        assert set(families[key]) <= {
            "aios_requests",
            "aios_late",
            "aios_request_latency_seconds",
            "aios_batch_size",
            "aios_model_ready",
            "aios_tenant_requests",
            "aios_tenant_refused",
            "aios_tenant_received_bytes",
        }
        samples = families[key]["aios_tenant_requests"].samples
        assert {(sample.labels["tenant"], sample.labels["model"]) for sample in samples} == {(key, model)}
        document = ask(agent, "/status", key)[2].decode()
        assert json.loads(document)["tenant"] == key and list(json.loads(document)["models"]) == [model]
        assert json.loads(document)["state"] == "ready" and json.loads(document)["in_flight"] == 0
        assert not any(f'"{other}"' in text for other in others for text in (pages[key], document))
    counted = {sample.labels["tenant"] for sample in families["root"]["aios_tenant_requests"].samples}
    assert {"shop", "lab"} <= counted and "aios_queue_depth" in families["root"]
    assert families["root"]["aios_unauthorized"].samples[0].value >= 0
    whole = json.loads(ask(agent, "/status", "root")[2])
    assert set(whole["models"]) == {"tiny", "secret"} and whole["state"] == "ready"
    mine = json.loads(ask(agent, "/status", "shop")[2])["totals"]["local"]
    assert mine < whole["totals"]["local"]


def test_only_an_admin_is_told_why_a_model_does_not_serve(start_agent: Any) -> None:
    agent = start_agent(
        '[[bundle]]\npath = "gone/hidden"\n'
        + tenant("shop", 'models = ["tiny"]')
        + tenant("lab", 'models = ["tiny", "hidden"]')
        + tenant("root", "admin = true")
    )
    seen = {
        key: json.loads(ask(agent, "/v2/repository/index", key, method="POST")[2]) for key in ("shop", "lab", "root")
    }
    assert [model["name"] for model in seen["shop"]] == ["tiny"]
    assert [(model["name"], model["state"], model["reason"]) for model in seen["lab"]] == [
        ("tiny", "READY", ""),
        ("hidden", "UNAVAILABLE", ""),
    ]
    assert "gone" in seen["root"][1]["reason"]
    states = {key: json.loads(ask(agent, "/status", key)[2])["state"] for key in ("shop", "lab", "root")}
    assert states == {"shop": "ready", "lab": "degraded", "root": "degraded"}
    assert b"gone" not in ask(agent, "/status", "lab")[2] + ask(agent, "/metrics", "lab")[2]
    assert agent.stop() == 0


def test_more_requests_than_agreed_are_told_when_to_come_back(agent: Any) -> None:
    assert [infer(agent, "slow")[0] for _ in range(3)] == [200] * 3
    status, headers, document = infer(agent, "slow")
    assert status == 429 and "[requests_per_s]" in document["error"]
    assert 900 <= int(headers["retry-after"]) <= 1000
    assert ask(agent, "/v2", "slow")[0] == 429, "whatever it asks"
    assert infer(agent, "shop")[0] == 200, "the others don't feel it"
    with Client(agent.url, bearer=KEYS["slow"]) as client, pytest.raises(Overloaded) as caught:
        client.classify("tiny", ["a good film"])
    assert caught.value.status == 429 and caught.value.retry_after_s > 900


def test_more_bytes_than_agreed_are_refused_before_they_are_read(agent: Any) -> None:
    status, _, document = infer(agent, "little", body="x" * 2001)
    assert status == 413 and "[bytes_per_day]; send less" in document["error"], "it will never fit"
    assert infer(agent, "little", body=iter([b"x" * 1000, b"x" * 900]))[0] == 400, "what is wrong counts as well"
    status, headers, document = infer(agent, "little", body=iter([b"x" * 200]))
    assert status == 429 and "[bytes_per_day]" in document["error"], "its length wasn't told"
    assert 80_000 < int(headers["retry-after"]) <= 86_400 + 900
    assert infer(agent, "little")[0] == 429, "announced"
    told = json.loads(ask(agent, "/status", "little")[2])
    assert told["bytes_per_day"] == 2000 and told["bytes_left"] == 100
    assert infer(agent, "shop")[0] == 200


def test_a_priority_above_the_ceiling_is_lowered_and_that_is_said(agent: Any) -> None:
    assert parameters("shop", agent, priority=1)["priority"] == 5
    for modest in ({"priority": 5}, {"priority": 6}, {"priority": 0}, {}):
        assert "priority" not in parameters("shop", agent, **modest)
    assert "priority" not in parameters("root", agent, priority=1)


def test_loading_and_unloading_is_for_admins(agent: Any) -> None:
    for model in ("tiny", "secret", "nobody"):
        for action in ("load", "unload"):
            path = f"/v2/repository/models/{model}/{action}"
            assert ask(agent, path, "shop", method="POST", body="{}")[0] == 403
    for model, action, status in (("nobody", "load", 404), ("secret", "load", 200), ("secret", "unload", 200)):
        path = f"/v2/repository/models/{model}/{action}"
        assert ask(agent, path, "root", method="POST", body="{}")[0] == status
    unloaded = ask(agent, "/v2/models/secret", "root")[2], ask(agent, "/v2/models/secret", "shop")[2]
    assert b"secret is unloaded" in unloaded[0] and b"there is no model 'secret'" in unloaded[1]
    assert ask(agent, "/v2/repository/models/secret/load", "root", method="POST")[0] == 200


def test_the_unix_socket_knows_whose_process_it_is(agent: Any) -> None:
    with Client(f"unix://{agent.socket_path}") as client:
        assert client.classify("tiny", ["a good film"])[0].label == "positive"
        assert client.status()["tenant"] == "here"
        with pytest.raises(HttpError, match="404"):
            client.model_metadata("secret")
    with Client(f"unix://{agent.socket_path}", bearer=KEYS["lab"]) as client:
        assert client.status()["tenant"] == "lab", "a key goes before the user id"
    with Client(f"unix://{agent.socket_path}", bearer="wrong") as client, pytest.raises(HttpError, match="401"):
        client.status()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_on_the_unix_socket_needs_a_key(agent: Any) -> None:
    agent.socket_path.chmod(0o666)
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(b'GET /v2 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(s.recv(1000))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(agent.socket_path)], capture_output=True, text=True, check=True
    )
    agent.socket_path.chmod(0o660)
    assert "401" in answer.stdout


def test_the_protocols_clients_with_their_key(agent: Any) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from tritonclient import http as triton
    from tritonclient.utils import InferenceServerException

    headers = {"Authorization": f"Bearer {KEYS['shop']}"}  # tritonclient adds to what it is given
    ids = np.array([[2, 4, 30, 3]], dtype=np.int64)
    client = triton.InferenceServerClient(agent.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready(), "without a key"
    with pytest.raises(InferenceServerException, match="a key is needed"):
        client.get_model_metadata("tiny")
    assert client.get_model_metadata("tiny", headers=dict(headers))["name"] == "tiny"
    assert [model["name"] for model in client.get_model_repository_index(headers=dict(headers))] == ["tiny"]
    inputs = [triton.InferInput(name, [1, 4], "INT64") for name in ("input_ids", "attention_mask")]
    inputs[0].set_data_from_numpy(ids)
    inputs[1].set_data_from_numpy(np.ones_like(ids))
    logits = client.infer("tiny", inputs, headers=dict(headers)).as_numpy("logits")
    client.close()

    async def with_kserve() -> Any:
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        tensors = [InferInput("input_ids", [1, 4], "INT64", ids.tolist())]
        tensors.append(InferInput("attention_mask", [1, 4], "INT64", [[1] * 4]))
        request = InferRequest(model_name="tiny", infer_inputs=tensors)
        answer = await rest.infer(agent.url, request, model_name="tiny", headers=headers)
        await rest.close()
        return answer

    outputs = asyncio.run(with_kserve()).outputs
    np.testing.assert_allclose(next(o for o in outputs if o.name == "logits").as_numpy(), logits, atol=1e-6)


def test_the_audit_has_what_was_asked_and_nothing_of_what_was_in_it(agent: Any) -> None:
    ask(agent, "/status", "lab")  # who only looks is not written down
    assert infer(agent, "lab", "secret")[0] == 200
    infer(agent, "lab", "tiny")
    infer(agent, "lab", "secret", body='{"inputs": "private words"}')
    audited(agent, lambda: audit(agent, "lab")[-1]["bytes_in"] == 27)
    good, foreign, malformed = audit(agent, "lab")[-3:]
    assert (good["tenant"], good["model"], good["route"], good["reason"]) == ("lab", "secret", "local", "no_deadline")
    assert (good["status"], good["id"], good["bytes_in"]) == (200, "q1", len(BODY))
    assert good["request_id"] >= 1 and good["bytes_out"] > 100 and good["ts"].endswith("Z")
    assert (foreign["status"], foreign["model"], foreign["route"]) == (404, "tiny", None)
    assert malformed["status"] == 400
    assert {(line["tenant"], line["method"]) for line in audit(agent, "lab")} == {("lab", "POST")}
    folder = agent.config.parent / "state" / "audit"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text()
        assert "film" not in text and "private words" not in text
        assert not any(key in text for key in KEYS.values())


def audited(agent: Any, condition: Any) -> None:
    """The audit is written by a thread: wait until it has come so far, asking the agent meanwhile."""
    for _ in range(1000):
        if condition():
            return
        ask(agent, "/v2/health/live")
    raise AssertionError("never written")


def test_the_status_command_takes_a_key(agent: Any, tmp_path: Path) -> None:
    def status(*arguments: str) -> Any:
        command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "status", "--url", agent.url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (tmp_path / "shop.key").write_text(KEYS["shop"] + "\n")
    (tmp_path / "root.key").write_text(KEYS["root"] + "\n")
    refused = status()
    assert refused.returncode == 1 and "401" in refused.stderr
    assert "tenant shop  ready" in status("--bearer-file", str(tmp_path / "shop.key")).stdout
    assert "model secret 1.0.0  ready" in status("--bearer-file", str(tmp_path / "root.key")).stdout


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_what_a_tenant_sent_today_is_known_after_a_restart(start_agent: Any, how: str) -> None:
    agent = start_agent(tenant("little", "bytes_per_day = 2000"))
    assert infer(agent, "little", body=iter([b"x" * 1500]))[0] == 400
    if how == "stopped":
        assert agent.stop() == 0
    else:
        agent.process.kill()
        agent.process.wait()
    agent = start_agent(again=agent)
    told = json.loads(ask(agent, "/status", "little")[2])
    assert told["bytes_left"] == 500 if how == "stopped" else 480 <= told["bytes_left"] <= 500, "it is written ahead"
    assert infer(agent, "little", body=iter([b"x" * 501]))[0] == 429
    assert agent.stop() == 0
    (agent.config.parent / "state" / "quotas.json").write_text("{")
    agent = start_agent(again=agent)
    assert json.loads(ask(agent, "/status", "little")[2])["bytes_left"] == 2000, "nobody is shut out for a damaged file"
    assert "quotas.json can't be read" in agent.log() and agent.stop() == 0
