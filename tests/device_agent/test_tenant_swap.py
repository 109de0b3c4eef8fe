"""What one tenant asks can't undo a swap that does the others no harm."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import msgspec
from swapping import failing_model

from device_agent.probation import LEAST_ERRORS, LEAST_OTHERS
from device_agent.tenants import key_sha256, new_key

KEYS = {name: new_key() for name in ("odd", "fine", "root")}


def ask(agent: Any, key: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=60)
    connection.request(
        method, path, None if body is None else json.dumps(body), {"Authorization": f"Bearer {KEYS[key]}"}
    )
    with connection.getresponse() as response:
        status, content = response.status, json.loads(response.read())
    connection.close()
    return status, content


def infer(agent: Any, key: str, text: str) -> int:
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]}
    return ask(agent, key, "POST", "/v2/models/tiny/infer", body)[0]


def test_one_tenants_inputs_do_not_bring_the_old_bundle_back(
    start_agent: Any, tmp_path: Path, make_bundle: Any, tiny_parts: dict[str, Any]
) -> None:
    place = make_bundle(tmp_path / "bundle").path
    tenants = (f'[[tenant]]\nid = "{name}"\nkey_sha256 = "{key_sha256(key)}"\n' for name, key in KEYS.items())
    agent = start_agent("".join(tenants) + "admin = true\n", bundle=place)
    files = failing_model(tiny_parts, tmp_path)
    size = sum(path.stat().st_size for path in files.values())
    measured = msgspec.structs.replace(tiny_parts["manifest"]["measured"], size_bytes=size)
    make_bundle(place, version="1.1.0", files=files, measured=measured, promises={"size_bytes": size})
    assert ask(agent, "root", "POST", "/v2/repository/models/tiny/load")[0] == 200

    def told() -> tuple[str, int, int]:
        status = ask(agent, "root", "GET", "/status")[1]
        model = status["models"]["tiny"]
        probation = model["probation"] or {"answers": 0, "failures": 0}
        return model["version"], probation["answers"], probation["failures"]

    assert [infer(agent, "fine", "a good film") for _ in range(LEAST_OTHERS)] == [200] * LEAST_OTHERS
    assert [infer(agent, "odd", "a strange film") for _ in range(20)] == [500] * 20
    assert told() == ("1.1.0", LEAST_OTHERS + 20, 20)
    for _ in range(LEAST_ERRORS):
        infer(agent, "fine", "a strange film")
    while told()[0] != "1.0.0":  # it comes back within a moment, or the test's limit tells
        pass
    assert infer(agent, "odd", "a strange film") == 200
    assert agent.stop() == 0
