"""A scripted Open Inference Protocol server on a real socket, and a pool of endpoints that asks it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from aios_edge.manifest import TensorSpec
from device_agent.cloud import CloudPool
from device_agent.cloud_choice import Wanted
from device_agent.cloud_fit import ModelShape
from device_agent.cloud_settings import CloudEndpoint
from device_agent.settings import Policy
from device_agent.values import Cloud, InferenceRequest, Reason

SHAPE = ModelShape(
    name="m",
    version="1.0.0",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1,)),),
    labels=("a", "b"),
    natural_inputs=("text",),
)
METADATA = {
    "name": "r",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
}
ANSWER = {"model_name": "r", "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}]}


class Server:
    """A scripted server: ``reply`` gives the raw answer to each inference."""

    def __init__(self, metadata: Any = METADATA, *, raw_metadata: bytes | None = None) -> None:
        self.metadata = metadata
        self.raw_metadata = raw_metadata
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.reply: Callable[[], bytes | None] = lambda: http(200, ANSWER)
        self.url = ""
        self.posts = 0
        self.pause_s = 0.0  # before each answer to an inference

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.seen.append((first, headers, body))
                if "/absent" in first:
                    reply: bytes | None = http(404, {"error": "no such model"})
                elif first.startswith("GET"):
                    reply = self.raw_metadata or http(200, self.metadata)
                else:
                    self.posts += 1
                    await asyncio.sleep(self.pause_s)
                    reply = self.reply()
                if reply is None:
                    await asyncio.sleep(30)
                    return
                writer.write(reply)
                await writer.drain()
                if b"connection: close" in reply:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def http(status: int, document: Any, more: str = "") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


@asynccontextmanager
async def serving(server: Server) -> Any:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def request(timeout_s: float | None = 5.0) -> InferenceRequest:
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}],
        "parameters": {"timeout": 1, "priority": 2},
    }
    now = time.monotonic()
    return InferenceRequest(
        request_id=1,
        model="m",
        body=json.dumps(body).encode(),
        json_length=None,
        client_id="7",
        priority=0,
        deadline_at=None if timeout_s is None else now + timeout_s,
        local_only=False,
        arrived_at=now,
        cost_hint_bytes=3,
    )


GO = Cloud(Reason.PREDICTED_LATE, "c")


def shape_of(bundle: Any) -> tuple[ModelShape, Any]:
    """A bundle's model, and the metadata of a server that has it."""
    shape = ModelShape.of(bundle.manifest)
    tensors = [
        [{"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)} for tensor in side]
        for side in (shape.inputs, shape.outputs)
    ]
    return shape, {"name": shape.name, "inputs": tensors[0], "outputs": tensors[1]}


@asynccontextmanager
async def asking(
    *servers: Server, shape: ModelShape = SHAPE, policy: Policy | None = None, draw: Any = None, **endpoint: Any
) -> AsyncIterator[tuple[CloudPool, list[Any]]]:
    """A pool of the endpoints ``a``, ``b``, ``c`` …, all usable, and its events; a list gives each its own setting."""
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(serving(server))
        events: list[Any] = []
        settings = tuple(
            CloudEndpoint(
                name="abc"[number],
                url=server.url,
                **{key: value[number] if isinstance(value, list) else value for key, value in endpoint.items()},
            )
            for number, server in enumerate(servers)
        )
        more = {} if draw is None else {"draw": draw}
        pool = CloudPool(settings, policy or Policy(), lambda kind, **_: events.append(kind), **more)
        pool.add(shape)
        pool.start()
        try:
            await until(lambda: all(one.models[shape.name].usable for one in pool.endpoints.values()))
            yield pool, events
        finally:
            await pool.stop()


def drive(
    scenario: Callable[[Server, CloudPool, list[Any]], Awaitable[None]],
    server: Server,
    *,
    state_dir: Path | None = None,
    **endpoint: Any,
) -> None:
    """Run a scenario with the pool of one endpoint, ``c``."""

    async def main() -> None:
        async with serving(server):
            events: list[Any] = []
            settings = CloudEndpoint(name="c", url=server.url, model_map={"m": "r:3"}, **endpoint)
            pool = CloudPool((settings,), Policy(breaker_backoff_s=0.05), lambda kind, **_: events.append(kind))
            pool.add(SHAPE)
            pool.start(state_dir)
            try:
                await asyncio.wait_for(scenario(server, pool, events), 20)
            finally:
                await pool.stop()

    asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - a condition in the code under test
        await asyncio.sleep(0.005)


def usable(pool: CloudPool, natural: bool = False) -> bool:
    return pool.choose("m", Wanted(natural=natural), time.monotonic()) is not None
