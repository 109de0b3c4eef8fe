"""A real agent with a tenant that floods it: another one hardly waits, and always finds room. So does another model."""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device_agent.tenants import key_sha256, new_key

KEYS = {"flood": new_key(), "quiet": new_key()}
BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film with a story"]}]}
CLIENTS = 24


class Caller:
    """One connection of a tenant; remembers statuses, how long its requests waited for the worker, and ran."""

    def __init__(self, agent: Any, tenant: str, model: str = "tiny") -> None:
        self.statuses: list[int] = []
        self.waits_us: list[int] = []
        self.runs_us: list[int] = []
        self._path = f"/v2/models/{model}/infer"
        self._headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
        self._connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=30)

    def ask(self) -> None:
        self._connection.request("POST", self._path, json.dumps(BODY), self._headers)
        response = self._connection.getresponse()
        told = json.loads(response.read())
        self.statuses.append(response.status)
        if response.status == 200:
            self.waits_us.append(told["parameters"]["queue_us"])
            self.runs_us.append(told["parameters"]["compute_us"])


@contextlib.contextmanager
def flood(agent: Any, began: Callable[[list[Caller]], bool]) -> Iterator[list[Caller]]:
    """Many clients that each ask again when they were answered, from the moment on that it ``began`` to matter."""
    over = threading.Event()
    callers = [Caller(agent, "flood") for _ in range(CLIENTS)]

    def go_on(caller: Caller) -> None:
        while not over.is_set():
            caller.ask()

    threads = [threading.Thread(target=go_on, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        while not began(callers):
            over.wait(0.001)
        yield callers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def waits_us(callers: list[Caller]) -> float:
    return statistics.median(wait for caller in callers for wait in caller.waits_us)


@pytest.mark.parametrize("limit", ["queue_limit = 16", "in_flight_bytes = 2000"])
def test_a_flood_at_one_tenant_is_not_felt_by_another(start_agent: Any, small_batches: Path, limit: str) -> None:
    tenants = "".join(f'[[tenant]]\nid = "{name}"\nkey_sha256 = "{key_sha256(key)}"\n' for name, key in KEYS.items())
    agent = start_agent(f"{tenants}[policy]\n{limit}\n[emulate]\nslowdown = 30.0\n", bundle=small_batches)
    quiet = Caller(agent, "quiet")
    with flood(agent, lambda callers: any(503 in caller.statuses for caller in callers)) as callers:
        for _ in range(30):
            quiet.ask()
    assert quiet.statuses == [200] * 30, "there is always room for it"
    assert waits_us([quiet]) < 0.5 * waits_us(callers), "it goes before what the other piled up"
    assert waits_us([quiet]) < 4 * statistics.median(quiet.runs_us), "a batch that runs, and hardly more"


def test_a_flood_at_one_model_is_not_felt_at_another(start_agent: Any, small_batches: Path, make_bundle: Any) -> None:
    other = make_bundle(name="other").path
    agent = start_agent(f'[[bundle]]\npath = "{other}"\n[emulate]\nslowdown = 30.0\n', bundle=small_batches)
    quiet = Caller(agent, "quiet", "other")
    with flood(agent, lambda callers: all(len(caller.statuses) > 1 for caller in callers)) as callers:
        for _ in range(30):
            quiet.ask()
    assert quiet.statuses == [200] * 30
    assert waits_us([quiet]) < 0.1 * waits_us(callers), "it has a queue and a worker of its own"
