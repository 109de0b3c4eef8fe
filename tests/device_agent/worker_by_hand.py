"""A model whose workers answer when a test says so, reply by reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
from scripted_worker import REPORT

from aios_edge.errors import WorkerLost
from device_agent import wire
from device_agent.answer import Answer, Energy
from device_agent.cloud import CloudPool
from device_agent.model_host import ModelHost
from device_agent.policy_in_force import PolicyInForce
from device_agent.rehearsal import rehearsal_batch
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerSpec

QUICK_S = 0.001  # of a batch: so short that the next one goes ahead


def due(number: int, in_s: float, **changes: Any) -> InferenceRequest:
    now = time.monotonic()
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=now)
    return msgspec.structs.replace(made, request_id=number, deadline_at=now + in_s, **changes)


class ByHand:
    """Stands for the handle of a worker that answers when the test says so."""

    def __init__(self, spec: WorkerSpec | None = None, device: Device | None = None) -> None:
        self.on_lost: Callable[[str], None] = lambda how: None
        self.device = device
        self.ready, self.report, self.rss_bytes, self.pid = True, REPORT, None, None
        self.tells_classes, self.ready_at, self.spec = False, 0.0, spec
        self.batches: list[tuple[Sequence[InferenceRequest], Callable[[Any], None]]] = []
        self.dies_when_killed = self.ended = False

    @property
    def takes(self) -> bool:
        return self.ready and not self.ended

    def begin(self, requests: Sequence[InferenceRequest], on_end: Callable[[Any], None]) -> None:
        self.batches.append((requests, on_end))

    def answer(self, status: int = 200) -> None:
        requests, on_end = self.batches.pop(0)
        items = tuple(
            wire.DoneItem(request_id=each.request_id, status=status, outputs=wire.Region(0, 2), length=5)
            for each in requests
        )
        done = wire.Done(batch_id=1, generation=1, busy_s=QUICK_S, rss_bytes=1, items=items)
        on_end(BatchResult(done=done, payload=memoryview(b"[]")))

    def die(self) -> None:
        self.ready, self.ended = False, True
        dead, self.batches = self.batches, []
        for _, on_end in dead:
            on_end(WorkerLost("died", where="worker"))
        self.on_lost("died")

    def kill(self) -> None:
        self.ready = False
        if self.dies_when_killed:
            asyncio.get_running_loop().call_soon(self.die)

    async def start(self, check: str = "full", timeout_s: float = 600.0) -> Any:
        if self.device is not None:
            await self.device.before_start()
        self.ready, self.ended = True, False
        return REPORT

    async def stop(self, grace_s: float = 5.0) -> None:
        if self.ready or self.batches:
            self.on_lost = lambda how: None  # whoever stops it knows
            self.die()

    async def retire(self) -> None:
        while self.batches:  # noqa: ASYNC110 - as the real one, which is told
            await asyncio.sleep(0)
        await self.stop()

    def successor(self, spec: WorkerSpec | None = None, on_lost: Callable[[str], None] | None = None) -> ByHand:
        made = ByHand(spec or self.spec, self.device)
        made.ready, made.on_lost = False, on_lost or self.on_lost
        return made


class Device:
    """A model with such workers, of which ``worker`` is the first; ``told`` is what each request was answered, in the
    order of the answers. ``before_start``: what a worker's start waits for, or fails of. ``still_clock``: it
    stands still."""

    def __init__(
        self,
        bundle: Any,
        *,
        workers: int = 1,
        busy_s: float = QUICK_S,
        cloud: Any = None,
        still_clock: bool = False,
        **policy: Any,
    ) -> None:
        now = time.monotonic()
        self.events: list[str] = []
        self.before_start: Callable[[], Awaitable[None]] = self.at_once
        rules = Policy(**policy)
        around = Surroundings(
            rules=PolicyInForce(rules),
            cloud=cloud or CloudPool((), rules, lambda kind, **detail: None),
            emit=lambda kind, **detail: self.events.append(kind),
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
            clock=(lambda: now) if still_clock else time.monotonic,
        )
        spec = WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x", workers=workers)
        self.host = ModelHost(spec, bundle, around)
        for place in self.host.instance.places:
            made = ByHand(place.worker.spec, self)
            made.on_lost = place.worker._on_lost
            place.worker = made  # type: ignore[assignment]
        self.worker = self.workers[0]
        self.host._learning.begin(busy_s)
        self.told: dict[int, int] = {}

    @property
    def workers(self) -> list[ByHand]:
        """Those at the model's places now."""
        return [place.worker for place in self.host.instance.places]  # type: ignore[misc]

    async def at_once(self) -> None:
        """Nothing to wait for."""

    def ask(self, number: int, on_answer: Callable[[Answer], None] | None = None, *, tokens: int = 4) -> None:
        (made,) = rehearsal_batch("tiny", (tokens,), pair=False, now=time.monotonic())
        request = SimpleNamespace(**{name: getattr(made, name) for name in made.__struct_fields__})
        request.request_id = number
        self.host.submit(
            InferenceRequest(**vars(request)),
            on_answer or (lambda answer: self.told.__setitem__(number, answer.status)),
        )

    def hand_over(self) -> ByHand:
        successor = ByHand()
        assert self.host.instance.hand_over(self.worker, successor)  # type: ignore[arg-type]
        return successor


def drive(bundle: Any, scenario: Callable[[Device], Awaitable[None]], **policy: Any) -> Device:
    device: Device | None = None

    async def main() -> None:
        nonlocal device
        device = Device(bundle, **policy)
        device.host.instance.open()
        device.host._begin()
        await device.host.muster()
        await asyncio.sleep(0)
        await asyncio.wait_for(scenario(device), 10)
        await device.host.stop()

    asyncio.run(main())
    assert device is not None
    return device


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for is told by nobody
        await asyncio.sleep(0.002)
