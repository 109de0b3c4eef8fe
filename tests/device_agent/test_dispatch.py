"""A model's worker changes, dies or is stopped with batches on their way: driven by hand, reply by reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
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


class ByHand:
    """Stands for the handle of a worker that answers when the test says so."""

    def __init__(self) -> None:
        self.ready, self.report, self.rss_bytes, self.pid = True, REPORT, None, None
        self.tells_classes, self.ready_at, self.spec = False, 0.0, None
        self.batches: list[tuple[Sequence[InferenceRequest], Callable[[Any], None]]] = []
        self.dies_when_killed = False

    def begin(self, requests: Sequence[InferenceRequest], on_end: Callable[[Any], None]) -> None:
        self.batches.append((requests, on_end))

    def answer(self) -> None:
        requests, on_end = self.batches.pop(0)
        items = tuple(
            wire.DoneItem(request_id=each.request_id, status=200, outputs=wire.Region(0, 2), length=5)
            for each in requests
        )
        done = wire.Done(batch_id=1, generation=1, busy_s=QUICK_S, cpu_s=0.0, rss_bytes=1, items=items)
        on_end(BatchResult(done=done, payload=memoryview(b"[]")))

    def die(self) -> None:
        self.ready = False
        dead, self.batches = self.batches, []
        for _, on_end in dead:
            on_end(WorkerLost("died", where="worker"))

    def kill(self) -> None:
        self.ready = False
        if self.dies_when_killed:
            asyncio.get_running_loop().call_soon(self.die)

    async def start(self, check: str = "full", timeout_s: float = 600.0) -> Any:
        self.ready = True
        return REPORT

    async def stop(self, grace_s: float = 5.0) -> None:
        self.die()


class Device:
    """A model with such a worker; ``told`` is what each request was answered, in the order of the answers."""

    def __init__(self, bundle: Any, **policy: Any) -> None:
        self.events: list[str] = []
        rules = Policy(**policy)
        around = Surroundings(
            rules=PolicyInForce(rules),
            cloud=CloudPool((), rules, lambda kind, **detail: None),
            emit=lambda kind, **detail: self.events.append(kind),
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
        )
        self.host = ModelHost(WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x"), bundle, around)
        self.worker = ByHand()
        self.host.instance.worker = self.worker  # type: ignore[assignment]
        self.host._learning.begin(QUICK_S)
        self.told: dict[int, int] = {}

    def ask(self, number: int, on_answer: Callable[[Answer], None] | None = None) -> None:
        (made,) = rehearsal_batch("tiny", (4,), pair=False, now=time.monotonic())
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
        await asyncio.sleep(0)
        await asyncio.wait_for(scenario(device), 10)
        await device.host.stop()

    asyncio.run(main())
    assert device is not None
    return device


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for is told by nobody
        await asyncio.sleep(0.002)


def test_a_worker_that_dies_in_its_last_batch_leaves_the_next_one_serving(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        device.ask(1)
        successor = device.hand_over()
        device.ask(2)
        device.worker.die()
        while len(device.told) < 2:
            await until(lambda: bool(successor.batches))
            successor.answer()
        device.ask(3)
        await until(lambda: bool(successor.batches))
        successor.answer()
        await asyncio.wait_for(device.host.drain(), 5)

    assert drive(tiny_bundle, scenario).told == {1: 200, 2: 200, 3: 200}


def test_the_watchdog_ends_the_worker_that_hangs_and_not_its_successor(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        device.worker.dies_when_killed = True
        device.ask(1)
        successor = device.hand_over()
        device.ask(2)
        await until(lambda: not device.worker.ready)
        while len(device.told) < 2:
            await until(lambda: bool(successor.batches))
            successor.answer()
        assert successor.ready

    assert drive(tiny_bundle, scenario, batch_timeout_s=0.2).told == {1: 200, 2: 200}


def test_a_model_that_is_stopped_in_a_batch_has_not_crashed(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        device.ask(1)
        await device.host.stop()
        assert device.host.state == "stopped" and not device.host.running

    device = drive(tiny_bundle, scenario)
    assert device.told == {1: 503} and device.events == []


def test_a_batch_that_went_ahead_teaches_nothing_of_the_way_to_the_worker(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.dispatch.LEARN_EVERY_S", 0.0)

    async def scenario(device: Device) -> None:
        before = device.host.service.overhead_s
        for number in range(1, 100):
            device.ask(number)
            if number > 2:
                device.worker.answer()
        assert len(device.worker.batches) == 2, "one runs, and one is ahead"
        assert device.host.service.overhead_s > 0.5 * before

    drive(tiny_bundle, scenario)


@pytest.mark.parametrize("fault", ["between the batches", "in an answer's way out"])
def test_a_fault_costs_no_other_request_its_answer(
    tiny_bundle: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    async def scenario(device: Device) -> None:
        if fault == "between the batches":
            monkeypatch.setattr(device.host.instance.recycling, "look", fails)
        device.ask(1, fails if fault.startswith("in") else None)
        device.ask(2)
        for _ in range(2):
            device.worker.answer()
        await asyncio.wait_for(device.host.drain(), 5)
        assert device.told.pop(2) == 200 and not device.host.running

    drive(tiny_bundle, scenario)


def test_a_successor_tells_what_its_predecessor_told_when_it_took_over(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        successor = ByHand()
        device.worker.tells_classes = True  # since the successor began to load
        assert device.host.instance.hand_over(device.worker, successor)  # type: ignore[arg-type]
        assert successor.tells_classes

    drive(tiny_bundle, scenario)


def test_reviews_out_of_turn_leave_one_timer(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        timers: list[asyncio.TimerHandle] = []
        loop = asyncio.get_running_loop()
        real = loop.call_later
        loop.call_later = lambda *given: timers.append(real(*given)) or timers[-1]  # type: ignore[assignment, func-returns-value]
        review = device.host._review
        review._judge.next_review_at = lambda now: now + 60.0  # type: ignore[method-assign]
        for _ in range(5):
            review.run()
        assert sum(not timer.cancelled() for timer in timers) == 1
        review.cancel()

    drive(tiny_bundle, scenario)
