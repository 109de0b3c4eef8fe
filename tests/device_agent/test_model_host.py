"""One model's host against a worker that does what a test wants: who is answered, when, and what is learnt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from scripted_worker import REPORT, Batches, infer

from aios_edge.errors import BundleRefused, WorkerLost
from device_agent import wire
from device_agent.answer import Answer, Energy, Unanswered
from device_agent.cloud import CloudPool
from device_agent.cloud_choice import Wanted
from device_agent.model_host import ModelHost
from device_agent.policy_in_force import PolicyInForce
from device_agent.rehearsal import rehearsal_batch
from device_agent.router import There
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import ActivationReport, Cloud, InferenceRequest, Reason
from device_agent.worker_pool import BatchResult, WorkerSpec

Run = Callable[[Sequence[InferenceRequest]], Awaitable[BatchResult]]


class Worker(Batches):
    """Stands for the handle: ``on_run`` answers batches, ``on_start`` may raise."""

    def __init__(self) -> None:
        self.ready = False
        self.report = None
        self.rss_bytes = None
        self.pid = None
        self.starts = 0
        self.killed = asyncio.Event()
        self.busy_s = 0.01
        self.on_run: Run = self.answered
        self.on_start: Callable[[str], None] = lambda check: None
        self.on_begin: Callable[[], None] = lambda: None

    async def start(self, check: str = "full", timeout_s: float = 600.0) -> ActivationReport:
        await asyncio.sleep(0)
        self.on_start(check)
        self.starts += 1
        self.killed.clear()
        self.ready = True
        return REPORT

    async def run(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        return await self.on_run(requests)

    def begin(self, requests: Sequence[InferenceRequest], on_end: Callable[[BatchResult | WorkerLost], None]) -> None:
        self.on_begin()
        super().begin(requests, on_end)

    async def stop(self, grace_s: float = 5.0) -> None:
        self.ready = False

    def kill(self) -> None:
        self.ready = False
        self.killed.set()

    async def answered(self, requests: Sequence[InferenceRequest], status: int = 200, **changes: Any) -> BatchResult:
        items = tuple(
            wire.DoneItem(
                **{
                    "request_id": each.request_id,
                    "status": status,
                    "outputs": wire.Region(0, 2),
                    "length": 5,
                    **changes,
                }
            )
            for each in requests
        )
        done = wire.Done(batch_id=1, generation=1, busy_s=self.busy_s, rss_bytes=1, items=items)
        return BatchResult(done=done, payload=memoryview(b"[]"))

    def held(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Answers nothing until the second is set; the first is, once it has a batch."""
        running, go_on = asyncio.Event(), asyncio.Event()

        async def waits(requests: Sequence[InferenceRequest]) -> BatchResult:
            running.set()
            await go_on.wait()
            return await self.answered(requests)

        self.on_run = waits
        return running, go_on

    async def hangs(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        await self.killed.wait()
        raise WorkerLost("was killed by SIGKILL", where="worker")


class Endpoints:
    """Stands for the pool: ``a`` and ``b``, both near. ``on_infer`` answers; ``asked`` is what it was asked with."""

    def __init__(self, on_infer: Callable[[Cloud], Answer | Unanswered]) -> None:
        self.on_infer = on_infer
        self.asked: list[tuple[str, Reason, tuple[str, ...]]] = []

    def choose(self, model: str, wanted: Wanted, now: float) -> There | None:
        return next((There(endpoint=name, expected_s=0, safe_s=0) for name in "ab" if name not in wanted.without), None)

    soonest = choose

    def unaffordable(self, model: str, wanted: Wanted, now: float) -> There | None:
        return None

    async def infer(
        self, decision: Cloud, request: InferenceRequest, model: str, *, tried: tuple[str, ...] = ()
    ) -> Answer | Unanswered:
        self.asked.append((decision.endpoint, decision.reason, tried))
        return self.on_infer(decision)


def request(number: int = 1) -> InferenceRequest:
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=0.0)
    return msgspec.structs.replace(made, request_id=number)


