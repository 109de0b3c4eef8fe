"""An https endpoint that asks who we are: real certificates, a real handshake."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from certificates import authority, openssl
from cloud_server import GO, SHAPE, Server, request, until, usable

from aios_edge.errors import SettingsError
from device_agent.answer import Answer
from device_agent.cloud import CloudPool
from device_agent.cloud_settings import CloudEndpoint
from device_agent.http1 import HttpClient
from device_agent.settings import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and what it signed: ``server`` and ``client``, each with ``.pem`` and ``.key``."""
    folder = tmp_path_factory.mktemp("certificates")
    authority(folder, "server", "client")
    openssl(folder, "ec", "-in", "client.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    (folder / "both.pem").write_text((folder / "client.pem").read_text() + (folder / "client.key").read_text())
    return folder


def against(folder: Path, scenario: Any, **files: Path) -> None:
    """A server that takes only clients of the authority."""

    async def main() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        context.verify_mode = ssl.CERT_REQUIRED
        server = Server()
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=context)
        url = f"https://localhost:{listener.sockets[0].getsockname()[1]}"
        settings = CloudEndpoint(name="c", url=url, ca=folder / "ca.pem", **files)
        pool = CloudPool((settings,), Policy(), lambda kind, **_: None)
        pool.add(SHAPE)
        pool.start()
        try:
            await asyncio.wait_for(scenario(pool), 20)
        finally:
            await pool.stop()
            listener.close()

    asyncio.run(main())


@pytest.mark.parametrize("files", [("client.pem", "client.key"), ("both.pem",)], ids=["two files", "one file"])
def test_a_server_that_asks_for_our_certificate_gets_it(folder: Path, files: tuple[str, ...]) -> None:
    async def scenario(pool: CloudPool) -> None:
        await until(lambda: usable(pool))
        assert isinstance(await pool.infer(GO, request(), "m"), Answer)

    against(
        folder, scenario, **dict(zip(("client_cert", "client_key"), (folder / name for name in files), strict=False))
    )


def test_without_one_the_endpoint_is_not_usable_and_says_why(folder: Path) -> None:
    async def scenario(pool: CloudPool) -> None:
        model = pool.endpoints["c"].models["m"]
        await until(lambda: model.reason != "not checked yet")
        # asyncio's server hangs up without the alert that would say it
        assert not usable(pool) and "connection" in (model.reason or "")

    against(folder, scenario)


@pytest.mark.parametrize(
    ("cert", "key"),
    [("client.pem", "server.key"), ("client.pem", "locked.key"), ("none.pem", None), ("client.pem", None)],
    ids=["another's key", "a passphrase", "no file", "no key"],
)
def test_files_that_cannot_be_used_are_named_at_the_start(folder: Path, cert: str, key: str | None) -> None:
    with pytest.raises(SettingsError, match=cert) as caught:
        HttpClient("https://x", client_cert=folder / cert, client_key=folder / key if key else None)
    assert "PEM" in str(caught.value)
