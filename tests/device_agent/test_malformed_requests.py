"""Every class of malformed inference request at every door that can carry it.

Whatever comes, the answer names what is wrong, in the same words and with the same status wherever it came, and the
same connection goes on.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from identity_model import write_identity
from malformed_requests import CASES, MAX_BODY_BYTES
from raw_http import Door
from raw_models import echo
from request_doors import GrpcDoor, GrpcStreamDoor, HttpDoor, MqttDoor, RequestDoor
from request_forms import WAYS, Case, good

from aios_edge.broker import start_broker
from aios_edge.client import Client
from device_agent.tenants import key_sha256, new_key

GRPC = importlib.util.find_spec("grpc") is not None
VALUES = itertools.count(1000)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``id`` of one input, ``echo`` of five, ``halves`` of those without a typed field."""
    folder = tmp_path_factory.mktemp("repository")
    write_identity(folder / "id" / "1")
    echo(folder / "echo" / "1", ["BOOL", "BYTES", "FP32", "INT8", "UINT8"], ["n", 2])
    echo(folder / "halves" / "1", ["FP16", "BF16"], ["n", 2])
    return folder


@pytest.fixture(scope="module")
def doors(start_agent: Any, repository: Path) -> Iterator[dict[str, RequestDoor]]:
    """Three agents: one with every door, one whose broker is asked in MQTT 3.1.1, and one of a tenant's."""
    socket_path = Path(f"/tmp/aios-requests-{os.getpid()}.sock")
    of_tenant = socket_path.with_suffix(".tenant")
    key = new_key()
    tenant = f'[[tenant]]\nid = "t"\nkey_sha256 = "{key_sha256(key)}"\nunix_uids = [{os.getuid()}]\nadmin = true\n'
    limit = f"max_body_bytes = {MAX_BODY_BYTES}\n"
    grpc = 'grpc_bind = "127.0.0.1:0"\n' if GRPC else ""
    with start_broker() as broker, start_broker() as old, start_broker() as third:
        served = f'[repository]\npath = "{repository}"\n[mqtt]\ninfer = true\nurl = '
        whole = start_agent(f'{served}"{broker.url}"', http=f'{limit}{grpc}unix_socket = "{socket_path}"')
        plain = start_agent(f'{served}"{old.url}"\nprotocol = "3.1.1"', http=limit)
        asks = f'"{third.url}"\ninfer_tenant = "t"\n{tenant}'
        shared = start_agent(served + asks, http=f'{limit}{grpc}unix_socket = "{of_tenant}"')
        shared.status = lambda: told_by(of_tenant)
        for agent in (whole, plain, shared):
            agent.until(lambda status: status["mqtt_infer"]["link"]["subscriptions"] == 1)
        tcp = Door.of(whole.url)
        found: dict[str, RequestDoor] = {
            "tcp": HttpDoor(tcp),
            "tcp-chunked": HttpDoor(tcp, chunked=True),
            "unix": HttpDoor(Door(unix=socket_path)),
            "mqtt-5": MqttDoor(broker.url, "5"),
            "mqtt-3.1.1": MqttDoor(old.url, "3.1.1"),
            "tenant-unix": HttpDoor(Door(unix=of_tenant)),
            "tenant-mqtt-5": MqttDoor(third.url, "5"),
        }
        if GRPC:
            found |= {"grpc": GrpcDoor(whole.grpc), "grpc-stream": GrpcStreamDoor(whole.grpc)}
            found["tenant-grpc"] = GrpcDoor(shared.grpc, key)
        asked = Counter[str]()
        for name, door in found.items():
            door.ask = counted(door.ask, asked, name)  # type: ignore[method-assign]
        yield found
        for door in found.values():
            door.close()
        for agent in (whole, plain, shared):
            status = agent.status()
            assert status["mqtt_infer"]["link"]["connects"] == 1, "no request costs the broker's connection"
            assert "worker_crashed" not in {event["kind"] for event in status["events"]}, "nor a worker"
            assert agent.stop() == 0
            assert "Traceback" not in agent.log() and "ERROR" not in agent.log(), agent.log()
        lines = (shared.config.parent / "state/audit/t.jsonl").read_text().splitlines()
        kinds = Counter(kind_of(json.loads(line)) for line in lines)
        ours = {name: count for name, count in asked.items() if name.startswith("tenant")}
        assert kinds == ours, "every request has its line, whatever was wrong with it"


def told_by(socket_path: Path) -> Any:
    with Client(f"unix://{socket_path}") as client:
        return client.status()


def counted(ask: Any, asked: Counter[str], name: str) -> Any:
    def count(case: Case, way: str) -> Any:
        asked[name] += 1
        return ask(case, way)

    return count


def kind_of(line: dict[str, Any]) -> str:
    """The door that it came by."""
    if line["method"] == "PUBLISH":
        return "tenant-mqtt-5"
    return "tenant-unix" if line["path"].startswith("/v2/") else "tenant-grpc"


PLAIN = ["tcp", "tcp-chunked", "unix", "mqtt-5", "mqtt-3.1.1", "grpc", "grpc-stream"]


@pytest.fixture(params=[*PLAIN, "tenant-unix", "tenant-mqtt-5", "tenant-grpc"])
def door(request: pytest.FixtureRequest, doors: dict[str, RequestDoor]) -> RequestDoor:
    if request.param not in doors:
        pytest.skip("grpcio isn't installed")
    return doors[request.param]


@pytest.fixture(scope="module")
def words() -> dict[tuple[str, str], str]:
    """What was said of each case, by the first door that was asked."""
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_wrong_with_a_request_is_told_and_the_next_one_answered(
    door: RequestDoor, case: Case, words: dict[tuple[str, str], str]
) -> None:
    for way in WAYS:
        if way not in door.ways or way not in case.ways or not door.carries(case):
            continue
        told = door.ask(case, way)
        assert told.error is not None and case.says.lower() in told.error.lower(), (way, told)
        assert told.status in (case.status, None), (way, told)
        if case.status != 413:  # a body here is a payload there
            assert words.setdefault((way, case.name), told.error) == told.error
        value = next(VALUES)
        assert door.ask(good(value), way).values == (value,), way
