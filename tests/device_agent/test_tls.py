"""The HTTP door with a certificate: real agents, real clients, and files that don't belong together."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from certificates import openssl, self_signed
from quick_constants import CERTIFICATE_WATCHED

from aios_edge.client import Client, HttpError
from aios_edge.errors import RemoteError, SettingsError, UsageError
from device_agent.tls import DoorCertificate, door_certificate, server_context

BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself, its key, another key, and the key with a passphrase."""
    folder = tmp_path_factory.mktemp("tls")

    self_signed(folder)
    self_signed(folder, "other")
    openssl(folder, "ec", "-in", "door.key", "-aes256", "-passout", "pass:x", "-out", "secret.key")
    return folder


@pytest.fixture(scope="module")
def agent(start_agent: Any, folder: Path) -> Iterator[Any]:
    path = Path(f"/tmp/aios-tls-{os.getpid()}.sock")
    agent = start_agent(
        http=f'unix_socket = "{path}"\ntls_cert = "{folder}/door.pem"\ntls_key = "{folder}/door.key"\n'
        "max_body_bytes = 2000000"
    )
    agent.socket_path = path
    yield agent
    assert agent.stop() == 0


def test_clients_ask_over_tls(agent: Any, folder: Path) -> None:
    assert agent.url.startswith("https://")
    with Client(agent.url, ca=folder / "door.pem") as client:
        assert client.classify("tiny", ["a good film"])[0].label == "positive"
        assert client.status()["listen"] == [agent.url, f"unix:{agent.socket_path}"]
    with Client(agent.url) as client, pytest.raises(RemoteError, match="CERTIFICATE_VERIFY_FAILED"):
        client.status()
    curl = subprocess.run(
        ["curl", "-s", "--cacert", folder / "door.pem", agent.url + "/v2/health/ready"], capture_output=True, check=True
    )
    assert json.loads(curl.stdout) == {"ready": True}


def test_tritonclient_asks_over_tls(agent: Any, folder: Path) -> None:
    from tritonclient import http as triton

    client = triton.InferenceServerClient(
        agent.url.removeprefix("https://"), ssl=True, ssl_options={"ca_certs": str(folder / "door.pem")}
    )
    assert client.is_server_ready() and client.get_model_metadata("tiny")["name"] == "tiny"
    client.close()


def test_the_unix_socket_is_plain(agent: Any) -> None:
    with Client(f"unix://{agent.socket_path}") as client:
        assert client.classify("tiny", ["a bad film"])[0].label == "negative"


def test_plain_http_gets_nothing(agent: Any) -> None:
    host, port = agent.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"live" not in sock.recv(1000)


@pytest.mark.parametrize("chunked", [False, True])
def test_who_still_sends_a_body_reads_why_it_is_refused(agent: Any, folder: Path, chunked: bool) -> None:
    context = ssl.create_default_context(cafile=folder / "door.pem")
    connection = http.client.HTTPSConnection(agent.url.removeprefix("https://"), timeout=20, context=context)
    body, headers = b"x" * 40_000_000, {"Connection": "close"}
    if chunked:
        connection.request("POST", "/v2/models/tiny/infer", iter([body]), headers, encode_chunked=True)
    else:
        connection.request("POST", "/v2/models/tiny/infer", body, headers)
    response = connection.getresponse()
    assert (response.status, list(json.loads(response.read()))) == (413, ["error"])
    connection.close()
    with Client(agent.url, ca=folder / "door.pem") as client:
        with pytest.raises(HttpError, match="longer than 2000000 bytes"):
            client.classify("tiny", ["a" * 40_000_000])
        assert client.classify("tiny", ["a good film"])[0].label == "positive"
    assert "Traceback" not in agent.log()


