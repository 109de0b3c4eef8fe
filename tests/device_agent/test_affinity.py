"""A worker's threads stay on the CPUs that the profile names."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from scripted_worker import run

from aios_edge.errors import SettingsError
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_pool import WorkerHandle, WorkerSpec

PROFILES = Path(__file__).parents[2] / "profiles"


def profile(folder: Path, threads: str) -> str:
    text = (PROFILES / "x86-gateway.toml").read_text(encoding="utf-8")
    path = folder / "profile.toml"
    path.write_text(text.replace("[threads]\n", f"[threads]\n{threads}\n"), encoding="utf-8")
    return str(path)


def request(*texts: str) -> InferenceRequest:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    return InferenceRequest(
        request_id=1,
        model="tiny",
        body=msgspec.json.encode({"inputs": [tensor]}),
        json_length=None,
        client_id=None,
        priority=0,
        deadline_at=None,
        local_only=False,
        arrived_at=0.0,
        cost_hint_bytes=1,
    )


def affinities(pid: int | None) -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{pid}/task").iterdir()}


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_every_thread_of_a_worker_keeps_to_the_profiles_cpus(
    tiny_bundle: Any, tmp_path: Path, isolation: Literal["process", "thread"]
) -> None:
    cpu = max(os.sched_getaffinity(0))

    async def journey() -> tuple[ActivationReport, set[frozenset[int]]]:
        named = profile(tmp_path, f"cpu_affinity = [{cpu}]")
        worker = WorkerHandle(
            WorkerSpec(model="tiny", bundle_path=tiny_bundle.path, profile=named, isolation=isolation)
        )
        report = await worker.start()
        await run(worker, [request(*["a good film"] * 80)])  # more than one run: a thread of their own
        seen = affinities(worker.pid or os.getpid())
        await worker.stop()
        return report, seen

    before = os.sched_getaffinity(0)
    report, seen = asyncio.run(journey())
    assert (report.cpus, report.intra_op_threads) == ((cpu,), 1)
    assert seen == {frozenset({cpu})} if isolation == "process" else frozenset({cpu}) in seen
    assert os.sched_getaffinity(0) == before


def test_without_it_a_worker_may_use_every_cpu_of_the_agents(tiny_bundle: Any) -> None:
    async def journey() -> ActivationReport:
        worker = WorkerHandle(WorkerSpec(model="tiny", bundle_path=tiny_bundle.path, profile="x86-gateway"))
        report = await worker.start()
        await worker.stop()
        return report

    assert asyncio.run(journey()).cpus == tuple(sorted(os.sched_getaffinity(0)))


def test_a_cpu_that_is_not_there_refuses_the_bundle_and_says_which_are(tiny_bundle: Any, tmp_path: Path) -> None:
    named = profile(tmp_path, "cpu_affinity = [0, 4095]")
    worker = WorkerSpec(model="tiny", bundle_path=tiny_bundle.path, profile=named)
    with pytest.raises(SettingsError) as refused:
        asyncio.run(WorkerHandle(worker).start())
    for part in ("x86-gateway", "threads.cpu_affinity", "CPU 4095", "may use 0", "lscpu"):
        assert part in str(refused.value)
