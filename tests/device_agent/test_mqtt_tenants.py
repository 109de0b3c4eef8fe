"""Whose a request over MQTT is: what it costs its tenant, and what is written down of it, whatever it was."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mqtt_asker import BASE, Asker, request, user
from quick_constants import UNREHEARSED

from aios_edge.broker import Broker, start_broker
from device_agent.tenants import key_sha256, new_key

REPLY = "line-3/answers"
JSON_LENGTH = "inference-header-content-length"
KEY = new_key()


@pytest.fixture
def broker() -> Iterator[Broker]:
    with start_broker() as broker:
        yield broker


def serving(start_agent: Any, broker: Broker, tenant: str, more: str = "", **options: Any) -> Any:
    """An agent that is asked over MQTT in a tenant's name."""
    agent = start_agent(
        f'[mqtt]\nurl = "{broker.url}"\ninfer = true\ninfer_tenant = "field"\n[[tenant]]\nid = "field"\n{tenant}\n'
        f'[[tenant]]\nid = "root"\nkey_sha256 = "{key_sha256(KEY)}"\nadmin = true\n{more}',
        **options,
    )
    agent.status = lambda: json.loads(told(agent, "/status"))
    agent.until(lambda status: status["mqtt_infer"]["link"]["subscriptions"] == 1)
    return agent


def told(agent: Any, path: str) -> bytes:
    asked = urllib.request.Request(agent.url + path, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=10) as response:
        content: bytes = response.read()
    return content


def audited(agent: Any) -> list[dict[str, Any]]:
    path: Path = agent.config.parent / "state/audit/field.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


#: Each is refused before anybody looks into its payload.
NO_REQUESTS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"ResponseTopic": f"{BASE}/status"}, 400),
    ({"ResponseTopic": REPLY, "UserProperty": (JSON_LENGTH, "-1")}, 400),
    ({"ResponseTopic": REPLY, "UserProperty": [(JSON_LENGTH, "1"), (JSON_LENGTH, "2")]}, 400),
    ({"ResponseTopic": REPLY, "text": "x" * 3000}, 413),
)


def test_what_is_no_request_counts_as_one_and_is_written_down(start_agent: Any, broker: Broker) -> None:
    agent = serving(start_agent, broker, "requests_per_s = 0.001\nburst = 6", http="max_body_bytes = 2000")
    sent = 0
    with Asker(broker.url, REPLY, f"{BASE}/infer/tiny/result") as asker:
        for properties, status in NO_REQUESTS:
            properties = dict(properties)
            body = json.dumps(request(properties.pop("text", "a good film"))).encode()
            sent += len(body)
            asker.ask(body, **properties)
            assert user(asker.next())["status"] == str(status)
        asker.ask(b"{", ResponseTopic=REPLY)
        assert user(asker.next())["status"] == "400"
        asker.ask(request("a good film"), ResponseTopic=REPLY)
        assert user(asker.next())["status"] == "200"
        sent += 1 + len(json.dumps(request("a good film")))
        asker.ask(b"{", ResponseTopic=REPLY)
        message = asker.next()
        assert user(message)["status"] == "429" and "requests_per_s" in json.loads(message.payload)["error"]
        assert int(user(message)["retry-after"]) > 0
    page = told(agent, "/metrics").decode()
    assert f'aios_tenant_received_bytes_total{{tenant="field"}} {sent}\n' in page
    assert 'aios_tenant_refused_total{tenant="field",limit="requests_per_s"} 1\n' in page
    assert agent.stop() == 0
    lines = audited(agent)
    assert [line["status"] for line in lines] == [400, 400, 400, 413, 400, 200, 429]
    assert {line["path"] for line in lines} == {f"{BASE}/infer/tiny"} and {line["model"] for line in lines} == {"tiny"}
    assert all(line["bytes_in"] and line["bytes_out"] for line in lines)
    assert [line["reason"] for line in lines[-2:]] == [lines[-2]["reason"], "requests_per_s"]


def test_what_there_is_no_room_for_counts_and_is_written_down(
    start_agent: Any, broker: Broker, small_batches: Path
) -> None:
    agent = serving(
        start_agent,
        broker,
        "bytes_per_day = 1_000_000",
        "[policy]\nqueue_limit = 1000\ndrain_s = 0.5\n[emulate]\nslowdown = 1000.0",
        bundle=small_batches,
        constants=UNREHEARSED,
    )
    patient = request("a good film", parameters={"timeout": 10**13})
    with Asker(broker.url, REPLY) as asker:
        for _ in range(330):
            asker.ask(patient, qos=0, ResponseTopic=REPLY)
        agent.until(lambda status: status["mqtt_infer"]["asked"] == 330)
        shed = agent.status()["mqtt_infer"]["shed"]
        assert shed > 0
        for _ in range(shed):
            message = asker.next()
            while user(message)["status"] == "200":
                message = asker.next()
            assert user(message)["status"] == "503" and user(message)["retry-after"] == "1"
    received = f'aios_tenant_received_bytes_total{{tenant="field"}} {330 * len(json.dumps(patient))}\n'
    assert received in told(agent, "/metrics").decode()
    assert agent.stop() == 0
    lines = audited(agent)
    assert len(lines) == 330
    assert Counter(line["reason"] for line in lines if line["status"] == 503 and line["request_id"] is None) == {
        "queue_full": shed
    }
