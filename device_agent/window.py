"""Completions and power readings in, one telemetry window out. Pure: every time is passed in.

Energy is the time-weighted mean of the power readings times the length of the window, so a reading that was missed
costs precision, not joules. Only local inferences divide it: what the cloud computed, it also paid for. The active
share is what lies above the idle baseline of each reading.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from aios_edge.histogram import Histogram
from aios_edge.telemetry import (
    CloudFigures,
    EnergyFigures,
    LatencyFigures,
    MemoryFigures,
    MqttInferFigures,
    OutboxFigures,
    PolicyFigures,
    PowerFigures,
    QueueFigures,
    RequestFigures,
    Telemetry,
    Temperature,
    TrialFigures,
    UnauthorizedFigures,
    WorkerFigures,
)
from device_agent.power.reading import PowerReading
from device_agent.values import Completion

#: Completions kept in full; counts stay exact and latencies go into the histogram in portions of so many. A portion of
#: thousands would hold up whoever is being answered by milliseconds.
_PORTION = 256
_MOST_ADDRESSES = 1000  # of callers without a key that are told apart
_TOLD_ADDRESSES = 10


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows at the moment a window closes."""

    queue_depth: int | None = None
    waiting_limits: dict[str, int] = {}
    breakers: dict[str, str] = {}
    cloud: dict[str, CloudFigures] = {}
    strained: tuple[str, ...] = ()
    agent_rss_bytes: int | None = None
    workers_rss_bytes: dict[str, int] = {}
    workers: dict[str, tuple[WorkerFigures, ...]] = {}
    trials: dict[str, TrialFigures] = {}
    policy: PolicyFigures | None = None
    mqtt_infer: MqttInferFigures | None = None


