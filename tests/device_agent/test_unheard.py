"""Who goes away when the answer is there and hasn't been told: the inference was made, and is counted as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from device_agent.desk import FrontDesk
from device_agent.grpc_door.callers import Callers, Visit
from device_agent.grpc_door.calls import Infer
from device_agent.grpc_door.door import GrpcDoor
from device_agent.grpc_door.request import InferBody
from device_agent.grpc_door.slow_calls import SlowCalls
from device_agent.http import ON_GONE, HttpApp, Reply
from device_agent.values import Completion

DONE = Completion(model="m", route="local", reason="idle", status=200, latency_s=0.0, request_id=7)


class Desk(FrontDesk):
    """The real one's way to await an answer, which is given by hand."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left = 0

    def submit(self, *given: Any, **_: Any) -> Callable[[], None]:
        self.on_reply: Callable[[Reply], None] = given[4]
        self.asked.set()

        def leave() -> None:
            self.left += 1

        return leave


@pytest.mark.parametrize("answered", [True, False])
def test_over_http(answered: bool) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to read it")

    async def scenario() -> None:
        desk, recorded, on_gone = Desk(), list[Completion](), set[Callable[[], None]]()
        app = HttpApp(desk, max_body_bytes=100, record=recorded.append)
        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": [], ON_GONE: on_gone}
        task = asyncio.create_task(app(scope, receive, send))
        await desk.asked.wait()
        if answered:
            desk.on_reply(Reply(body=b"{}", completion=DONE))
        for leave in tuple(on_gone):  # in the same turn of the loop
            leave()
        await task
        assert recorded == ([DONE] if answered else []) and desk.left == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("answered", [True, False])
def test_over_grpc(answered: bool) -> None:
    async def scenario() -> None:
        desk, recorded = Desk(), list[Completion]()
        visit = Visit(desk, recorded.append, "/inference.GRPCInferenceService/ModelInfer")
        callers: Callers = None  # type: ignore[assignment]
        slow: SlowCalls = None  # type: ignore[assignment]
        asked = Infer(model="m", version=None, id="", made=InferBody(body=b"{}", json_length=2, raw=True))
        task = asyncio.create_task(GrpcDoor(callers, slow).answered(visit, "ModelInfer", asked))
        await desk.asked.wait()
        if answered:
            desk.on_reply(Reply(body=b"{}", completion=DONE))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        visit.end(None)
        assert recorded == ([DONE] if answered else []) and desk.left == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))
