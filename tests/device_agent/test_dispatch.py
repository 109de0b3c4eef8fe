"""A model's worker changes, dies or is stopped with batches on their way: driven by hand, reply by reply."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from worker_by_hand import ByHand, Device, drive, until


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

    drive(tiny_bundle, scenario, still_clock=True)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_short_request_goes_ahead_of_its_turn_only_where_nobody_could_join_it(
    tiny_bundle: Any, one_by_one: bool
) -> None:
    async def scenario(device: Device) -> None:
        device.host._learning._one_by_one = one_by_one
        device.host._learning.begin(0.0001, 4)
        device.ask(1, tokens=120)
        device.ask(2, tokens=2)
        assert len(device.worker.batches) == (2 if one_by_one else 1)
        while device.worker.batches:
            device.worker.answer()

    assert drive(tiny_bundle, scenario, still_clock=True).told == {1: 200, 2: 200}


@pytest.mark.parametrize("status", [-1, 0, 199, 600, 999])
def test_a_worker_that_answers_with_no_status_is_ended(tiny_bundle: Any, status: int) -> None:
    async def scenario(device: Device) -> None:
        device.worker.dies_when_killed = True
        device.ask(1)
        device.worker.answer(status)
        assert not device.worker.ready
        await until(lambda: device.worker.ready and bool(device.worker.batches))
        device.worker.answer()

    assert drive(tiny_bundle, scenario).told == {1: 200}, "from the next one, or nobody would hear"


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

    drive(tiny_bundle, scenario, still_clock=True)


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
