"""What must not leave doesn't: a cloud that keeps every byte it gets, beside an agent with every reason to send."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aios_edge.errors import SettingsError
from device_agent.answer import Unanswered
from device_agent.payload_audit import PayloadAudit
from device_agent.settings import check_model_names, parse_settings
from device_agent.values import Cloud, InferenceRequest, Reason

EAGER = "[policy]\nmin_confidence = 1.0\nqueue_limit = 4\nbreaker_failures = 100000\n[emulate]\nslowdown = 100.0\n"
PRIVATE, PUBLIC = "a film of zanzibar", "a film of timbuktu"


def under_every_pressure(agent: Any, text: str, model: str) -> list[tuple[int, str | None, str]]:
    """Unsure answers, deadlines that can't be met, a full queue, a killed worker, and clients that forbid nothing."""

    def ask(parameters: dict[str, Any]) -> tuple[int, str | None, str]:
        code, document, _ = agent.infer(text, model=model, **parameters)
        told = document.get("parameters", {})
        return code, told.get("route"), told.get("reason", "")

    outcomes = [ask({}), ask({"timeout": 20_000}), ask({"timeout": 5_000_000})]
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(ask, {"timeout": 300_000} if number % 2 else {}) for number in range(32)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent.status()["models"][model]["worker_pid"], signal.SIGKILL)
        outcomes += [future.result() for future in futures]
    return outcomes


def test_no_byte_of_a_model_that_never_leaves_reaches_the_cloud(
    start_agent: Any, make_bundle: Any, recording_cloud: Any
) -> None:
    other = make_bundle(name="other").path
    agent = start_agent(
        f'never_leave_device = true\n[[bundle]]\npath = "{other}"\n'
        f'[[cloud]]\nname = "c"\nurl = "{recording_cloud.url}"\n{EAGER}'
    )
    agent.until(lambda status: status["cloud"]["c"]["models"]["other"]["usable"])
    assert set(agent.status()["cloud"]["c"]["models"]) == {"other"}
    private = under_every_pressure(agent, PRIVATE, "tiny")
    assert {route for _, route, _ in private} <= {"local", None}
    assert {reason for _, route, reason in private if route} <= {"local_only", "retried"}
    assert any(code == 503 for code, _, _ in private), "refused rather than sent"
    assert recording_cloud.posts == []
    under_every_pressure(agent, PUBLIC, "other")
    assert b"timbuktu" in recording_cloud.received and recording_cloud.posts
    assert b"zanzibar" not in recording_cloud.received and b"tiny" not in recording_cloud.received
    status = agent.status()
    assert status["models"]["tiny"]["never_leave_device"] and not status["models"]["other"]["never_leave_device"]
    privacy = status["privacy"]
    assert privacy["never_leave_device"] == ["tiny"]
    assert privacy["private_payloads_sent"] == 0 and privacy["kept_back"] == 0
    assert privacy["payloads_sent"] == {"other": len(recording_cloud.posts)}
    with urllib.request.urlopen(f"{agent.url}/metrics") as page:
        text = page.read().decode()
    assert "aios_private_payloads_sent_total 0\n" in text and 'aios_payloads_sent_total{model="other"}' in text


def test_a_device_with_private_models_alone_never_calls_the_cloud(start_agent: Any, recording_cloud: Any) -> None:
    agent = start_agent(f'never_leave_device = true\n[[cloud]]\nname = "c"\nurl = "{recording_cloud.url}"\n{EAGER}')
    under_every_pressure(agent, PRIVATE, "tiny")
    assert bytes(recording_cloud.received) == b""


def request(model: str, *, local_only: bool = False) -> InferenceRequest:
    return InferenceRequest(
        request_id=1,
        model=model,
        body=b"{}",
        json_length=None,
        client_id=None,
        priority=0,
        deadline_at=None,
        local_only=local_only,
        arrived_at=0.0,
        cost_hint_bytes=1,
    )


def test_the_door_refuses_by_itself_and_the_count_would_tell_a_fault() -> None:
    audit = PayloadAudit()
    audit.keep("mine")
    assert audit.may_leave(request("theirs")) and audit.kept_back == 0
    assert not audit.may_leave(request("mine")) and not audit.may_leave(request("theirs", local_only=True))
    assert audit.kept_back == 2 and not audit.sent
    for each in (request("theirs"), request("mine"), request("theirs", local_only=True)):
        audit.left(each)
    assert audit.sent == {"theirs": 2, "mine": 1} and audit.private_sent == {"mine": 1, "theirs": 1}


def test_the_pool_asks_the_door_whatever_was_decided(recording_cloud: Any) -> None:
    from device_agent.cloud import CloudPool
    from device_agent.cloud_settings import CloudEndpoint
    from device_agent.settings import Policy

    async def main() -> None:
        endpoint = CloudEndpoint(name="c", url=recording_cloud.url)
        pool = CloudPool((endpoint,), Policy(), lambda kind, **detail: None)
        pool.audit.keep("tiny")
        for each in (request("tiny"), request("other", local_only=True)):
            outcome = await pool.infer(Cloud(Reason.PREDICTED_LATE, "c"), each, each.model)
            assert outcome == Unanswered(reason=Reason.CLOUD_FAILED, endpoints=("c",))
        assert pool.audit.kept_back == 2
        await pool.stop()

    asyncio.run(main())
    assert bytes(recording_cloud.received) == b""


def test_a_name_in_the_cloud_for_a_model_that_never_leaves_is_a_contradiction(tmp_path: Any) -> None:
    text = (
        '[device]\nid = "d"\nprofile = "rpi5"\n[[bundle]]\npath = "b"\nnever_leave_device = true\n'
        '[[cloud]]\nname = "c"\nurl = "http://x"\nmodel_map = {m = "n"}\n'
    )
    settings = parse_settings(text, where="agent.toml", base=tmp_path)
    with pytest.raises(SettingsError, match="never_leave_device"):
        check_model_names(settings, {"m": settings.bundle[0]})
