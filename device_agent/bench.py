"""Measure a bundle on this machine: latency, throughput, memory, and energy where something counts it.

Latency and throughput come from the same :class:`Runtime` the agent uses, in this process; the resident set from a
fresh worker process, because this one holds more than the model. Every figure has its repeats beside it.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.errors import WorkerLost
from aios_edge.golden import Golden, read_golden
from aios_edge.host import inspect_host
from aios_edge.manifest import Purpose
from aios_edge.measurement import Compared, Measurement, Quantiles, measured_on, model_of
from aios_edge.profile import DeviceProfile
from aios_edge.session import session_options
from device_agent.activation_measure import WARM_UP_RUNS, Latency, measure_latency, shaped_inputs
from device_agent.bench_compare import COMPARISON, compare
from device_agent.bench_energy import Energy, measure_energy
from device_agent.power.meter import PowerMeter
from device_agent.runtime import Runtime, open_runtime, runtime_note
from device_agent.worker_pool import WorkerHandle, WorkerSpec

REPEATS = 3
LENGTHS = (32, 128)
BATCHES = (1, 4, 16)
MEMORY_TIMEOUT_S = 120.0


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


class BenchResult(Measurement, frozen=True, kw_only=True):
    """What ``aios-edge bench --json`` prints. ``latency_s`` is at the profile's ``batch`` x ``length``."""

    purpose: Purpose
    spread: Spread
    throughput_per_s: float
    throughput_batch: int
    energy_j_per_inference: float | None
    energy: Energy
    shapes: tuple[ShapeResult, ...]
    providers_requested: tuple[str, ...]


def bench(
    bundle_path: Path,
    profile: DeviceProfile | None = None,
    *,
    profile_name: str | None = None,
    against: Path | None = None,
    duration_s: float = 10.0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure a bundle. ``profile`` gives providers, and threads where the bundle names none (default: the bundle's
    own); ``against`` is another bundle, usually the fp32 candidate, to run in turn with it; ``duration_s`` is the time
    for all shapes together, without loading. Raises :class:`BundleRefused` for an invalid bundle."""
    from aios_edge.profile_files import load_profile

    bundle = open_bundle(bundle_path)
    other = open_bundle(against) if against is not None else None
    profile_name = profile_name or bundle.manifest.profile
    profile = profile or load_profile(profile_name)
    with tempfile.TemporaryDirectory(prefix="aios-edge-bench-") as engines:  # built once, for worker and this process
        return _bench(bundle, other, profile, profile_name, Path(engines), duration_s, on_progress)


def _bench(
    bundle: Bundle,
    other: Bundle | None,
    profile: DeviceProfile,
    profile_name: str,
    engines: Path,
    duration_s: float,
    on_progress: Callable[[str], None],
) -> BenchResult:
    on_progress("memory: a fresh worker process")
    rss_bytes, rss_reason = asyncio.run(_worker_rss(bundle, profile_name, profile, engines))
    runtime = open_runtime(bundle, profile, state_dir=engines)
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
    compared = None
    if other is not None:
        on_progress(f"in turn with {other.path}")
        reference = open_runtime(other, profile, state_dir=engines)
        compared = compare(runtime, reference, other, inputs)
    energy = measure_energy(
        lambda: runtime.run(inputs),
        PowerMeter(profile.power),
        inferences_per_call=main_shape[0],
        on_progress=on_progress,
    )
    host = inspect_host()
    manifest, threads = bundle.manifest, runtime.options.intra_op_threads
    return BenchResult(
        bundle=str(bundle.path),
        bundle_id=bundle.bundle_id,
        model=manifest.name,
        profile=profile.name,
        purpose=manifest.purpose,
        candidate=manifest.provenance.candidate,
        precision=manifest.precision,
        model_sha256=model_of(manifest),
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
        threads=threads,
        session=runtime.options,
        speedup=compared.speedup if compared else None,
        compared=compared,
        providers_requested=tuple(runtime.providers_requested),
        providers_active=tuple(runtime.providers_active),
        provider_reason=runtime.provider_reason,
        method=_method(threads, runtime.providers_active[0], compared),
        host=host,
        measured_on=measured_on(profile, host, runtime=runtime_note()),
    )


def _method(threads: int, provider: str, compared: Compared | None) -> str:
    text = (
        f"one model run after the other on {threads} thread(s) of {provider}, tensors from golden samples repeated to "
        f"the length, {REPEATS} repeats per shape after {WARM_UP_RUNS} runs of warm-up, median of the repeats; "
        "throughput: best batch size at the same length; memory: resident set of a fresh worker process after loading "
        "and a few golden samples"
    )
    return f"{text}; speed-up: {COMPARISON}" if compared else text


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


async def _worker_rss(
    bundle: Bundle, profile_name: str, profile: DeviceProfile, engines: Path
) -> tuple[int | None, str | None]:
    """The resident set of a worker with this bundle loaded, or why it isn't known."""
    spec = WorkerSpec(
        model=bundle.manifest.name,
        bundle_path=bundle.path,
        profile=profile_name,
        state_dir=engines,
        intra_op_threads=session_options(bundle.manifest.session, profile.threads).intra_op_threads,
    )
    worker = WorkerHandle(spec)
    try:
        report = await worker.start("quick", timeout_s=MEMORY_TIMEOUT_S)
    except WorkerLost as error:
        return None, str(error)
    finally:
        await worker.stop()
    return report.rss_bytes, None
