"""TensorRT's engines are built beside: a worker that serves nobody builds one, while the model's own worker serves on
CUDA or the CPU; then the model changes over to it, as to a new bundle, without losing a request.

One is built at a time, since each takes the whole GPU and much of its memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused
from aios_edge.profile import DeviceProfile
from aios_edge.provider_options import TENSORRT
from device_agent.engine_cache import bytes_in, note_unfit
from device_agent.model_host import ModelHost
from device_agent.status import EngineBuild
from device_agent.surroundings import Emit, Surroundings
from device_agent.values import EngineReport
from device_agent.worker_pool import WorkerHandle, WorkerSpec

log = logging.getLogger("device_agent")

#: Checks that run the model, on the device before it goes live and with clients' requests.
_ENGINES_TO_KEEP = frozenset(("golden", "golden_raw", "latency_p95_s", "memory_bytes", "live"))
BUILD_LIMIT_S = 4 * 3600.0  # large models on a small board take long; one that takes longer hangs
BUILDERS_NICE = 10  # it keeps the processor busy for minutes, on which others serve
TOLD_EVERY_S = 30.0

ChangeOver = Callable[[str, ModelHost, EngineReport], Awaitable[None]]


class EngineBuilds:
    """The builds that go on or wait for their turn, by model. ``change_over`` is called when one is done, with the host
    whose model it is for."""

    def __init__(self, around: Surroundings, change_over: ChangeOver, *, told_every_s: float = TOLD_EVERY_S) -> None:
        self._around = around
        self._change_over = change_over
        self._told_every_s = told_every_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stages: dict[str, tuple[str, float, Path]] = {}
        self._turn = asyncio.Lock()
        #: What isn't built yet, also of a host whose build was given up and that may come back.
        self._wanted: WeakKeyDictionary[ModelHost, EngineReport] = WeakKeyDictionary()

    def get(self, model: str) -> EngineBuild | None:
        """How far the build for a model is; None when there is none."""
        if model not in self._stages:
            return None
        stage, began, folder = self._stages[model]
        elapsed_s = round(self._around.clock() - began, 1)
        return EngineBuild(stage=stage, elapsed_s=elapsed_s, size_bytes=bytes_in(folder))

    def consider(self, host: ModelHost) -> None:
        """Have the engine of a model built that has just gone live without; whatever was built under its name is not
        awaited any more."""
        self.give_up(host.name)
        report = host.instance.report
        engine = report.engine if report is not None else None
        if engine is None or engine.state != "missing":
            engine = self._wanted.get(host)
        if engine is None:
            return
        self._wanted[host] = engine
        # A restart of its worker must not take an engine that wasn't checked, and a way back leads to what serves now.
        host.instance.start_from(engines="off")
        task = asyncio.get_running_loop().create_task(self._build(host, engine), name=f"engine-{host.name}")
        self._tasks[host.name] = task

    def give_up(self, model: str) -> None:
        """End the build for a model, if there is one."""
        if (task := self._tasks.pop(model, None)) is not None and task is not asyncio.current_task():
            task.cancel()

    async def stop(self) -> None:
        """End them all, and wait until their workers have ended."""
        tasks = list(self._tasks.values())
        for model in list(self._tasks):
            self.give_up(model)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _build(self, host: ModelHost, engine: EngineReport) -> None:
        model, folder = host.name, Path(engine.folder or "")
        self._stages[model] = "waits", self._around.clock(), folder
        try:
            async with self._turn:
                made = await self._built(host, folder)
        finally:
            self._stages.pop(model, None)
        self._wanted.pop(host, None)
        if made is None:
            return
        try:
            await self._change_over(model, host, made)
        except Exception as error:  # nobody waits for the task
            log.exception("%s did not change over to its engine", model)
            self._tell("engine_failed", host, took_s=None, reason=f"{type(error).__name__}: {error}")

    async def _built(self, host: ModelHost, folder: Path) -> EngineReport | None:
        model, began = host.name, self._around.clock()

        def staged(stage: str) -> None:
            self._stages[model] = stage, began, folder
            log.info("%s: its engine: %s", model, stage)

        staged("starts")
        self._tell("engine_building", host, stage="starts", elapsed_s=0.0)
        progress = asyncio.get_running_loop().create_task(self._progress(host), name=f"engine-progress-{model}")
        try:
            spec = dataclasses.replace(host.instance.worker.spec, bundle_id=host.bundle.bundle_id, cpus=())
            made = await build(spec, on_stage=staged)
        except AiosEdgeError as error:
            made = EngineReport(state="failed", reason=str(error))
        except Exception as error:  # a fault of ours is a build that failed, and told as one
            log.exception("the build of an engine for %s failed", model)
            made = EngineReport(state="failed", reason=f"{type(error).__name__}: {error}")
        finally:
            progress.cancel()
        took_s = round(self._around.clock() - began, 3)
        if made.state in ("built", "cached"):
            self._tell("engine_built", host, took_s=took_s, size_bytes=made.size_bytes)
            log.info("%s: its engine is built after %.1f s, in %s", model, took_s, made.folder)
            return made
        self._tell("engine_failed", host, took_s=took_s, reason=made.reason)
        log.warning("%s: there is no engine for it, it serves on as it does: %s", model, made.reason)
        return None

    async def _progress(self, host: ModelHost) -> None:
        while True:
            await asyncio.sleep(self._told_every_s)
            if (build := self.get(host.name)) is not None:
                self._tell("engine_building", host, **msgspec.structs.asdict(build))

    def _tell(self, kind: str, host: ModelHost, **detail: str | float | int | None) -> None:
        manifest = host.bundle.manifest
        self._around.emit(kind, model=host.name, version=manifest.version, bundle_id=host.bundle.bundle_id, **detail)


def found_unfit(host: ModelHost, error: AiosEdgeError, emit: Emit) -> bool:
    """Whether a refusal may be the fault of the engine that was there, which then isn't used any more; without it the
    model may serve. What TensorRT computes, and how fast, is seen by the checks that run the model."""
    report = host.instance.report
    engine = report.engine if report else None
    if not isinstance(error, BundleRefused) or error.promise not in _ENGINES_TO_KEEP or engine is None:
        return False
    if engine.state != "cached" or engine.folder is None:
        return False
    reason = f"{error.promise}: {error.what}"
    note_unfit(Path(engine.folder), reason)
    emit("engine_failed", model=host.name, version=host.bundle.manifest.version, reason=reason)
    log.warning("%s: its engine may not serve: %s", host.name, reason)
    return True


def may_have_engine(profile: DeviceProfile) -> bool:
    """Whether a worker that died may have died of an engine, so that it is worth another one without."""
    return not profile.strict_providers and any(provider.name == TENSORRT for provider in profile.providers)


async def build(spec: WorkerSpec, *, on_stage: Callable[[str], None] = lambda stage: None) -> EngineReport:
    """Build the engine of a worker's model in a process of its own, which ends with it.

    Raises what the bundle is refused for, and :class:`WorkerLost`.
    """
    nice = max(spec.nice, BUILDERS_NICE)
    builder = dataclasses.replace(spec, isolation="process", engines="build", slowdown=1.0, nice=nice)
    worker = WorkerHandle(builder, on_stage=on_stage)
    try:
        report = await worker.start("engine", timeout_s=BUILD_LIMIT_S)
    finally:
        await worker.stop()
    return report.engine or EngineReport(state="nothing", reason="this profile keeps no engines of TensorRT for models")