def test_files_that_do_not_serve_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def refusal(cert: Path, key: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            server_context(cert, key)
        return str(caught.value)

    assert door_certificate(None, None) is None
    assert "http.tls_key" in refusal(folder / "door.pem", tmp_path / "none.key")
    assert "http.tls_cert" in refusal(tmp_path / "none.pem", folder / "door.key")
    assert "without a passphrase" in refusal(folder / "door.pem", folder / "secret.key")
    assert "can't be used" in refusal(folder / "door.pem", folder / "other.key")
    assert "can't be used" in refusal(folder / "door.key", folder / "door.key")
    with pytest.raises(UsageError, match="PEM"):
        Client("https://localhost", ca=folder / "door.key")


def test_the_agent_does_not_start_with_a_wrong_key(start_agent: Any, folder: Path) -> None:
    agent = start_agent(http=f'tls_cert = "{folder}/door.pem"\ntls_key = "{folder}/other.key"', wait=False)
    assert agent.process.wait(30) == 2
    assert "http.tls_cert" in agent.log() and "Traceback" not in agent.log()


def test_a_renewed_certificate_is_shown_and_open_connections_stay(
    start_agent: Any, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "door.pem", tmp_path / "door.pem")
    shutil.copy(folder / "door.key", tmp_path / "door.key")
    agent = start_agent(
        http=f'unix_socket = "{tmp_path}/sock"\ntls_cert = "{tmp_path}/door.pem"\ntls_key = "{tmp_path}/door.key"',
        constants=CERTIFICATE_WATCHED,
    )
    address = agent.url.removeprefix("https://")
    context = ssl.create_default_context(cafile=folder / "door.pem")
    opened = http.client.HTTPSConnection(address, timeout=20, context=context)

    def ready(connection: http.client.HTTPSConnection) -> int:
        connection.request("GET", "/v2/health/ready")
        with connection.getresponse() as response:
            response.read()
            return response.status

    assert ready(opened) == 200
    sock = opened.sock
    for name in ("door.pem", "door.key"):
        shutil.copy(folder / name.replace("door", "other"), tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / name)
    with Client(f"unix://{tmp_path}/sock") as client:
        end = time.monotonic() + 20
        while "certificate_loaded" not in [event["kind"] for event in client.status()["events"]]:
            assert time.monotonic() < end
    renewed = ssl.create_default_context(cafile=folder / "other.pem")
    fresh = http.client.HTTPSConnection(address, timeout=20, context=renewed)
    assert ready(fresh) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        http.client.HTTPSConnection(address, timeout=20, context=context).connect()
    assert ready(opened) == 200 and opened.sock is sock
    opened.close()
    fresh.close()
    assert agent.stop() == 0


def test_files_that_do_not_belong_together_change_nothing_and_are_told_of_when_they_stay(
    folder: Path, tmp_path: Path
) -> None:
    cert, key = tmp_path / "door.pem", tmp_path / "door.key"
    shutil.copy(folder / "door.pem", cert)
    shutil.copy(folder / "door.key", key)
    told: list[str] = []

    def emit(kind: str, **_: Any) -> None:
        told.append(kind)

    def shown() -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        client = ssl._create_unverified_context()
        with listener, socket.create_connection(listener.getsockname()) as ours:
            theirs, _ = listener.accept()
            with ThreadPoolExecutor(1) as pool:
                served = pool.submit(door.context.wrap_socket, theirs, server_side=True)
                with client.wrap_socket(ours, server_hostname="localhost") as tls:
                    found = tls.getpeercert(binary_form=True)
                    served.result().close()
        assert found
        return found

    door = DoorCertificate(cert, key)
    first = shown()
    door.look(emit)
    shutil.copy(folder / "other.pem", cert)
    door.look(emit)
    assert told == [] and shown() == first, "the key may be on its way"
    door.look(emit)
    door.look(emit)
    assert told == ["certificate_refused"] and shown() == first
    key.unlink()
    door.look(emit)
    shutil.copy(folder / "other.key", key)
    door.look(emit)
    door.look(emit)
    assert told == ["certificate_refused", "certificate_loaded"]
    assert shown() == ssl.PEM_cert_to_DER_cert((folder / "other.pem").read_text())
