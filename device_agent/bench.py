"""Measure a bundle on this machine: latency, throughput, memory, and energy where something counts it.

Latency and throughput come from the same :class:`Runtime` the agent uses, in this process; the resident set from a
fresh worker process, because this one holds more than the model. Every figure has its repeats beside it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.errors import WorkerLost
from aios_edge.golden import Golden, read_golden
from aios_edge.host import inspect_host
from aios_edge.profile import DeviceProfile
from device_agent.activation_measure import WARM_UP_RUNS, Latency, measure_latency, shaped_inputs
from device_agent.bench_energy import Energy, measure_energy
from device_agent.power.meter import PowerMeter
from device_agent.runtime import Runtime
from device_agent.worker_pool import WorkerHandle, WorkerSpec

REPEATS = 3
LENGTHS = (32, 128)
BATCHES = (1, 4, 16)
MEMORY_TIMEOUT_S = 120.0


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Latency in seconds; medians over the repeats."""

    p50: float
    p95: float
    p99: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Least and greatest p50 and p95 over the repeats, in seconds."""

    repeats: int
    p50_s: tuple[float, float]
    p95_s: tuple[float, float]


class ShapeResult(msgspec.Struct, frozen=True, kw_only=True):
    """One input shape, ``batch`` x ``length``; ``samples`` model runs in all."""

    batch: int
    length: int
    latency_s: Quantiles
    throughput_per_s: float  # inputs per second at this shape
    spread: Spread
    samples: int


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``aios-edge bench --json`` prints. ``latency_s`` is at the profile's ``batch`` x ``length``."""

    bundle: str
    bundle_id: str
    profile: str
    batch: int
    length: int
    latency_s: Quantiles
    spread: Spread
    throughput_per_s: float
    throughput_batch: int
    rss_bytes: int | None
    rss_reason: str | None
    energy_j_per_inference: float | None
    energy: Energy
    shapes: tuple[ShapeResult, ...]
    threads: int
    providers_requested: tuple[str, ...]
    providers_active: tuple[str, ...]
    provider_reason: str | None
    method: str
    host: dict[str, object]


def bench(
    bundle_path: Path,
    profile: DeviceProfile | None = None,
    *,
    profile_name: str | None = None,
    duration_s: float = 10.0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure a bundle. ``profile`` gives threads and providers (default: the bundle's own); ``duration_s`` is the
    time for all shapes together, without loading. Raises :class:`BundleRefused` for an invalid bundle."""
    from aios_edge.profile_files import load_profile

    bundle = open_bundle(bundle_path)
    profile_name = profile_name or bundle.manifest.profile
    profile = profile or load_profile(profile_name)
    on_progress("memory: a fresh worker process")
    rss_bytes, rss_reason = asyncio.run(_worker_rss(bundle, profile_name, profile))
    runtime = Runtime(bundle.file(bundle.manifest.model), bundle.manifest.session, profile)
    golden = read_golden(bundle.file(bundle.contract.golden.file))
    main_shape = (profile.budgets.latency_batch, min(profile.budgets.latency_length, _longest(bundle)))
    results: list[ShapeResult] = []
    shapes = _shapes(main_shape, bundle)
    for batch, length in shapes:
        on_progress(f"latency and throughput: {batch} x {length}")
        results.append(_measure(runtime, golden, batch, length, duration_s / len(shapes)))
    at_length = [result for result in results if result.length == main_shape[1]]
    fastest = max(at_length, key=lambda result: result.throughput_per_s)
    inputs = shaped_inputs(golden, *main_shape)
    energy = measure_energy(
        lambda: runtime.run(inputs),
        PowerMeter(profile.power),
        inferences_per_call=main_shape[0],
        on_progress=on_progress,
    )
    return BenchResult(
        bundle=str(bundle.path),
        bundle_id=bundle.bundle_id,
        profile=profile.name,
        batch=main_shape[0],
        length=main_shape[1],
        latency_s=results[0].latency_s,
        spread=results[0].spread,
        throughput_per_s=fastest.throughput_per_s,
        throughput_batch=fastest.batch,
        rss_bytes=rss_bytes,
        rss_reason=rss_reason,
        energy_j_per_inference=energy.j_per_inference,
        energy=energy,
        shapes=tuple(results),
        threads=profile.threads.intra_op,
        providers_requested=tuple(runtime.providers_requested),
        providers_active=tuple(runtime.providers_active),
        provider_reason=runtime.provider_reason,
        method=(
            f"one model run after the other on {profile.threads.intra_op} thread(s), tensors from golden samples "
            f"repeated to the length, {REPEATS} repeats per shape after {WARM_UP_RUNS} runs of warm-up, median of the "
            "repeats; throughput: best batch size at the same length; memory: resident set of a fresh worker process "
            "after loading and a few golden samples"
        ),
        host=_host(),
    )


def _host() -> dict[str, object]:
    facts = dataclasses.asdict(inspect_host())
    return {**facts, "cpu_flags": sorted(facts["cpu_flags"])}


def _longest(bundle: Bundle) -> int:
    return bundle.manifest.preprocess.max_length


def _shapes(main_shape: tuple[int, int], bundle: Bundle) -> list[tuple[int, int]]:
    """The contract's shape first, then the others that the bundle allows."""
    lengths = {main_shape[1], *(length for length in LENGTHS if length <= _longest(bundle))}
    batches = [batch for batch in BATCHES if batch <= bundle.manifest.max_batch_size]
    others = [(batch, length) for length in sorted(lengths) for batch in batches]
    return [main_shape, *(shape for shape in others if shape != main_shape)]


def _measure(runtime: Runtime, golden: Golden, batch: int, length: int, budget_s: float) -> ShapeResult:
    inputs = shaped_inputs(golden, batch, length)
    for _ in range(WARM_UP_RUNS):
        runtime.run(inputs)
    started_at = time.perf_counter()
    runs = [measure_latency(runtime, inputs, run_s=budget_s / REPEATS) for _ in range(REPEATS)]
    samples = sum(run.samples for run in runs)
    return ShapeResult(
        batch=batch,
        length=length,
        latency_s=_median(runs),
        throughput_per_s=batch * samples / (time.perf_counter() - started_at),
        spread=Spread(
            repeats=len(runs),
            p50_s=(min(run.p50_s for run in runs), max(run.p50_s for run in runs)),
            p95_s=(min(run.p95_s for run in runs), max(run.p95_s for run in runs)),
        ),
        samples=samples,
    )


def _median(runs: list[Latency]) -> Quantiles:
    return Quantiles(
        p50=statistics.median(run.p50_s for run in runs),
        p95=statistics.median(run.p95_s for run in runs),
        p99=statistics.median(run.p99_s for run in runs),
    )


async def _worker_rss(bundle: Bundle, profile_name: str, profile: DeviceProfile) -> tuple[int | None, str | None]:
    """The resident set of a worker with this bundle loaded, or why it isn't known."""
    spec = WorkerSpec(
        model=bundle.manifest.name,
        bundle_path=bundle.path,
        profile=profile_name,
        intra_op_threads=profile.threads.intra_op,
    )
    worker = WorkerHandle(spec)
    try:
        report = await worker.start("quick", timeout_s=MEMORY_TIMEOUT_S)
    except WorkerLost as error:
        return None, str(error)
    finally:
        await worker.stop()
    return report.rss_bytes, None