def drive(
    bundle: Any,
    scenario: Callable[[ModelHost, Worker, list[Any]], Awaitable[None]],
    *,
    cloud: Any = None,
    strain: Callable[[], Reason | None] = lambda: None,
    busy_s: float = 0.01,
    **policy: Any,
) -> None:
    async def main() -> None:
        events: list[Any] = []
        rules = Policy(**policy)

        def emit(kind: str, **detail: Any) -> None:
            events.append((kind, detail))

        around = Surroundings(
            rules=PolicyInForce(rules),
            cloud=cloud or CloudPool((), rules, emit),
            emit=emit,
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
            strain=strain,
        )
        host = ModelHost(WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x"), bundle, around)
        worker = Worker()
        worker.busy_s = busy_s
        host.instance.worker = worker  # type: ignore[assignment]
        await host.activate()
        try:
            await asyncio.wait_for(scenario(host, worker, events), 10)
        finally:
            await host.stop()

    asyncio.run(main())


def test_a_batch_that_never_ends_costs_its_worker_and_not_the_model(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        async def once(requests: Sequence[InferenceRequest]) -> BatchResult:
            worker.on_run = worker.answered
            return await worker.hangs(requests)

        worker.on_run = once
        answer = await infer(host, request(1))
        assert answer.status == 200 and answer.reason.value == "retried"
        assert events[0][0] == "worker_crashed" and "0.2 s" in events[0][1]["how"]
        assert (await infer(host, request(2))).status == 200

    drive(tiny_bundle, scenario, batch_timeout_s=0.2)


def test_a_request_that_hangs_every_worker_is_answered_too(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        worker.on_run = worker.hangs
        answer = await infer(host, request(1))
        assert answer.status == 503 and answer.reason.value == "worker_lost"

    drive(tiny_bundle, scenario, batch_timeout_s=0.1)


@pytest.mark.parametrize("fault", ["a region outside the payload", "an exception nobody knows"])
def test_no_fault_of_one_batch_ends_the_serving(tiny_bundle: Any, fault: str) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        async def faulty(requests: Sequence[InferenceRequest]) -> BatchResult:
            return await worker.answered(requests, outputs=wire.Region(0, 1000))

        def refuse() -> None:
            raise OSError("too many open files")

        if fault.startswith("an exception"):
            worker.on_begin = refuse
        else:
            worker.on_run = faulty
        answer = await infer(host, request(1))
        assert answer.status == 503
        worker.on_run, worker.on_begin = worker.answered, lambda: None
        assert (await infer(host, request(2))).status == 200

    drive(tiny_bundle, scenario)


def test_a_restart_that_fails_in_an_unknown_way_is_tried_again(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        def once(check: str) -> None:
            worker.on_start = lambda check: None
            raise OSError("too many open files")

        worker.on_start = once
        worker.kill()
        host._dispatch._wake.set()
        answer = await infer(host, request(1))
        assert answer.status in (200, 503)
        while host.state != "ready":  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0.005)
        assert (await infer(host, request(2))).status == 200

    drive(tiny_bundle, scenario)


def test_who_has_no_deadline_hears_that_the_worker_does_not_come_back(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        def refuse(check: str) -> None:
            raise BundleRefused("digest", "model.onnx was altered")

        worker.on_start = refuse
        worker.kill()
        host._dispatch._wake.set()
        answer: Answer = await infer(host, request(1))
        assert answer.status == 503 and answer.retry_after_s
        assert any(kind == "contract_broken" for kind, _ in events)

    drive(tiny_bundle, scenario)


def test_who_waits_for_a_model_that_is_quarantined_is_told_so(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        async def dies(requests: Sequence[InferenceRequest]) -> BatchResult:
            worker.ready = False
            raise WorkerLost("was killed by SIGSEGV", where="worker")

        worker.on_run = dies
        alone = [msgspec.structs.replace(request(number), deadline_at=None) for number in (1, 2, 3)]
        answers = await asyncio.gather(*(infer(host, each) for each in alone))
        assert {answer.status for answer in answers} == {503}
        assert answers[-1].reason is Reason.QUARANTINED and answers[-1].retry_after_s == pytest.approx(600.2, abs=1)
        assert host.state == "quarantined" and not host.queued
        assert (await infer(host, alone[0])).reason is Reason.QUARANTINED
        assert [kind for kind, _ in events].count("quarantined") == 1

    drive(tiny_bundle, scenario, quarantine_crashes=2, quarantine_pause_s=600.0)


def test_refused_requests_teach_nothing_about_how_long_good_ones_take(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        before = host.service.busy_s(30.0)

        async def refusing(requests: Sequence[InferenceRequest]) -> BatchResult:
            result = await worker.answered(requests, status=400, error="no", length=0)
            return BatchResult(done=msgspec.structs.replace(result.done, busy_s=1e-5), payload=result.payload)

        worker.on_run = refusing
        for number in range(1, 60):
            assert (await infer(host, request(number))).status == 400
        assert host.service.busy_s(30.0) == pytest.approx(before, rel=0.01)

    drive(tiny_bundle, scenario)


def test_a_start_that_swallows_its_cancellation_does_not_keep_the_host_from_stopping(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        starting, swallowed = asyncio.Event(), []

        async def start(check: str = "full", timeout_s: float = 600.0) -> ActivationReport:
            starting.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(True)
            worker.ready = True
            return REPORT

        worker.start = start  # type: ignore[method-assign]
        worker.kill()
        host._dispatch._wake.set()
        await starting.wait()
        await asyncio.wait_for(host.stop(), 5)
        assert swallowed

    drive(tiny_bundle, scenario)


def test_who_waits_without_a_deadline_is_sent_away_too_once_the_device_is_to_be_spared(tiny_bundle: Any) -> None:
    strains: list[Reason | None] = [None]
    cloud = Endpoints(lambda decision: Answer(status=200, route="cloud", reason=decision.reason))

    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        running, go_on = worker.held()
        without = [
            msgspec.structs.replace(request(number), deadline_at=None, local_only=number == 3) for number in (1, 2, 3)
        ]
        first = asyncio.create_task(infer(host, without[0]))
        await running.wait()
        others = [asyncio.create_task(infer(host, each)) for each in without[1:]]
        while host.queued < 2:  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0)
        strains[0] = Reason.HOT
        go_on.set()
        told = [(answer.route, answer.reason.value) for answer in await asyncio.gather(first, *others)]
        assert told == [("local", "no_deadline"), ("cloud", "hot"), ("local", "local_only")]

    drive(tiny_bundle, scenario, cloud=cloud, strain=lambda: strains[0])


def test_who_would_wait_too_long_without_a_deadline_goes_to_the_cloud(tiny_bundle: Any) -> None:
    cloud = Endpoints(lambda decision: Answer(status=200, route="cloud", reason=decision.reason))

    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        running, go_on = worker.held()
        patient = [
            msgspec.structs.replace(request(number), deadline_at=None, local_only=False) for number in range(1, 100)
        ]
        first = asyncio.create_task(infer(host, patient[0]))
        await running.wait()
        places = host.room.limit
        assert places is not None and places < 50, "a batch takes some 10 ms"
        others = [asyncio.create_task(infer(host, each)) for each in patient[1 : places + 1]]
        while host.queued < places:  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0)
        answer = await infer(host, patient[places + 1])
        assert (answer.route, answer.reason) == ("cloud", Reason.QUEUE_FULL)
        go_on.set()
        assert {answer.route for answer in await asyncio.gather(first, *others)} == {"local"}

    drive(tiny_bundle, scenario, cloud=cloud, queue_delay_s=0.05)


def test_the_earliest_deadline_runs_first_and_who_would_delay_another_is_refused(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        running, go_on = asyncio.Event(), asyncio.Event()
        ran: list[int] = []

        async def slow(requests: Sequence[InferenceRequest]) -> BatchResult:
            running.set()
            await go_on.wait()
            ran.extend(each.request_id for each in requests)
            return await worker.answered(requests)

        worker.on_run = slow
        now = time.monotonic()
        asked = [msgspec.structs.replace(request(number), deadline_at=now + 9.0 - number) for number in (1, 2, 3)]
        tasks = []
        for each in asked:
            tasks.append(asyncio.create_task(infer(host, each)))
            await running.wait()
        while host.queued < 2:  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0)
        late = await infer(host, msgspec.structs.replace(request(4), deadline_at=time.monotonic() + 0.001))
        assert late.status == 503 and late.reason is Reason.LOCAL_ONLY
        go_on.set()
        assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3
        assert ran == [1, 3, 2]

    drive(tiny_bundle, scenario)


def test_a_second_opinion_knows_which_endpoint_failed_the_request_before(tiny_bundle: Any) -> None:
    strains: list[Reason | None] = [Reason.HOT]

    def answered(decision: Cloud) -> Answer | Unanswered:
        if decision.endpoint == "a":
            strains[0] = None  # so this device answers it, after all
            return Unanswered(reason=Reason.CLOUD_FAILED, endpoints=("a",))
        return Answer(status=200, route="cloud", reason=decision.reason)

    cloud = Endpoints(answered)

    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        worker.on_run = lambda requests: worker.answered(requests, confidence=0.1)
        for number, deadline_at in ((1, None), (2, asyncio.get_running_loop().time() + 5.0)):
            cloud.asked.clear()
            strains[0] = Reason.HOT
            answer = await infer(
                host, msgspec.structs.replace(request(number), deadline_at=deadline_at, local_only=False)
            )
            assert answer.route == "cloud" and answer.reason is Reason.LOW_CONFIDENCE
            assert answer.batch_size == 1 and answer.energy and answer.compute_s is not None, "it ran here, too"
            assert cloud.asked == [("a", Reason.HOT, ()), ("b", Reason.LOW_CONFIDENCE, ("a",))]

    drive(tiny_bundle, scenario, cloud=cloud, strain=lambda: strains[0], min_confidence=0.6)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a condition in the code under test
        await asyncio.sleep(0)


class Held:
    """Answers a batch when the test says so: ``batches`` are the request ids of those the worker was given."""

    def __init__(self, worker: Worker) -> None:
        self.batches: list[list[int]] = []
        self.go_on: list[asyncio.Event] = []
        self._worker = worker
        worker.on_run = self.run

    async def run(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        self.batches.append([each.request_id for each in requests])
        self.go_on.append(event := asyncio.Event())
        killed, released = (asyncio.ensure_future(e.wait()) for e in (self._worker.killed, event))
        await asyncio.wait((killed, released), return_when=asyncio.FIRST_COMPLETED)
        killed.cancel(), released.cancel()
        if not event.is_set():
            raise WorkerLost("was killed by SIGKILL", where="worker")
        return await self._worker.answered(requests)


def test_where_batches_are_short_the_worker_has_one_more_and_never_two(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        held = Held(worker)
        asked = []
        for number in range(1, 5):
            asked.append(asyncio.create_task(infer(host, request(number))))
            await until(lambda: host.running + host.queued == len(asked))
        await until(lambda: len(held.batches) == 2)
        assert held.batches == [[1], [2]] and (host.running, host.queued) == (2, 2)
        held.go_on[0].set()
        await until(lambda: len(held.batches) == 3)
        assert held.batches == [[1], [2], [3, 4]] and asked[0].done() and not asked[1].done()
        held.go_on[1].set(), held.go_on[2].set()
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 4
        assert host.running == 0 and host.instance.free_at(7.0) == 7.0

    drive(tiny_bundle, scenario, busy_s=0.001)


def test_where_batches_are_long_whoever_comes_may_still_join(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        held = Held(worker)
        asked = [asyncio.create_task(infer(host, request(number))) for number in (1, 2)]
        await until(lambda: host.running + host.queued == 2 and len(held.batches) == 1)
        first = held.batches[0]
        asked += [asyncio.create_task(infer(host, request(number))) for number in (3, 4)]
        await until(lambda: host.running + host.queued == 4)
        assert held.batches == [first]
        held.go_on[0].set()
        await until(lambda: len(held.batches) == 2)
        assert sorted(first + held.batches[1]) == [1, 2, 3, 4]
        held.go_on[1].set()
        await asyncio.gather(*asked)

    drive(tiny_bundle, scenario, busy_s=0.02)


def test_a_death_is_laid_to_the_batch_that_ran_and_not_to_the_one_behind_it(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        held = Held(worker)
        asked = []
        for number in (1, 2):
            asked.append(asyncio.create_task(infer(host, request(number))))
            await until(lambda: len(held.batches) == len(asked))
        worker.kill()
        await until(lambda: len(held.batches) >= 3)
        while not all(task.done() for task in asked):
            for event in held.go_on:
                event.set()
            await asyncio.sleep(0)
        answers = [await task for task in asked]
        assert [answer.status for answer in answers] == [200, 200]
        assert [answer.reason.value for answer in answers] == ["retried", "local_only"]
        assert [kind for kind, _ in events].count("worker_crashed") == 1
        assert [detail["in_flight"] for kind, detail in events if kind == "worker_crashed"] == [1]

    drive(tiny_bundle, scenario, busy_s=0.001)


def test_when_the_host_stops_the_batch_that_went_ahead_is_told_too(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, worker: Worker, events: list[Any]) -> None:
        held = Held(worker)
        asked = []
        for number in (1, 2):
            asked.append(asyncio.create_task(infer(host, request(number))))
            await until(lambda: len(held.batches) == len(asked))
        await host.stop()
        assert [answer.reason.value for answer in await asyncio.gather(*asked)] == ["draining", "draining"]

    drive(tiny_bundle, scenario, busy_s=0.001)
