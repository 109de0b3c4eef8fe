"""Energy per inference: mean power while inferring, times the time, divided by the inferences.

A measurement runs for at least ten seconds and is repeated, because sensors are slow and coarse; a model of power
from CPU time (``estimated``) gains nothing from that and gets one short run. Gross is the whole device's energy;
``active`` has the idle power subtracted, which was taken just before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from device_agent.power.meter import PowerMeter

MEASURED_RUN_S = 10.0
ESTIMATED_RUN_S = 2.0
MEASURED_REPEATS = 3
_SAMPLE_EVERY_S = 0.25
_PROBE_S = 0.25


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Joules per inference: median over the repeats, gross and above idle; None with a ``reason``.

    ``method`` is the power total's: ``measured``, ``sum_of_rails``, ``estimated`` or ``unknown``.
    """

    j_per_inference: float | None = None
    active_j_per_inference: float | None = None
    method: str = "unknown"
    source: str | None = None
    reason: str | None = None
    idle_w: float | None = None
    repeats: int = 0
    run_s: float = 0.0
    spread_j: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Run:
    power_w: float
    seconds: float
    inferences: int

    @property
    def j_per_inference(self) -> float:
        return self.power_w * self.seconds / self.inferences


def measure_energy(
    infer: Callable[[], object],
    meter: PowerMeter,
    *,
    inferences_per_call: int = 1,
    run_s: float | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Energy:
    """Call ``infer`` over and over and read the meter beside it. ``run_s`` overrides how long a run is."""
    meter.sample()
    time.sleep(_PROBE_S)  # counters and CPU times only tell between two samples
    probe = meter.sample()
    if probe.total_w is None:
        return Energy(reason=probe.reason or "no power source gives a total")
    estimated = probe.total_method == "estimated"
    run_s = run_s or (ESTIMATED_RUN_S if estimated else MEASURED_RUN_S)
    repeats = 1 if estimated else MEASURED_REPEATS
    on_progress(f"energy ({probe.total_method}): idle, then {repeats} run(s) of {run_s:g} s")
    idle = _mean_power(meter, run_s, lambda: time.sleep(_SAMPLE_EVERY_S), 0)
    if estimated and probe.idle_w is not None:
        idle = _Run(probe.idle_w, run_s, 0)
    runs = [_mean_power(meter, run_s, infer, inferences_per_call) for _ in range(repeats)]
    kept = [run for run in runs if run is not None]
    if not kept:
        return Energy(reason="the power source stopped giving a total", method=probe.total_method)
    gross = [run.j_per_inference for run in kept]
    active_j = None
    if idle is not None:
        active_j = statistics.median((run.power_w - idle.power_w) * run.seconds / run.inferences for run in kept)
    return Energy(
        j_per_inference=statistics.median(gross),
        active_j_per_inference=active_j,
        method=probe.total_method,
        source=probe.total_source,
        reason=None if active_j is not None else "gross only: no idle power",
        idle_w=idle.power_w if idle else None,
        repeats=len(kept),
        run_s=run_s,
        spread_j=(min(gross), max(gross)),
    )


def _mean_power(meter: PowerMeter, run_s: float, work: Callable[[], object], inferences_per_call: int) -> _Run | None:
    """Mean of the readings, each weighted by the time it stands for; None if no reading gave a total."""
    meter.sample()
    started_at = sampled_at = time.monotonic()
    weighted = covered_s = 0.0
    calls = 0
    while (now := time.monotonic()) - started_at < run_s or calls == 0 or covered_s == 0.0:
        work()
        calls += 1
        now = time.monotonic()
        if now - sampled_at < min(_SAMPLE_EVERY_S, run_s):
            continue
        reading = meter.sample()
        if reading.total_w is None:
            return None
        weighted += reading.total_w * (now - sampled_at)
        covered_s += now - sampled_at
        sampled_at = now
    return _Run(weighted / covered_s, now - started_at, max(1, calls * inferences_per_call))
