"""A worker that lives and stands still is replaced; one that works, sleeps or was suspended with everybody isn't."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quick_constants import WORKERS_WATCHED
from scripted_worker import run

from aios_edge.errors import WorkerLost
from device_agent import heartbeat
from device_agent.heartbeat import LATE, LOOK_S, SILENT_LOOKS, STOPPED_LOOKS, Pulse, Seen, beat
from device_agent.rehearsal import rehearsal_batch
from device_agent.worker_exit import exit_status
from device_agent.worker_pool import WorkerHandle, WorkerSpec
from device_agent.worker_watch import is_stopped

QUICK_S = 0.1
ENDLESS = 1e7  # a slowdown under which a batch of milliseconds takes hours
BATCH = rehearsal_batch("tiny", (4,), pair=False, now=0.0)


class Look(Seen, frozen=True, kw_only=True):
    """``at`` is the time since the look before."""


LOOKS_TAKEN = st.lists(
    st.builds(
        Look,
        at=st.sampled_from((LOOK_S, LOOK_S, 1.5 * LOOK_S, LATE * LOOK_S + 0.1, 3600.0)),
        heard=st.sampled_from((0, 0, 1, 7)),  # since the look before
        busy=st.booleans(),
        stopped=st.booleans(),
    ),
    max_size=12,
)


@given(LOOKS_TAKEN)
def test_only_what_stood_still_while_this_process_did_not_is_given_up(looks: list[Look]) -> None:
    pulse, now, heard = Pulse(at=0.0), 0.0, 0
    quiet: list[Look] = []  # looks in a row, all on time, without a word
    asked = 0
    for look in looks:
        now, heard = now + look.at, heard + look.heard
        quiet = [*([] if look.at > LATE * LOOK_S else quiet), look] if not look.heard else []
        pulse, ask = beat(pulse, Seen(at=now, heard=heard, busy=look.busy, stopped=look.stopped))
        asked += ask
        stopped = len(quiet) >= STOPPED_LOOKS and all(each.stopped for each in quiet[-STOPPED_LOOKS:])
        silent = len(quiet) > SILENT_LOOKS and not any(each.busy for each in quiet[-SILENT_LOOKS - 1 :])
        assert (pulse.verdict is not None) == (stopped or silent)
        assert not (ask and (look.busy or look.heard)), "nobody is asked who works, or was just heard of"
        if pulse.verdict:
            return


def test_a_worker_under_load_is_never_asked() -> None:
    pulse = Pulse(at=0.0)
    for number in range(1, 50):
        pulse, ask = beat(pulse, Seen(at=number * LOOK_S, heard=number, busy=number % 2 == 0, stopped=False))
        assert not ask and pulse.verdict is None


def with_worker(
    bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[WorkerHandle, int, asyncio.Future[str]], Awaitable[None]],
    **spec: Any,
) -> None:
    """A real worker that is looked at ten times as often."""
    monkeypatch.setattr(heartbeat, "LOOK_S", QUICK_S)

    async def main() -> None:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        started = WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x86-gateway", **spec)
        worker = WorkerHandle(started, on_lost=lost.set_result)
        await worker.start("quick")
        assert worker.pid is not None
        try:
            await asyncio.wait_for(scenario(worker, worker.pid, lost), 30)
        finally:
            worker.kill()
            await worker.stop(grace_s=0.0)

    asyncio.run(main())


def test_an_idle_worker_that_is_stopped_is_given_up(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        os.kill(pid, signal.SIGSTOP)
        assert await lost == "stood still, stopped by a signal, and was killed"
        assert not worker.ready and worker.pid is None
        await worker.start("quick")
        assert (await run(worker, BATCH)).done.items[0].status == 200

    with_worker(tiny_bundle, monkeypatch, scenario)


def test_an_idle_worker_that_does_not_answer_is_given_up(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As one that is swapped out or frozen: nothing says so, and it doesn't answer.
    monkeypatch.setattr("device_agent.worker_watch.is_stopped", lambda pid: False)

    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        os.kill(pid, signal.SIGSTOP)
        assert await lost == "gave no sign of life and was killed"

    with_worker(tiny_bundle, monkeypatch, scenario)


def test_a_worker_that_is_stopped_in_a_batch_is_given_up(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        running = asyncio.ensure_future(run(worker, BATCH))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost, match="stopped by a signal"):
            await running

    with_worker(tiny_bundle, monkeypatch, scenario, slowdown=ENDLESS)


def test_a_long_batch_is_no_standstill(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        running = asyncio.ensure_future(run(worker, BATCH))
        done, _ = await asyncio.wait((running, lost), timeout=20 * QUICK_S)
        assert not done and worker.ready
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await running

    with_worker(tiny_bundle, monkeypatch, scenario, slowdown=ENDLESS)


def test_an_idle_worker_that_answers_stays(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        connection = worker._connection
        assert connection is not None
        before = connection.heard
        while connection.heard < before + 10:
            assert not lost.done()
            await asyncio.sleep(QUICK_S / 4)
        assert worker.pid == pid and (await run(worker, BATCH)).done.items[0].status == 200

    with_worker(tiny_bundle, monkeypatch, scenario)


def test_a_machine_that_was_suspended_loses_no_worker(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: WorkerHandle, pid: int, lost: asyncio.Future[str]) -> None:
        connection = worker._connection
        assert connection is not None
        for _ in range(3):  # everything stands still, and goes on
            os.kill(pid, signal.SIGSTOP)
            until = time.monotonic() + 5 * QUICK_S
            while time.monotonic() < until:
                pass
            os.kill(pid, signal.SIGCONT)
            before = connection.heard
            while connection.heard < before + 2:
                assert not lost.done()
                await asyncio.sleep(QUICK_S / 4)
        assert worker.pid == pid

    with_worker(tiny_bundle, monkeypatch, scenario)


def test_what_the_kernel_says_of_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not is_stopped(process.pid)


def test_a_process_that_does_not_even_die_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.worker_exit.DEATH_S", 0.05)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kill = process.kill
    monkeypatch.setattr(process, "kill", lambda: None)  # as the kernel does with one in a frozen group
    try:
        told = asyncio.run(asyncio.wait_for(exit_status(process, grace_s=0.01, else_what="hung"), 5))
        assert told == "hung and does not end though it was killed"
    finally:
        kill()
        process.communicate()


def test_an_agent_replaces_a_worker_that_stands_still_idle_and_busy(start_agent: Any) -> None:
    agent = start_agent(constants=WORKERS_WATCHED)
    for restarts in (1, 2):
        pid = agent.status()["models"]["tiny"]["worker_pid"]
        os.kill(pid, signal.SIGSTOP)
        if restarts == 2:  # it waits in the worker's hands, or in the queue, and is answered
            assert agent.infer()[0] == 200
        agent.until(lambda status, n=restarts: status["models"]["tiny"]["restarts"] == n and status["state"] == "ready")
        assert agent.infer()[0] == 200
    first, second = agent.events("worker_crashed")
    assert first["how"] == "stood still, stopped by a signal, and was killed while idle"
    assert second["how"] == "stood still, stopped by a signal, and was killed" and second["in_flight"] == 1
    assert agent.stop() == 0
