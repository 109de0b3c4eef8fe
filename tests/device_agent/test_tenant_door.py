"""The tenant door by itself, where a real client could not be made to behave just so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from device_agent.http import Reply
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.tenant_door import TenantDoor
from device_agent.tenants import Tenant, key_sha256
from device_agent.values import Completion

TENANTS = (Tenant(id="a", key_sha256=key_sha256("key-a"), models=("m",)),)


class Deployment:
    hosts = {"m": None}  # noqa: RUF012
    refused = ()

    def knows(self, model: str) -> bool:
        return model in self.hosts


class Desk:
    """Answers when it is told to."""

    draining = False

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.asked = asyncio.Event()

    async def infer(
        self,
        model: str,
        version: str | None,
        body: bytes,
        length: int | None,
        tenant: Tenant,
        within_s: float | None = None,
    ) -> Reply:
        self.asked.set()
        await self.answers.wait()
        done = Completion(
            model=model, route="local", reason="idle", status=200, latency_s=0.0, request_id=7, client_id="c" * 1000
        )
        return Reply(body=b"{}", completion=done)


def scope(key: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v2/models/m/infer",
        "raw_path": b"/v2/models/m/infer",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "state": {},
    }


def visit(tmp_path: Path, *, stays: bool) -> tuple[list[dict[str, Any]], dict[str, Any], list[Completion]]:
    """What was sent, what the audit says, and what was recorded of one request, whose client stays or goes away."""
    sent: list[dict[str, Any]] = []
    recorded: list[Completion] = []

    async def run() -> None:
        desk, gone = Desk(), asyncio.Event()
        books = TenantBooks.of(TENANTS, tmp_path, lambda kind, **_: None, lambda address: None)
        messages = [
            {"type": "http.request", "body": b"x" * 5, "more_body": True},
            {"type": "http.request", "body": b"y"},
        ]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        door: Any = TenantDoor(
            TenantDesks(TENANTS, desk, Deployment(), books),  # type: ignore[arg-type]
            desk,  # type: ignore[arg-type]
            books,
            max_body_bytes=100,
            record=recorded.append,
        )
        request = asyncio.create_task(door(scope("key-a"), receive, send))
        await desk.asked.wait()
        (desk.answers if stays else gone).set()
        await request
        await books.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    (line,) = (tmp_path / "audit" / "a.jsonl").read_text().splitlines()
    return sent, json.loads(line), recorded


def test_who_is_answered_is_counted_once_and_written_down(tmp_path: Path) -> None:
    sent, line, recorded = visit(tmp_path, stays=True)
    assert sent[0]["status"] == 200 and [done.request_id for done in recorded] == [7]
    assert (line["status"], line["bytes_in"], line["bytes_out"], line["request_id"]) == (200, 6, 2, 7)
    assert line["id"] == "c" * 200, "what a client chooses freely is cut"


def test_who_goes_away_is_written_down_as_such(tmp_path: Path) -> None:
    sent, line, recorded = visit(tmp_path, stays=False)
    assert sent == [] and recorded == []
    assert (line["status"], line["bytes_in"], line["bytes_out"], line["model"]) == (None, 6, 0, "m")
