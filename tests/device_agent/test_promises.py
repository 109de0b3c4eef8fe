"""What becomes of the next promises when one to be in time was kept or broken."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from scripted_worker import infer
from worker_by_hand import Device, drive, due, until

from device_agent.service_time import CAUTION_STEP
from device_agent.values import Reason


def test_promises_to_be_in_time_are_learnt_from(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        host, worker = device.host, device.worker

        async def answered(request: Any) -> Any:
            asked = asyncio.create_task(infer(host, request))
            await until(lambda: bool(worker.batches))
            worker.answer()
            return await asked

        assert (await answered(due(1, 5.0))).status == 200
        assert host.service.caution == 1.0
        late = [asyncio.create_task(infer(host, due(number, in_s))) for number, in_s in ((2, 0.1), (3, 0.15))]
        assert {(await each).reason for each in late} == {Reason.DEADLINE_PASSED}
        raised = host.service.caution
        assert raised == pytest.approx(CAUTION_STEP**2, rel=0.01)
        while worker.batches:
            worker.answer()
        device.ask(4)
        worker.answer()
        assert device.told == {4: 200} and host.service.caution == raised, "without a deadline nothing was promised"
        assert (await answered(due(5, 5.0))).status == 200
        assert 1.0 < host.service.caution < raised

    drive(tiny_bundle, scenario)


def test_a_death_is_no_misjudgement(tiny_bundle: Any) -> None:
    async def scenario(device: Device) -> None:
        gate = asyncio.Event()
        device.before_start = gate.wait  # type: ignore[assignment]
        device.host._learning.service = msgspec.structs.replace(device.host.service, spread=0.05)
        asked = [asyncio.create_task(infer(device.host, due(number, 1.2))) for number in range(1, 30)]
        await until(lambda: device.host.running > 0)
        device.worker.die()
        assert Reason.DEADLINE_PASSED in {(await each).reason for each in asked}, "a start takes a second"
        assert device.host.service.caution == 1.0
        gate.set()

    drive(tiny_bundle, scenario, busy_s=0.005)
