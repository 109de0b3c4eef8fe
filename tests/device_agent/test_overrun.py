"""A worker that doesn't answer in time keeps nobody waiting who has a deadline."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import infer
from worker_by_hand import Device, drive, due, until

from device_agent.answer import Answer, Unanswered
from device_agent.overrun import GRACE_S, Overrun, look_at, overrun
from device_agent.place import Place
from device_agent.router import There
from device_agent.ticket import Running, Ticket
from device_agent.values import Cloud, Reason, Shed

TIMES = st.floats(0.0, 10.0)


@given(TIMES, TIMES, TIMES, st.none() | st.tuples(TIMES, TIMES))
def test_nothing_is_decided_before_it_is_looked_at_and_somebody_looks_until_it_is(
    now: float, deadline_at: float, until: float, trip: tuple[float, float] | None
) -> None:
    def end_at(at: float) -> float:
        return until if at <= until else math.inf

    there = None if trip is None else There(endpoint="c", expected_s=min(trip), safe_s=max(trip))
    decision, at = overrun(now, deadline_at, end_at(now), there), look_at(now, deadline_at, until, there)
    if now >= deadline_at + GRACE_S:
        assert isinstance(decision, Shed) and decision.reason is Reason.DEADLINE_PASSED
        return
    assert now <= at <= deadline_at + GRACE_S
    if isinstance(decision, Cloud):
        assert there is not None and end_at(now) > deadline_at >= now + there.expected_s
    if decision is None:
        for part in (0.25, 0.5, 0.99):
            between = now + (at - now) * part
            if between < at:
                assert overrun(between, deadline_at, end_at(between), there) is None


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


class FailingCloud(Cloudy):
    """Far away, and it fails at once."""

    def choose(self, model: str, wanted: Any, now: float) -> There | None:  # type: ignore[override]
        return None if wanted.without else There(endpoint="c", expected_s=0.1, safe_s=0.3)

    soonest = choose  # type: ignore[assignment]

    async def infer(self, decision: Cloud, *_: Any, **__: Any) -> Answer | Unanswered:
        self.asked.append(decision.reason)
        return Unanswered(reason=Reason.CLOUD_FAILED, endpoints=("c",))


@pytest.mark.parametrize("end", ["die", "answer"])
@pytest.mark.parametrize("busy_s", [0.05, 0.001])
@pytest.mark.parametrize("workers", [1, 2])
def test_who_comes_back_from_a_cloud_that_failed_is_no_longer_the_old_batchs(
    tiny_bundle: Any, workers: int, busy_s: float, end: str
) -> None:
    cloud = FailingCloud()

    async def scenario(device: Device) -> None:
        answers: dict[int, int] = {}
        host, hung = device.host, device.workers[0]
        for number, request in ((1, due(1, 1.0, local_only=False)), (2, due(2, 100.0))):
            host.submit(request, lambda answer, number=number: answers.__setitem__(number, answer.status))  # type: ignore[misc]
        await until(lambda: bool(cloud.asked))
        await asyncio.sleep(0)
        getattr(hung, end)()
        for number in range(10, 15):
            device.ask(number)

        def all_answered() -> bool:
            for worker in device.workers:
                if worker.batches:
                    worker.answer()
            return len(answers) == 2 and len(device.told) == 5

        await until(all_answered)
        assert set(device.told.values()) == {200} and answers[2] == 200

    drive(tiny_bundle, scenario, workers=workers, busy_s=busy_s, cloud=cloud)


@pytest.mark.parametrize(
    ("deadline_s", "run_s", "ahead_s", "there", "goes_at"),
    [
        (0.5, 0.25, 0.0, There(endpoint="c", expected_s=0.1, safe_s=0.3), 0.25),  # the end is later than the chance
        (0.15, 0.1, 0.1, There(endpoint="c", expected_s=0.01, safe_s=0.1), 0.1),  # another batch is behind it
    ],
)
def test_it_is_looked_at_when_the_batch_should_have_ended(
    deadline_s: float, run_s: float, ahead_s: float, there: There, goes_at: float
) -> None:
    told: list[tuple[float, Any]] = []

    async def main() -> None:
        place, now = Place(), time.monotonic()
        request = due(1, deadline_s, local_only=False)
        ticket: Any = Ticket(
            request=request,
            pending=None,  # type: ignore[arg-type]
            on_verdict=lambda ticket, verdict: None,
            on_answer=lambda answer: None,
            waits=True,
        )
        place.running = ticket.held_by = Running([ticket], now, run_s)
        place.ahead = Running([], now, ahead_s)
        judge: Any = SimpleNamespace(there=lambda *_: there, soonest=lambda _: there)
        told_at = lambda ticket, decision: told.append((time.monotonic() - now, decision))  # noqa: E731
        Overrun([place], judge, time.monotonic, told_at).watch(place, place.running, now)
        await until(lambda: bool(told))

    asyncio.run(main())
    ((at, verdict),) = told
    assert isinstance(verdict, Cloud) and at >= goes_at, told


async def heard_from_the_worker(device: Device, cloud: Cloudy) -> None:
    """One whose worker is late, and answers when the cloud has been asked as well."""
    asked = asyncio.create_task(infer(device.host, due(1, 0.3, local_only=False)))
    await until(lambda: bool(cloud.asked))
    device.worker.answer()
    answer = await asked
    assert (answer.status, answer.route) == (200, "local")


def test_a_worker_that_answers_after_all_is_heard_and_the_cloud_given_up(tiny_bundle: Any) -> None:
    given_up = asyncio.Event()

    class Silent(Cloudy):
        async def infer(self, decision: Cloud, *_: Any, **__: Any) -> Answer | Unanswered:
            self.asked.append(decision.reason)
            try:
                await asyncio.sleep(60)
            finally:
                given_up.set()
            raise AssertionError

    cloud = Silent()

    async def scenario(device: Device) -> None:
        await heard_from_the_worker(device, cloud)
        await given_up.wait()
        late = asyncio.create_task(infer(device.host, due(2, 0.1, local_only=False)))
        await until(lambda: len(cloud.asked) == 2)
        assert (await late).status == 504, "neither answers"

    drive(tiny_bundle, scenario, cloud=cloud)


def test_a_cloud_that_can_not_be_asked_costs_nobody_the_workers_answer(tiny_bundle: Any) -> None:
    class Broken(Cloudy):
        async def infer(self, decision: Cloud, *_: Any, **__: Any) -> Answer | Unanswered:
            self.asked.append(decision.reason)
            raise RuntimeError("nobody thought of this")

    cloud = Broken()

    async def scenario(device: Device) -> None:
        await heard_from_the_worker(device, cloud)

    drive(tiny_bundle, scenario, cloud=cloud)
