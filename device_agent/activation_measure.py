"""The checks of an activation that measure: budgets, latency, memory. All against the device's own profile."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge import contract as c
from aios_edge.bundle.read import Bundle
from aios_edge.contract import Contract
from aios_edge.golden import Golden
from aios_edge.manifest import Manifest
from aios_edge.profile import Budgets, DeviceProfile
from aios_edge.session import differences, excess
from device_agent.runtime import Runtime
from device_agent.values import ActivationCheck

WARM_UP_RUNS = 5
LEAST_SAMPLES = 20
MOST_SAMPLES = 200
LATENCY_RUN_S = 0.5
ATTEMPTS = 3

_WHY_MEASURE = "was made for measuring: its accuracy was seen on validation rows only, no promise stands on test rows"

Inputs = Mapping[str, NDArray[np.generic]]


def check_purpose(manifest: Manifest) -> ActivationCheck:
    """``purpose``: a candidate that was given out to be timed doesn't serve."""
    serves = manifest.purpose == "serve"
    return ActivationCheck(name="purpose", passed=serves, detail="made to serve" if serves else _WHY_MEASURE)


def check_profile(bundle: Bundle, profile: DeviceProfile) -> ActivationCheck:
    """``profile``: the contract is no looser, and the session no greedier, than this device's profile allows."""
    session = bundle.manifest.session
    if (greedy := excess(session, profile.threads)) is not None:
        return ActivationCheck(name="profile", passed=False, detail=f"{greedy} ('{profile.name}')")
    found = check_budgets(bundle.contract, profile)
    note = differences(session, profile.threads)
    return found if note is None else msgspec.structs.replace(found, detail=f"{found.detail}; {note}")


def check_budgets(contract: Contract, profile: DeviceProfile) -> ActivationCheck:
    """``profile``: no budget promise that is kept on devices is looser than what this device's profile asks.

    Export-only promises (accuracy) aren't judged here: the recipe may set them, and golden samples stand for them.
    """
    budgets = profile.budgets
    asked: dict[str, float | None] = {
        c.LATENCY_P95: budgets.latency_p95_s,
        c.MEMORY: budgets.memory_bytes,
        c.BUNDLE_SIZE: budgets.bundle_size_bytes,
    }
    for promise in contract.promises:
        budget = asked.get(promise.name)
        if promise.basis != "budget" or promise.check == "export-only" or budget is None:
            continue
        if promise.value > budget * (1 + 1e-9):
            detail = (
                f"{promise.name} is promised as {promise.value:.15g}, profile '{profile.name}' allows {budget:.15g}"
            )
            detail += f" (the bundle was made for '{contract.profile}')"
            return ActivationCheck(name="profile", passed=False, detail=detail, measured=promise.value, promised=budget)
        conditions = promise.conditions
        if promise.name == c.LATENCY_P95 and (
            (conditions.batch or budgets.latency_batch) < budgets.latency_batch
            or (conditions.length or budgets.latency_length) < budgets.latency_length
        ):
            detail = f"{promise.name} is promised at {conditions.batch} x {conditions.length}, profile '{profile.name}'"
            detail += f" asks for {budgets.latency_batch} x {budgets.latency_length}"
            return ActivationCheck(name="profile", passed=False, detail=detail)
    return ActivationCheck(name="profile", passed=True, detail=f"promises no less than profile '{profile.name}' asks")


def latency_inputs(golden: Golden, budgets: Budgets, max_length: int) -> dict[str, NDArray[np.generic]]:
    """A batch of the budget's shape, made of golden samples: each row a sample, repeated to exactly the length."""
    return shaped_inputs(golden, budgets.latency_batch, min(budgets.latency_length, max_length))


def shaped_inputs(golden: Golden, batch: int, length: int) -> dict[str, NDArray[np.generic]]:
    """Input tensors ``[batch, length]`` without padding. Real tokens matter less than true shapes: a transformer's
    time depends on the shape alone."""
    rows = [golden.sample(index % len(golden.raw)) for index in range(batch)]
    return {name: np.concatenate([_stretched(row[name], length) for row in rows]) for name in golden.inputs}


def _stretched(row: NDArray[np.generic], length: int) -> NDArray[np.generic]:
    copies = -(-length // row.shape[1])
    return np.concatenate([row] * copies, axis=1)[:, :length]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Quantiles of one run of measurements, in seconds."""

    p50_s: float
    p95_s: float
    p99_s: float
    samples: int


def measure_latency(runtime: Runtime, inputs: Inputs, *, run_s: float = LATENCY_RUN_S) -> Latency:
    """Time single runs, one after the other, for about ``run_s`` (at least 20 and at most 200 samples)."""
    seconds: list[float] = []
    end_at = time.perf_counter() + run_s
    while len(seconds) < LEAST_SAMPLES or (len(seconds) < MOST_SAMPLES and time.perf_counter() < end_at):
        started_at = time.perf_counter()
        runtime.run(inputs)
        seconds.append(time.perf_counter() - started_at)
    p50, p95, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.95, 0.99)))
    return Latency(p50_s=p50, p95_s=p95, p99_s=p99, samples=len(seconds))


def check_latency(runtime: Runtime, inputs: Inputs, profile: DeviceProfile) -> ActivationCheck:
    """``latency_p95_s``: the profile's budget at its batch, length and threads.

    Other work on the device only ever adds time. So a run that misses the budget is repeated, up to three in all,
    and the run with the smallest median, the one least disturbed, is the measurement.
    """
    budget = profile.budgets.latency_p95_s
    for _ in range(WARM_UP_RUNS):
        runtime.run(inputs)
    runs: list[Latency] = []
    while not runs or (budget is not None and len(runs) < ATTEMPTS and _best(runs).p95_s > budget):
        runs.append(measure_latency(runtime, inputs))
    best = _best(runs)
    shape = " x ".join(str(size) for size in next(iter(inputs.values())).shape)
    detail = f"p95 {best.p95_s * 1e3:.3g} ms, p50 {best.p50_s * 1e3:.3g} ms at {shape}"
    detail += f" on {runtime.options.intra_op_threads} thread(s), {best.samples} samples, best of {len(runs)} run(s)"
    if budget is None:
        detail += "; the profile has no latency budget: kept as this device's baseline"
    elif best.p95_s > budget:
        detail += f"; the budget of profile '{profile.name}' is {budget * 1e3:.3g} ms"
    return ActivationCheck(
        name=c.LATENCY_P95,
        passed=budget is None or best.p95_s <= budget,
        detail=detail,
        measured=best.p95_s,
        promised=budget,
        skipped=budget is None,
    )


def check_memory(rss_bytes: int | None, profile: DeviceProfile) -> ActivationCheck:
    """``memory_bytes``: the worker process's resident set against the profile's budget; None: not measurable."""
    budget = profile.budgets.memory_bytes
    detail = f"resident set {rss_bytes} bytes, budget {budget}"
    if rss_bytes is None:
        detail = "skipped: not measurable alone, the worker is a thread of the agent"
    elif budget is None:
        detail = f"resident set {rss_bytes} bytes; the profile has no memory budget"
    skipped = rss_bytes is None or budget is None
    return ActivationCheck(
        name=c.MEMORY,
        passed=skipped or (rss_bytes is not None and budget is not None and rss_bytes <= budget),
        detail=detail,
        measured=rss_bytes,
        promised=budget,
        skipped=skipped,
    )


def _best(runs: list[Latency]) -> Latency:
    return min(runs, key=lambda run: run.p50_s)
