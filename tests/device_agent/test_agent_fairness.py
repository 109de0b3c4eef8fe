"""A real agent with a tenant that floods it: another one hardly waits, and always finds room."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

from device_agent.tenants import key_sha256, new_key

KEYS = {"flood": new_key(), "quiet": new_key()}
BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film with a story"]}]}
CLIENTS = 24


class Caller:
    """One connection of a tenant; remembers statuses and how long its requests waited for the worker."""

    def __init__(self, agent: Any, tenant: str) -> None:
        self.statuses: list[int] = []
        self.waits_us: list[int] = []
        self._headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
        self._connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=30)

    def ask(self, **parameters: Any) -> None:
        body = json.dumps(BODY | {"parameters": parameters})
        self._connection.request("POST", "/v2/models/tiny/infer", body, self._headers)
        response = self._connection.getresponse()
        told = json.loads(response.read())
        self.statuses.append(response.status)
        if response.status == 200:
            self.waits_us.append(told["parameters"]["queue_us"])


def test_a_flood_at_one_tenant_is_not_felt_by_another(start_agent: Any, small_batches: Path) -> None:
    tenants = "".join(f'[[tenant]]\nid = "{name}"\nkey_sha256 = "{key_sha256(key)}"\n' for name, key in KEYS.items())
    agent = start_agent(f"{tenants}[policy]\nqueue_limit = 16\n[emulate]\nslowdown = 30.0\n", bundle=small_batches)
    over = threading.Event()
    floods, quiet = [Caller(agent, "flood") for _ in range(CLIENTS)], Caller(agent, "quiet")

    def flood(caller: Caller) -> None:
        while not over.is_set():
            caller.ask()

    threads = [threading.Thread(target=flood, args=(caller,)) for caller in floods]
    for thread in threads:
        thread.start()
    try:
        while not any(503 in caller.statuses for caller in floods):
            over.wait(0.001)
        for _ in range(30):
            quiet.ask()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    others_us = sorted(wait for caller in floods for wait in caller.waits_us)
    assert quiet.statuses == [200] * 30, "there is always room for it"
    assert sorted(quiet.waits_us)[15] < 0.5 * others_us[len(others_us) // 2], "it goes before what the other piled up"
