"""``aios-edge agent prebuild``: the engines that an agent with these settings would build, before it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec

from aios_edge.errors import AiosEdgeError, RuntimeUnavailable, UsageError
from aios_edge.profile import DeviceProfile
from aios_edge.provider_options import TENSORRT
from device_agent import state_dir
from device_agent.engine_builds import TOLD_EVERY_S, build
from device_agent.hosting import entries_of, no_bundle, open_entry, worker_spec
from device_agent.settings import BundleEntry, Settings
from device_agent.values import EngineReport
from device_agent.worker_pool import WorkerSpec

log = logging.getLogger("device_agent")


class Prebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """One model. ``engine`` is ``built``, ``cached`` (there already), ``nothing`` to build here, or ``failed``, of a
    refused bundle as well."""

    path: str
    model: str | None
    version: str | None
    engine: EngineReport


@dataclass(frozen=True, kw_only=True)
class Prebuild:
    """All of them, and the first error."""

    models: tuple[Prebuilt, ...]
    error: AiosEdgeError | None = None


async def prebuild(settings: Settings, profile: DeviceProfile, model: str | None = None) -> Prebuild:
    """Build what is missing or unfit in ``state_dir``, one model after the other; ``model``: only the one of that name.

    Raises :class:`SettingsError` for what is written wrong, :class:`UsageError` for a name that isn't there, and
    :class:`ResourceError` for a state folder that can't be used or that an agent has.
    """
    entries = entries_of(settings)
    if not entries:
        raise no_bundle()
    with state_dir.hold(settings.device.state_dir):
        done: list[Prebuilt] = []
        error: AiosEdgeError | None = None
        names: list[str] = []
        unopened: list[AiosEdgeError] = []  # whose names nobody knows
        for entry in entries:
            try:
                bundle = open_entry(entry)
            except AiosEdgeError as refusal:
                if model is None:
                    done.append(_refused(entry, refusal))
                    error = error or refusal
                unopened.append(refusal)
                continue
            names.append(bundle.manifest.name)
            if model not in (None, bundle.manifest.name):
                continue
            spec = worker_spec(settings, profile, entry, bundle, state_dir=settings.device.state_dir)
            engine, failure = await _engine(spec, profile)
            error = error or failure
            manifest = bundle.manifest
            done.append(Prebuilt(path=str(entry.path), model=manifest.name, version=manifest.version, engine=engine))
    if not done and unopened:
        raise unopened[0]
    if not done:
        raise UsageError(f"there is no model {model!r}", remedy=f"Models here: {', '.join(names) or 'none'}")
    return Prebuild(models=tuple(done), error=error)


async def _engine(spec: WorkerSpec, profile: DeviceProfile) -> tuple[EngineReport, AiosEdgeError | None]:
    if all(provider.name != TENSORRT for provider in profile.providers):
        return EngineReport(state="nothing", reason=f"profile '{profile.name}' doesn't ask for {TENSORRT}"), None
    stage, began = "starts", time.monotonic()

    def staged(now: str) -> None:
        nonlocal stage
        stage = now
        log.info("%s: %s", spec.model, stage)

    async def progress() -> None:
        while True:
            await asyncio.sleep(TOLD_EVERY_S)
            log.info("%s: %s, %.0f s so far", spec.model, stage, time.monotonic() - began)

    telling = asyncio.get_running_loop().create_task(progress())
    try:
        engine = await build(spec, on_stage=staged)
    except AiosEdgeError as error:
        return EngineReport(state="failed", reason=str(error)), error
    finally:
        telling.cancel()
    if engine.state != "failed":
        return engine, None
    remedy = "The agent serves it on what comes next in the profile's chain"
    return engine, RuntimeUnavailable(f"TensorRT {engine.reason}", where=spec.model, remedy=remedy)


def _refused(entry: BundleEntry, error: AiosEdgeError) -> Prebuilt:
    return Prebuilt(
        path=str(entry.path), model=None, version=None, engine=EngineReport(state="failed", reason=str(error))
    )
