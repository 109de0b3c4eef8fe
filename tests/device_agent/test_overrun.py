"""A worker that doesn't answer in time keeps nobody waiting who has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import infer
from worker_by_hand import Device, drive, until

from device_agent.answer import Answer, Unanswered
from device_agent.overrun import GRACE_S, look_at, overrun
from device_agent.rehearsal import rehearsal_batch
from device_agent.router import There
from device_agent.values import Cloud, InferenceRequest, Reason, Shed

TIMES = st.floats(0.0, 10.0)


@given(TIMES, TIMES, TIMES, st.none() | st.tuples(TIMES, TIMES))
def test_nothing_is_decided_before_it_is_looked_at_and_somebody_looks_until_it_is(
    now: float, deadline_at: float, end_at: float, trip: tuple[float, float] | None
) -> None:
    there = None if trip is None else There(endpoint="c", expected_s=min(trip), safe_s=max(trip))
    decision, at = overrun(now, deadline_at, end_at, there), look_at(now, deadline_at, there)
    if now >= deadline_at + GRACE_S:
        assert isinstance(decision, Shed) and decision.reason is Reason.DEADLINE_PASSED
        return
    assert now < at <= deadline_at + GRACE_S
    if isinstance(decision, Cloud):
        assert there is not None and end_at > deadline_at >= now + there.expected_s
    between = now + (at - now) * 0.5
    if decision is None and between < at:
        assert overrun(between, deadline_at, end_at, there) is None


def due(number: int, in_s: float, **changes: Any) -> InferenceRequest:
    now = time.monotonic()
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=now)
    return msgspec.structs.replace(made, request_id=number, deadline_at=now + in_s, **changes)


@pytest.mark.parametrize("workers", [1, 2])
def test_who_is_in_a_batch_that_hangs_hears_at_his_deadline_and_once(tiny_bundle: Any, workers: int) -> None:
    async def scenario(device: Device) -> None:
        answers: list[tuple[int, Answer, float]] = []

        def told(number: int) -> Callable[[Answer], None]:
            return lambda answer: answers.append((number, answer, time.monotonic()))

        asked = [due(number, in_s) for number, in_s in ((1, 0.06), (2, 0.03), (3, 0.12))]
        for request in asked:
            device.host.submit(request, told(request.request_id))
        device.ask(4)
        assert device.host.running
        await until(lambda: len(answers) == 3)
        for number, answer, at in answers:
            assert (answer.status, answer.reason) == (504, Reason.DEADLINE_PASSED)
            deadline_at = asked[number - 1].deadline_at
            assert deadline_at is not None and deadline_at <= at
        assert device.told == {}, "who has no deadline waits"
        while any(worker.batches for worker in device.workers):
            for worker in device.workers:
                if worker.batches:
                    worker.answer()
        await until(lambda: device.told == {4: 200})
        assert len(answers) == 3

    drive(tiny_bundle, scenario, workers=workers)


class Cloudy:
    """Stands for the pool: one endpoint, which answers in no time."""

    def __init__(self) -> None:
        self.asked: list[Reason] = []

    def choose(self, *_: Any) -> There:
        return There(endpoint="c", expected_s=0.005, safe_s=0.02)

    soonest = choose

    def unaffordable(self, *_: Any) -> None:
        return None

    async def infer(self, decision: Cloud, *_: Any, **__: Any) -> Answer | Unanswered:
        self.asked.append(decision.reason)
        return Answer(status=200, route="cloud", reason=decision.reason)


def test_the_cloud_has_it_while_that_is_in_time(tiny_bundle: Any) -> None:
    cloud = Cloudy()

    async def scenario(device: Device) -> None:
        request = due(1, 0.2, local_only=False)
        answer = await infer(device.host, request)
        assert request.deadline_at is not None and time.monotonic() < request.deadline_at
        assert (answer.status, answer.route, answer.reason) == (200, "cloud", Reason.PREDICTED_LATE)
        private = await infer(device.host, due(2, 0.05, local_only=True))
        assert private.status == 504 and len(cloud.asked) == 1
        while device.worker.batches:
            device.worker.answer()
        quick = asyncio.create_task(infer(device.host, due(3, 5.0, local_only=False)))
        await until(lambda: bool(device.worker.batches))
        device.worker.answer()
        assert (await quick).route == "local" and len(cloud.asked) == 1

    drive(tiny_bundle, scenario, cloud=cloud)
