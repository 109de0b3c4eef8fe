"""Several workers of one model, driven by hand: who gets which batch, and what deaths, pauses and want of room do."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worker_by_hand import ByHand, Device, drive, due, until

from aios_edge.errors import WorkerLost
from device_agent import crew
from device_agent.answer import Answer
from device_agent.memory_room import Room

LONG_S = 0.05  # of a batch: too long for another to go ahead
STEPS = st.lists(
    st.one_of(
        st.just(("ask", 0)),
        st.just(("ask", 0)),
        st.tuples(st.just("answer"), st.integers(0, 2)),
        st.tuples(st.just("die"), st.integers(0, 2)),
        st.just(("turn", 0)),
    ),
    max_size=40,
)


def batches(device: Device) -> list[list[list[int]]]:
    """What each worker has, by request."""
    return [[[each.request_id for each in batch] for batch, _ in worker.batches] for worker in device.workers]


def test_each_takes_a_batch_and_whoever_is_free_first_the_next(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        for number in range(1, 5):
            device.ask(number)
        assert batches(device) == [[[1]], [[2]]] and device.host.queued == 2 and device.host.running == 2
        device.workers[1].answer()
        assert batches(device) == [[[1]], [[3, 4]]] and device.told == {2: 200}
        device.workers[0].answer()
        device.ask(5)
        assert batches(device) == [[[5]], [[3, 4]]]

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


def test_none_goes_ahead_while_another_worker_is_free(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        for number in range(1, 6):
            device.ask(number)
        assert batches(device) == [[[1], [3]], [[2], [4]]] and device.host.queued == 1

    drive(tiny_bundle, scenario, workers=2, still_clock=True)


def test_what_a_dead_worker_had_goes_to_those_that_are_idle_at_once(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        for number in range(1, 7):
            device.ask(number)
        assert batches(device) == [[[1], [4]], [[2], [5]], [[3], [6]]]
        for idle in device.workers[1:]:
            idle.answer()
            idle.answer()
        device.workers[0].die()
        assert batches(device)[1:] == [[[1]], [[4]]], "the one that was to blame alone, the other as before"

    drive(tiny_bundle, scenario, workers=3, still_clock=True)


def test_who_waits_is_promised_the_worker_that_is_free_first(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        instance = device.host.instance
        device.ask(1)
        began = instance.places[0].running
        assert sorted(instance.free_times(began.since)) == [began.since, began.since + began.expected_s]
        device.ask(2)
        device.ask(3)
        ends = sorted(place.running.since + place.running.expected_s for place in instance.places)
        assert sorted(instance.free_times(began.since)) == ends and instance.free_at(began.since) == ends[0]
        (waiting,) = device.host._queue.tickets()
        seen = device.host._judge.forecast(waiting.pending, began.since, waiting=True)
        assert seen is not None and seen.expected_at == pytest.approx(ends[0] + began.expected_s, rel=1e-6)

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S, still_clock=True)


def test_a_death_costs_one_batch_which_the_other_worker_repeats(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        held = asyncio.Event()
        device.before_start = held.wait  # type: ignore[assignment]
        first, second = device.workers
        device.ask(1)
        device.ask(2)
        first.die()
        assert device.host.state == "ready" and device.host.instance.worker is second
        assert device.host.serves and device.host.instance.serving == 1
        second.answer()
        assert device.told == {2: 200} and batches(device) == [[], [[1]]]
        second.answer()
        assert device.told == {2: 200, 1: 200}
        device.ask(3)
        device.ask(4)
        held.set()
        await until(lambda: batches(device) == [[[4]], [[3]]])
        assert device.events == ["worker_crashed", "worker_recovered"] and device.host.instance.restarts == 1

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


def test_what_died_with_one_is_not_given_to_another_that_is_dead_as_well(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        first, second = device.workers
        device.ask(1)
        second.ended = True  # as its closed connection tells; how it ended is told when its exit status is there
        device.ask(2)
        assert batches(device) == [[[1]], []] and device.host.queued == 1
        first.die()
        assert not second.batches and device.host.queued == 2
        second.die()
        await until(lambda: any(worker.batches for worker in device.workers))
        while len(device.told) < 2:
            for worker in device.workers:
                if worker.batches:
                    worker.answer()
            await asyncio.sleep(0)
        assert device.told == {1: 200, 2: 200}

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


def test_one_that_dies_idle_is_replaced(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        device.workers[1].die()
        await until(lambda: device.host.instance.restarts == 1)
        device.workers[0].die()
        await until(lambda: device.host.instance.restarts == 2)
        assert device.host.instance.serving == 2 and device.host.state == "ready"
        assert Counter(device.events) == {"worker_crashed": 2, "worker_recovered": 2}

    drive(tiny_bundle, scenario, workers=2)


@pytest.mark.parametrize("workers", [2, 3])
def test_one_that_dies_idle_while_another_is_replaced_is_told_at_once(tiny_bundle: Any, workers: int) -> None:
    async def scenario(device: Device) -> None:
        instance, held = device.host.instance, asyncio.Event()
        for worker in device.workers:
            worker.rss_bytes, worker.report = 200, worker.report.__class__(**{**fields(worker), "rss_bytes": 100})
        device.before_start = held.wait  # type: ignore[assignment]
        instance.places[0].recycling.due = "max_rss_bytes"
        instance.wake()
        await until(lambda: instance.places[0].starting)
        device.workers[1].die()
        assert device.events == ["worker_crashed"] and len(instance.quarantine.crashed_at) == 1
        assert device.host.record.conduct.failures == 1, "a bundle on probation answers for it"
        assert device.host.state == ("ready" if workers == 3 else "restarting")
        if workers == 3:
            await until(lambda: instance.places[1].starting)  # beside the other
        held.set()
        await until(lambda: instance.serving == workers)
        assert instance.lead.worker.ready and device.host.state == "ready"
        assert Counter(device.events) == {"worker_crashed": 1, "worker_recycled": 1, "worker_recovered": 1}

    drive(tiny_bundle, scenario, workers=workers)


def test_all_that_die_idle_at_once_are_told(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        for worker in device.workers:
            worker.die()
        await until(lambda: device.host.instance.serving == 3)
        assert Counter(device.events)["worker_crashed"] == 3

    drive(tiny_bundle, scenario, workers=3, quarantine_crashes=4)


@pytest.mark.parametrize("how", ["sent away", "replaced"])
def test_the_last_batch_of_one_that_leaves_holds_up_no_restart(tiny_bundle: Any, how: str) -> None:
    async def scenario(device: Device) -> None:
        instance = device.host.instance
        device.ask(1)
        if how == "sent away":
            device.ask(2)
            leaves = device.workers[1]
            instance.crew.let_go("others need the room")
        else:
            leaves = device.workers[0]
            device.hand_over().on_lost = leaves.on_lost
        device.workers[0].die()
        assert device.events == ["worker_crashed"] and device.host.state == "restarting"
        await until(lambda: instance.serving == 1)
        assert leaves.batches, "it is still at it"
        leaves.answer()
        await until(lambda: bool(device.workers[0].batches) or how == "replaced")
        for worker in device.workers:
            if worker.batches:
                worker.answer()
        assert device.told == ({1: 200, 2: 200} if how == "sent away" else {1: 200})
        assert device.events == ["worker_crashed", "worker_recovered"]

    drive(tiny_bundle, scenario, workers=2 if how == "sent away" else 1, busy_s=LONG_S)


def test_the_one_on_its_way_takes_over_when_the_last_dies(tiny_bundle: Any) -> None:
    starts: list[int] = []

    async def scenario(device: Device) -> None:
        held = asyncio.Event()

        async def waits() -> None:
            starts.append(len(starts))
            await held.wait()

        device.before_start = waits
        device.workers[1].die()
        await until(lambda: len(starts) == 1)
        device.ask(1)
        device.workers[0].die()
        assert device.host.state == "restarting" and not device.told
        await asyncio.sleep(0.01)
        assert len(starts) == 1, "the second isn't started before the first"
        held.set()
        await until(lambda: batches(device)[1] == [[1]])
        device.workers[1].answer()
        assert device.told == {1: 200} and device.host.state == "ready"
        await until(lambda: device.host.instance.serving == 2)

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


def test_one_that_does_not_start_is_tried_again_and_the_model_serves(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.restart.FIRST_PAUSE_S", 0.01)
    tries: list[int] = []

    async def scenario(device: Device) -> None:
        async def fails() -> None:
            tries.append(len(tries))
            raise WorkerLost("was killed by SIGKILL", where="worker")

        device.before_start = fails
        device.workers[1].die()
        await until(lambda: len(tries) == 4)
        assert device.host.state == "ready" and "SIGKILL" in str(device.host.instance.places[1].detail)
        device.ask(1)
        device.workers[0].answer()
        assert device.told == {1: 200}
        device.before_start = device.at_once
        await until(lambda: device.host.instance.serving == 2)

    drive(tiny_bundle, scenario, workers=2)


def test_a_model_rests_and_wakes_with_all_of_them(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        device.ask(1)
        device.ask(2)
        leaving = asyncio.ensure_future(device.host.instance.resting.leave())
        await asyncio.sleep(0)
        device.workers[0].answer()
        await asyncio.sleep(0.01)
        assert device.host.state == "ready", "the other has a batch"
        device.ask(3)
        assert batches(device) == [[[3]], [[2]]], "who comes meanwhile is answered"
        for worker in device.workers:
            worker.answer()
        await leaving
        assert device.host.state == "resting" and not any(worker.ready for worker in device.workers)
        device.ask(4)
        await until(lambda: device.host.instance.serving == 2)
        await until(lambda: any(worker.batches for worker in device.workers))
        next(worker for worker in device.workers if worker.batches).answer()
        assert device.told == {1: 200, 2: 200, 3: 200, 4: 200} and device.host.instance.restarts == 0

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


def test_one_that_is_sent_away_answers_its_batch_first_and_comes_back_later(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "MADE_ROOM_PAUSE_S", 0.3)

    async def scenario(device: Device) -> None:
        device.ask(1)
        device.ask(2)
        lead, other = device.workers
        gone = device.host.instance.crew.let_go("others need the room")
        device.ask(3)
        assert device.workers[0] is lead and device.workers[1] is not other
        assert device.host.instance.serving == 1 and device.host.queued == 1
        other.answer()
        await gone
        assert not other.ready and device.told == {2: 200} and not device.workers[1].batches
        lead.answer()
        await until(lambda: device.host.instance.serving == 2)
        assert device.events == [], "nobody died"

    drive(tiny_bundle, scenario, workers=2, busy_s=LONG_S)


@pytest.mark.parametrize("short", ["device", "budget"])
def test_none_is_started_without_room_for_it(tiny_bundle: Any, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "NO_ROOM_PAUSE_S", 0.01)

    async def scenario(device: Device) -> None:
        instance = device.host.instance
        if short == "budget":
            instance.crew._has_room = lambda need_bytes: False
        else:
            monkeypatch.setattr("device_agent.recycle.fits_beside", lambda *_: False)
            for worker in device.workers:
                worker.rss_bytes, worker.report = 1, worker.report.__class__(**{**fields(worker), "rss_bytes": 1})
            object.__setattr__(instance._around, "room", lambda: Room(available_bytes=1, limit_bytes=10))
        device.workers[1].die()
        await until(lambda: "room" in str(instance.places[1].detail) or "memory" in str(instance.places[1].detail))
        assert instance.serving == 1 and device.host.state == "ready"
        instance.crew._has_room = crew.no_limit
        monkeypatch.setattr("device_agent.recycle.fits_beside", lambda *_: True)
        await until(lambda: instance.serving == 2)

    drive(tiny_bundle, scenario, workers=2)


def fields(worker: ByHand) -> dict[str, Any]:
    return {name: getattr(worker.report, name) for name in worker.report.__struct_fields__}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, workers=st.integers(1, 3), busy_s=st.sampled_from([0.001, LONG_S]))
def test_whatever_happens_each_is_answered_once_and_nobody_waits_beside_an_idle_worker(
    tiny_bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, int]],
    workers: int,
    busy_s: float,
) -> None:
    monkeypatch.setattr("device_agent.restart.FIRST_PAUSE_S", 0.001)
    answers: Counter[int] = Counter()
    asked: list[int] = []

    def ask(device: Device) -> None:
        number = len(asked) + 1
        asked.append(number)
        device.ask(number, lambda answer: answers.update({number: 1}))

    async def turns() -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    async def scenario(device: Device) -> None:
        deaths = 0
        instance = device.host.instance

        def all_answered() -> bool:
            for worker in device.workers:
                if worker.batches:
                    worker.answer()
            return not device.host._here

        for what, number in steps:
            worker = device.workers[number % workers]
            if what == "ask":
                ask(device)
            elif what == "answer" and worker.batches:
                worker.answer()
            elif what == "die" and worker.ready and deaths < 6:  # none is quarantined
                deaths += 1
                worker.die()
            elif what == "turn":
                await turns()
            if device.host.queued and instance.state == "ready":
                assert not [place for place in instance.places if place.worker.ready and not place.running.tickets]
            assert sum(len(batch) for of in batches(device) for batch in of) >= device.host.running
        await until(all_answered)
        assert answers == Counter(asked), "each once"
        await until(lambda: instance.serving == workers)

    device = drive(tiny_bundle, scenario, workers=workers, busy_s=busy_s)
    assert device.host.running == 0 and not device.host.queued


def test_nobody_goes_ahead_to_a_worker_that_stands_still(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        well = device.workers[1]
        for number in (1, 2):
            device.ask(number)
        assert batches(device) == [[[1]], [[2]]]
        now = device.host._around.clock()
        device.host.instance.places[0].running.since = now - 0.3  # of a batch of 1 ms
        device.ask(3)
        device.ask(4)
        assert batches(device) == [[[1]], [[2], [3]]] and device.host.queued == 1
        well.answer()
        well.answer()
        well.answer()
        assert device.told == {2: 200, 3: 200, 4: 200} and batches(device) == [[[1]], []]

    drive(tiny_bundle, scenario, workers=2, still_clock=True)


def test_whoever_was_promised_the_worker_that_is_free_first_is_not_judged_by_another(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        host = device.host
        host._learning.service = msgspec.structs.replace(host.service, spread=0.05, overhead_s=0.01)
        answers: list[Answer] = []
        for number in (1, 2):
            host.submit(due(number, 9.0), answers.append)
        first, second = host.instance.places
        now, alone_s = host._around.clock(), first.running.expected_s
        first.running.since, second.running.since = now, now - alone_s + 0.002
        in_s = 0.002 + alone_s + host.service.margin_s(alone_s + 0.002) + 0.004
        host.submit(due(3, in_s), answers.append)
        assert answers == [] and not first.ahead.tickets
        device.workers[1].answer()
        assert [ticket.request.request_id for ticket in second.running.tickets] == [3]

    drive(tiny_bundle, scenario, workers=2, busy_s=0.08, still_clock=True)
