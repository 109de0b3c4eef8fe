"""Two bundles in turn on this machine: how much faster one is than the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.errors import UsageError
from aios_edge.measurement import Compared, Quantiles, model_of
from device_agent.activation_measure import WARM_UP_RUNS
from device_agent.runtime import Runtime

RUN_S = 3.0
LEAST_ROUNDS, MOST_ROUNDS = 20, 200
COMPARISON = "median of the ratios of neighbouring runs, this bundle and the other in turn"


def compare(runtime: Runtime, reference: Runtime, other: Bundle, inputs: Mapping[str, NDArray[np.generic]]) -> Compared:
    """Run both models in turn on the same tensors, so that what slows the machine down for a while slows both.

    ``reference`` is the model of ``other``. Raises :class:`UsageError` when it takes other tensors or threads.
    """
    names = [spec.name for spec in reference.inputs]
    if sorted(names) != sorted(inputs):
        what = f"takes {', '.join(names)}, the measured bundle {', '.join(inputs)}"
        raise UsageError(what, where=str(other.path), remedy="Compare bundles of one export")
    mine, yours = runtime.options.intra_op_threads, reference.options.intra_op_threads
    if mine != yours:
        what = f"runs on {yours} thread(s), the measured bundle on {mine}"
        raise UsageError(what, where=str(other.path), remedy="Compare bundles that were made for one profile")
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(WARM_UP_RUNS):
        runtime.run(inputs)
        reference.run(inputs)
    end_at = time.perf_counter() + RUN_S
    while len(ours) < LEAST_ROUNDS or (len(ours) < MOST_ROUNDS and time.perf_counter() < end_at):
        for model, seconds in ((runtime, ours), (reference, theirs)):
            started_at = time.perf_counter()
            model.run(inputs)
            seconds.append(time.perf_counter() - started_at)
    p50, p95, p99 = (float(value) for value in np.quantile(theirs, (0.5, 0.95, 0.99)))
    return Compared(
        bundle=str(other.path),
        bundle_id=other.bundle_id,
        candidate=other.manifest.provenance.candidate,
        precision=other.manifest.precision,
        model_sha256=model_of(other.manifest),
        providers_active=reference.providers_active,
        latency_s=Quantiles(p50=p50, p95=p95, p99=p99),
        speedup=statistics.median(slow / quick for slow, quick in zip(theirs, ours, strict=True)),
        rounds=len(ours),
    )
