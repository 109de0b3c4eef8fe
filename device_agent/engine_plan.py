"""Whether a model is opened on TensorRT now, or after its engine was built beside.

Building takes minutes, during which nobody would be answered. So a worker that serves takes TensorRT only where the
engine is there; else it serves on what comes next in the chain, says ``missing``, and the supervisor has the engine
built (:mod:`device_agent.engine_builds`). A strict profile has nothing to serve on meanwhile, and waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from aios_edge.bundle.read import Bundle
from aios_edge.manifest import TensorSpec
from aios_edge.profile import DeviceProfile, Provider
from aios_edge.provider_options import CACHES, MIN_SHAPES, TENSORRT
from aios_edge.telemetry import ProviderStep
from device_agent.engine_cache import EngineKey, built, clear, engine_key, look
from device_agent.gpu import find_gpu
from device_agent.provider_chain import provider_chain
from device_agent.provider_walk import native_options, not_in, start_fault
from device_agent.values import EngineReport, Engines

_SWITCH, _PLACE = "trt_engine_cache_enable", CACHES["trt_engine_cache_enable"]
AWAITED = "is left out until its engine for this model was built and checked"


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """How to open a model: its ``chain``, and who of it is ``left_out`` and why.

    ``engine``: what is known of it before; ``builds``: opening the model builds it, under this key."""

    chain: tuple[Provider, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    engine: EngineReport | None = None
    builds: EngineKey | None = None


def plan_engine(
    ort: Any, bundle: Bundle, profile: DeviceProfile, *, state_dir: Path | None, engines: Engines, root: Path
) -> EnginePlan:
    """``state_dir`` None, or a profile that keeps its engines elsewhere or not at all: TensorRT is taken as it comes.

    ``root``: where TensorRT and the driver are looked for.
    """
    asked = bundle.manifest.provider_options
    bare = provider_chain(profile.providers, asked, None)
    tensorrt = next((provider for provider in bare if provider.name == TENSORRT), None)
    if tensorrt is None or state_dir is None:
        return EnginePlan(chain=bare)
    gpu = find_gpu(int(tensorrt.options.get("device_id", 0)))
    key = engine_key(bundle, native_options(tensorrt), gpu, onnxruntime=ort.__version__, root=root)
    folder = (state_dir / key.folder).absolute()
    chain = provider_chain(profile.providers, asked, folder)
    placed = next(provider for provider in chain if provider.name == TENSORRT)
    if engines == "off":
        return EnginePlan(chain=chain, left_out={TENSORRT: AWAITED})
    if not placed.options.get(_SWITCH) or placed.options[_PLACE] != str(folder):
        folder.mkdir(parents=True, exist_ok=True)  # for its timings
        return EnginePlan(chain=chain)
    found = look(folder)
    if found.state == "cached":
        return EnginePlan(chain=chain, engine=found)
    if (fault := obstacle(ort, placed)) is not None:
        return EnginePlan(chain=chain, left_out={TENSORRT: fault}, engine=EngineReport(state="nothing", reason=fault))
    if engines == "build" or profile.strict_providers:
        clear(folder)
        return EnginePlan(chain=chain, builds=key)
    why = AWAITED
    if found.state == "unfit":
        why = f"is left out, its engine may not serve: {found.reason}. 'aios-edge agent prebuild' builds it again"
    return EnginePlan(chain=chain, left_out={TENSORRT: why}, engine=found)


def obstacle(ort: Any, provider: Provider) -> str | None:
    """Why nothing can be built with a provider here, whatever the model; None where it can."""
    if provider.name not in ort.get_available_providers():
        return not_in(ort)
    return start_fault(ort, provider)


def settle(
    plan: EnginePlan, steps: tuple[ProviderStep, ...], inputs: Sequence[TensorSpec], took_s: float
) -> tuple[tuple[ProviderStep, ...], EngineReport | None]:
    """What became of the plan, now that the model is open and its inputs are known: its steps, and its engine."""
    tensorrt = next((step for step in steps if step.name == TENSORRT), None)
    if tensorrt is None or (plan.builds is None and (plan.engine is None or plan.engine.state != "missing")):
        return steps, plan.engine
    if free := unpinned(inputs, tensorrt.options):
        why = f"builds an engine for each new size of {', '.join(free)}, which no {MIN_SHAPES} bounds"
        told = tuple(
            msgspec.structs.replace(step, reason=f"is left out, it {why}")
            if step is tensorrt and not step.active
            else step
            for step in steps
        )
        return told, EngineReport(state="nothing", reason=f"TensorRT {why}")
    if plan.builds is None:
        return steps, plan.engine
    if not tensorrt.active:
        return steps, EngineReport(state="failed", reason=tensorrt.reason)
    return steps, built(Path(tensorrt.options[_PLACE]), took_s)


def unpinned(inputs: Sequence[TensorSpec], options: Mapping[str, str]) -> list[str]:
    """Inputs with free dimensions for which TensorRT isn't told a range: for these it can't build ahead."""
    bounded = {part.rpartition(":")[0] for part in options.get(MIN_SHAPES, "").split(",")}
    return [spec.name for spec in inputs if -1 in spec.shape and spec.name not in bounded]
