"""A certificate of the gRPC door that is renewed while it is open: real files, a real agent, real clients."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import self_signed
from grpc_clients import call
from quick_constants import CERTIFICATE_WATCHED

from aios_edge.client import Client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that sign themselves, with their keys."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("door", "other", "third"):
        self_signed(folder, name)
    return folder


@pytest.fixture
def agent(start_agent: Any, folder: Path, tmp_path: Path) -> Iterator[Any]:
    for name in ("door.pem", "door.key"):
        shutil.copy(folder / name, tmp_path / name)
    agent = start_agent(
        http=f'grpc_bind = "127.0.0.1:0"\nunix_socket = "{tmp_path}/sock"\n'
        f'tls_cert = "{tmp_path}/door.pem"\ntls_key = "{tmp_path}/door.key"',
        constants=CERTIFICATE_WATCHED,
    )

    def status() -> Any:
        with Client(f"unix://{tmp_path}/sock") as client:
            return client.status()

    agent.status = status
    yield agent
    assert agent.stop() == 0
    assert "Traceback" not in agent.log()


def secure(agent: Any, certificate: Path) -> Any:
    """A connection of its own."""
    given = grpc.ssl_channel_credentials(certificate.read_bytes())
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost"))
    return grpc.secure_channel(agent.grpc, given, options)


def shown(agent: Any) -> bytes:
    host, port = agent.grpc.split(":")
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port))))


def put(source: Path, target: Path) -> None:
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def test_a_renewed_certificate_is_shown_and_open_channels_stay(agent: Any, folder: Path, tmp_path: Path) -> None:
    with secure(agent, folder / "door.pem") as opened:
        assert call(opened, "ServerReady").ready
        put(folder / "other.pem", tmp_path / "door.pem")
        put(folder / "other.key", tmp_path / "door.key")
        agent.until(lambda _: agent.events("certificate_loaded"))
        with secure(agent, folder / "other.pem") as renewed:
            assert call(renewed, "ServerReady").ready
        with secure(agent, folder / "door.pem") as refused, pytest.raises(grpc.RpcError) as caught:
            call(refused, "ServerReady")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert call(opened, "ServerReady").ready, "who was connected stays so"


def test_a_broken_pair_changes_nothing_and_the_next_good_one_does(agent: Any, folder: Path, tmp_path: Path) -> None:
    first = ssl.PEM_cert_to_DER_cert((folder / "door.pem").read_text())
    assert shown(agent) == first
    put(folder / "other.pem", tmp_path / "door.pem")
    agent.until(lambda _: agent.events("certificate_refused"))
    assert shown(agent) == first
    with secure(agent, folder / "door.pem") as channel:
        assert call(channel, "ServerReady").ready
    put(folder / "third.pem", tmp_path / "door.pem")
    put(folder / "third.key", tmp_path / "door.key")
    agent.until(lambda _: agent.events("certificate_loaded"))
    assert shown(agent) == ssl.PEM_cert_to_DER_cert((folder / "third.pem").read_text())
    assert "the door keeps its certificate" in agent.log()
