from __future__ import annotations

import socket

import pytest

from aios_edge import broker as module
from aios_edge.broker import start_broker
from aios_edge.errors import MissingExtra, ResourceError


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_a_broker_listens_on_loopback_and_ends_with_stop(kind: module.Kind) -> None:
    broker = start_broker(kind)
    assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
    socket.create_connection(("127.0.0.1", broker.port), 5).close()
    broker.stop()
    broker.stop()
    assert broker.process.poll() is not None
    assert not broker.directory.exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", broker.port), 5)


def test_a_busy_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ResourceError, match="is busy"):
        start_broker("mosquitto", port=taken.getsockname()[1])


def test_without_any_broker_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mosquitto_path", lambda: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"aios-edge\[demo\]"):
        start_broker()
