"""The agent runs on asyncio's own loop and on uvloop, and is the same on both."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.client import Client
from aios_edge.errors import MissingExtra
from device_agent import event_loop


@pytest.mark.parametrize("wanted", ["asyncio", "uvloop"])
def test_it_serves_on_both_doors_and_stops(start_agent: Any, tmp_path: Path, wanted: str) -> None:
    pytest.importorskip("uvloop", reason="the extra 'fast' isn't installed")
    door = tmp_path / "door"
    uid = f'[[tenant]]\nid = "me"\nunix_uids = [{os.getuid()}]\nadmin = true\n'
    agent = start_agent(uid, device=f'event_loop = "{wanted}"', http=f'unix_socket = "{door}"')
    with Client(f"unix://{door}") as client:  # who is at the other end is asked of the socket itself
        assert client.status()["host"]["event_loop"] == wanted
        assert client.infer("tiny", {"text": np.array([b"a good film"], dtype=object)}).outputs["label"].shape == (1,)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(20) == 0


def test_pipelined_requests_are_answered_on_both(start_agent: Any) -> None:
    body = b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":["a good film"]}]}'
    request = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for wanted in ("asyncio", "uvloop"):
        agent = start_agent(device=f'event_loop = "{wanted}"')
        host, port = agent.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(request * 5)
            received = b""
            while received.count(b'"probabilities"') < 5:
                received += sock.recv(65536)
        assert received.count(b"HTTP/1.1 200 OK") == 5, wanted


def test_auto_takes_asyncio_where_uvloop_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)

    async def main() -> str:
        return event_loop.running_on()

    assert event_loop.run(main()) == "asyncio"
    with pytest.raises(MissingExtra, match=r"aios-edge\[fast\]"):
        event_loop.run(main(), "uvloop")
    assert event_loop.running_on() == "none"