class TelemetryWindow:
    """Collects until :meth:`close`, which answers and begins the next window at once."""

    def __init__(self, opened_at: float) -> None:
        self._last_reading: PowerReading | None = None
        self._begin(opened_at)

    def _begin(self, now: float) -> None:
        self._opened_at = now
        self._answered = self._late = self._with_deadline = self._local = 0
        self._routes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._strangers = 0
        self._addresses: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._waits: list[float] = []
        self._latency = self._wait = Histogram()
        self._readings: list[PowerReading] = []
        self._weights: list[float] = []

    def add(self, item: Completion | PowerReading) -> None:
        """One request that ended, or one sample of the power meter."""
        if isinstance(item, PowerReading):
            before = self._last_reading.at_s if self._last_reading else self._opened_at
            self._readings.append(item)
            self._weights.append(max(0.0, item.at_s - max(before, self._opened_at)))
            self._last_reading = item
            return
        self._routes[item.route] += 1
        self._reasons[item.reason] += 1
        self._with_deadline += item.late is not None
        self._late += item.late is True
        if item.status >= 400 or item.route not in ("local", "cloud"):
            return
        self._answered += 1
        self._latencies.append(max(0.0, item.latency_s))
        if item.route == "local" or item.batch_size is not None:  # it ran here, also where the cloud bettered it
            self._local += 1
            if item.batch_size is not None:
                self._batches[item.batch_size] += 1
            if item.queue_s is not None:
                self._waits.append(max(0.0, item.queue_s))
        if len(self._latencies) >= _PORTION:
            self._fold()

    def unauthorized(self, address: str) -> None:
        """One that was sent away for its key."""
        self._strangers += 1
        if address in self._addresses or len(self._addresses) < _MOST_ADDRESSES:
            self._addresses[address] += 1

    def _fold(self) -> None:
        self._latency = self._latency.merge(Histogram.of(self._latencies))
        self._wait = self._wait.merge(Histogram.of(self._waits))
        self._latencies, self._waits = [], []

    def close(self, now: float, *, ts: str, boot_id: str, seq: int, gauges: Gauges, outbox: OutboxFigures) -> Telemetry:
        """The window's telemetry; ``ts``, ``boot_id`` and ``seq`` go into it as they are."""
        self._fold()
        window_s = max(0.0, now - self._opened_at)
        power = self._power()
        last = self._last_reading
        message = Telemetry(
            ts=ts,
            boot_id=boot_id,
            seq=seq,
            window_s=round(window_s, 6),
            power=power,
            energy=self._energy(power, window_s),
            latency=_latency(self._latency),
            requests=RequestFigures(
                offered=sum(self._routes.values()),
                answered=self._answered,
                throughput_per_s=self._answered / window_s if window_s > 0 else 0.0,
                with_deadline=self._with_deadline,
                late=self._late,
                routes=dict(sorted(self._routes.items())),
                reasons=dict(sorted(self._reasons.items())),
                batch_sizes={str(size): count for size, count in sorted(self._batches.items())},
            ),
            unauthorized=UnauthorizedFigures(
                count=self._strangers, addresses=dict(self._addresses.most_common(_TOLD_ADDRESSES))
            ),
            queue=QueueFigures(
                depth=gauges.queue_depth,
                depth_reason="not known to the agent" if gauges.queue_depth is None else None,
                waiting_limits=gauges.waiting_limits,
                wait_p50_s=self._wait.quantile(0.5),
                wait_p95_s=self._wait.quantile(0.95),
                wait_reason=None if self._wait.count else "no local request in this window",
            ),
            breakers=gauges.breakers,
            cloud=gauges.cloud,
            strained=gauges.strained,
            thermal=tuple(Temperature(name=z.name, temperature_c=z.temperature_c) for z in last.thermal)
            if last
            else (),
            thermal_reason=None if last and last.thermal else _why(last, "thermal_reason"),
            throttled=any(r.throttled for r in self._readings) if any(_knows(r) for r in self._readings) else None,
            throttled_reason=None if any(_knows(r) for r in self._readings) else _why(last, "throttled_reason"),
            battery_percent=last.battery.percent if last and last.battery else None,
            battery_reason=None if last and last.battery else _why(last, "battery_reason"),
            cpu_utilisation=_mean([(r.cpu_utilisation, w) for r, w in zip(self._readings, self._weights, strict=True)]),
            memory=MemoryFigures(
                agent_rss_bytes=gauges.agent_rss_bytes,
                workers_rss_bytes=gauges.workers_rss_bytes,
                workers=gauges.workers,
                memory_reason="the agent's resident set can't be read" if gauges.agent_rss_bytes is None else None,
                pressure_percent=last.memory_pressure_percent if last else None,
                pressure_reason=None
                if last and last.memory_pressure_percent is not None
                else _why(last, "memory_pressure_reason"),
            ),
            trials=gauges.trials,
            outbox=outbox,
            policy=gauges.policy,
            mqtt_infer=gauges.mqtt_infer,
        )
        if message.cpu_utilisation is None:
            reason = _why(last, "cpu_utilisation_reason")
            message = msgspec.structs.replace(message, cpu_utilisation_reason=reason)
        self._begin(now)
        return message

    def _power(self) -> PowerFigures:
        if not self._readings:
            return PowerFigures(total_reason="no power sample in this window")
        usable = [(r, w) for r, w in zip(self._readings, self._weights, strict=True) if r.total_w is not None]
        last = self._readings[-1]
        if not usable:
            return PowerFigures(total_source=last.total_source, total_reason=last.reason, samples=len(self._readings))
        newest = usable[-1][0]
        # Totals of another source don't average with this one's.
        same = [
            (r, w) for r, w in usable if (r.total_method, r.total_source) == (newest.total_method, newest.total_source)
        ]
        rails: dict[str, list[float]] = {}
        for reading, _ in same:
            for rail in reading.rails:
                rails.setdefault(rail.name, []).append(rail.power_w)
        return PowerFigures(
            total_w=_mean([(r.total_w, w) for r, w in same]),
            total_method=newest.total_method,
            total_source=newest.total_source,
            idle_w=newest.idle_w,
            idle_method=newest.idle_method,
            active_w=_mean([(r.active_w, w) for r, w in same]),
            rails_w={name: sum(values) / len(values) for name, values in rails.items()},
            samples=len(same),
        )

    def _energy(self, power: PowerFigures, window_s: float) -> EnergyFigures:
        if power.total_w is None:
            reason = power.total_reason or "no power"
            return EnergyFigures(energy_reason=reason, j_per_inference_reason=reason)
        energy_j = power.total_w * window_s
        if not self._local:
            reason = "no local inference in this window"
            return EnergyFigures(energy_j=energy_j, j_per_inference_reason=reason, method=power.total_method)
        return EnergyFigures(
            energy_j=energy_j,
            j_per_inference_gross=energy_j / self._local,
            j_per_inference_active=None if power.active_w is None else power.active_w * window_s / self._local,
            j_per_inference_reason="no idle baseline yet" if power.active_w is None else None,
            method=power.total_method,
        )


def _latency(histogram: Histogram) -> LatencyFigures:
    return LatencyFigures(
        p50_s=histogram.quantile(0.5),
        p95_s=histogram.quantile(0.95),
        p99_s=histogram.quantile(0.99),
        latency_reason=None if histogram.count else "no request was answered in this window",
        histogram=histogram,
    )


def _mean(weighted: list[tuple[float | None, float]]) -> float | None:
    """The weighted mean of what is known; the plain one when nothing has weight."""
    known = [(value, weight) for value, weight in weighted if value is not None]
    if not known:
        return None
    weight = sum(weight for _, weight in known)
    if weight <= 0:
        return sum(value for value, _ in known) / len(known)
    return sum(value * share for value, share in known) / weight


def _knows(reading: PowerReading) -> bool:
    return reading.throttled is not None


def _why(last: PowerReading | None, field: str) -> str:
    reason = getattr(last, field) if last is not None else None
    return str(reason or "no sample in this window")
