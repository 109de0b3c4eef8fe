"""Tasks that nobody awaits."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from device_agent import background
from device_agent.background import ended, kept_up


def test_a_fault_is_told_and_the_next_time_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "FAULT_PAUSE_S", 0.0)

    async def main() -> None:
        turns: list[int] = []
        enough = asyncio.Event()

        async def step() -> None:
            turns.append(len(turns))
            if len(turns) == 2:
                raise ZeroDivisionError
            if len(turns) == 4:
                enough.set()
            await asyncio.sleep(0)

        task = asyncio.create_task(kept_up(step, "the clock could not be wound"))
        await enough.wait()
        await ended(task)
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert caplog.text.count("the clock could not be wound; tried again") == 1 and "ZeroDivisionError" in caplog.text


def test_one_that_swallows_a_cancellation_is_cancelled_again() -> None:
    async def main() -> None:
        async def stubborn() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            await asyncio.sleep(60)

        tasks = [asyncio.create_task(stubborn()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await ended(*tasks, None)
        assert all(task.done() for task in tasks)

    asyncio.run(asyncio.wait_for(main(), 10))
