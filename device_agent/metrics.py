"""``GET /metrics``: Prometheus text exposition format 0.0.4. Counters live here; gauges come from the status."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from device_agent.device_state import STRAINS
from device_agent.status import AgentStatus, ModelStatus
from device_agent.values import SERVING, Completion

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_Labels = TypeVar("_Labels", bound=tuple[str, ...])
_BREAKER_STATES = ("closed", "open", "half_open")


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Counts completions; :meth:`render` writes the page."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str, int]] = Counter()
        self.late: Counter[str] = Counter()
        self._latency: dict[tuple[str, str], _Histogram] = {}
        self._batch: dict[str, _Histogram] = {}
        self._energy_j: Counter[str] = Counter()

    def record(self, done: Completion) -> None:
        """Count one request that ended."""
        self.requests[done.model, done.route, done.reason, done.status] += 1
        if done.late:
            self.late[done.model] += 1
        if done.status < 400:
            key = (done.model, done.route)
            if (latency := self._latency.get(key)) is None:
                latency = self._latency[key] = _Histogram(LATENCY_BUCKETS_S)
            latency.add(done.latency_s)
        if done.batch_size is not None and done.status < 400:  # what was refused never ran
            if (batch := self._batch.get(done.model)) is None:
                batch = self._batch[done.model] = _Histogram(BATCH_BUCKETS)
            batch.add(done.batch_size)
        if done.energy_j is not None:
            self._energy_j[done.model] += done.energy_j  # type: ignore[assignment]

    def totals(self) -> dict[str, int]:
        """Requests since start, by route."""
        totals: Counter[str] = Counter()
        for (_, route, _, _), count in self.requests.items():
            totals[route] += count
        return dict(totals)

    def render(self, status: AgentStatus) -> bytes:
        """The page. What isn't known is absent, never 0."""
        page = Page()
        version, profile = status.agent_version, status.device.profile
        page.family("aios_build_info", "gauge", "Version and profile of this agent.", [((version, profile), 1)], _BUILD)
        page.family("aios_ready", "gauge", "1 while every model serves.", [((), int(status.state == "ready"))], ())
        page.family("aios_uptime_seconds", "gauge", "Since the agent started.", [((), status.uptime_s)], ())
        page.family("aios_emulated_slowdown", "gauge", "1 is a device as it is.", [((), status.emulate.slowdown)], ())
        self.requests_on(page)
        self._gauges(page, status)
        return page.text()

    def requests_on(self, page: Page) -> None:
        """What was counted of the requests."""
        page.family(
            "aios_requests_total",
            "counter",
            "Requests that ended, by where they ran and why.",
            [((model, route, reason, str(code)), n) for (model, route, reason, code), n in self.requests.items()],
            ("model", "route", "reason", "status"),
        )
        page.family(
            "aios_late_total", "counter", "Answered after their deadline.", _keyed(self.late.items()), ("model",)
        )
        page.histograms("aios_request_latency_seconds", "From arrival to answer.", self._latency, ("model", "route"))
        page.histograms(
            "aios_batch_size",
            "Requests that shared a model run.",
            {(m,): h for m, h in self._batch.items()},
            ("model",),
        )

    def _gauges(self, page: Page, status: AgentStatus) -> None:
        models = status.models.values()
        one = ("model",)
        page.family("aios_queue_depth", "gauge", "Requests waiting.", [((m.model,), m.queued) for m in models], one)
        limited: list[tuple[tuple[str, ...], float]] = [
            ((m.model,), m.waiting_limit) for m in models if m.waiting_limit is not None
        ]
        page.family("aios_waiting_limit", "gauge", "How many without a deadline may wait.", limited, one)
        page.family(
            "aios_running", "gauge", "Requests in the worker's batch.", [((m.model,), m.running) for m in models], one
        )
        page.family(
            "aios_model_ready",
            "gauge",
            "1 while it serves.",
            [((m.model,), int(m.state in SERVING)) for m in models],
            one,
        )
        page.family(
            "aios_workers",
            "gauge",
            "Workers that serve.",
            [((m.model,), m.workers_serving) for m in models],
            one,
        )
        page.family(
            "aios_worker_restarts_total",
            "counter",
            "Workers that died and came back.",
            [((m.model,), m.restarts) for m in models],
            one,
        )
        page.family(
            "aios_worker_recycles_total",
            "counter",
            "Workers that were replaced because of the memory they took.",
            [((m.model,), m.recycles) for m in models],
            one,
        )
        page.family(
            "aios_worker_resident_bytes",
            "gauge",
            "Resident set of its workers together.",
            [((m.model,), rss) for m in models if (rss := _rss_bytes(m)) is not None],
            one,
        )
        page.family(
            "aios_breaker_state",
            "gauge",
            "1 for the state the endpoint's breaker is in.",
            [
                ((name, state), int(cloud.breaker == state))
                for name, cloud in status.cloud.items()
                for state in _BREAKER_STATES
            ],
            ("endpoint", "state"),
        )
        self._cloud(page, status)
        power = status.power
        if power is not None and power.total_w is not None:
            labels = ((power.total_method, power.total_source or ""), power.total_w)
            page.family("aios_power_watts", "gauge", "Power of the device.", [labels], ("method", "source"))
            page.family(
                "aios_inference_energy_joules_total",
                "counter",
                f"Energy of local inferences above idle, estimated from {power.total_method} power.",
                _keyed(self._energy_j.items()),
                one,
            )
        self._device(page, status)
        self._privacy(page, status)
        page.family("aios_outbox_depth", "gauge", "Messages waiting.", [((), status.mqtt.outbox.depth)], ())
        if (infer := status.mqtt_infer) is not None:
            page.family(
                "aios_mqtt_infer_total",
                "counter",
                "Inference asked for over MQTT: how it ended.",
                _keyed((name, getattr(infer, name)) for name in ("answered", "shed", "lost", "ignored")),
                ("outcome",),
            )
        page.family("aios_mqtt_connected", "gauge", "1 while connected.", [((), int(status.mqtt.link.connected))], ())

    def _cloud(self, page: Page, status: AgentStatus) -> None:
        one, spent = ("endpoint",), [(name, cloud.spent) for name, cloud in status.cloud.items()]
        page.family(
            "aios_cloud_requests_total",
            "counter",
            "Inference requests sent to the endpoint.",
            [((name,), sums.requests) for name, sums in spent],
            one,
        )
        page.family(
            "aios_cloud_hedges_total",
            "counter",
            "Of these, sent because another endpoint took long.",
            [((name,), cloud.hedges) for name, cloud in status.cloud.items()],
            one,
        )
        page.family(
            "aios_cloud_bytes_total",
            "counter",
            "Bodies of these requests and of their answers.",
            [
                ((name, direction), count)
                for name, sums in spent
                for direction, count in (("sent", sums.sent_bytes), ("received", sums.received_bytes))
            ],
            ("endpoint", "direction"),
        )
        page.family(
            "aios_cloud_cost_total",
            "counter",
            "What they cost, by cost_per_request.",
            [((name,), sums.cost) for name, sums in spent],
            one,
        )
        page.family(
            "aios_cloud_budget_left",
            "gauge",
            "What may be spent now.",
            [
                ((name, budget), left.left)
                for name, cloud in status.cloud.items()
                for budget, left in cloud.budgets.items()
            ],
            ("endpoint", "budget"),
        )

    def _privacy(self, page: Page, status: AgentStatus) -> None:
        privacy = status.privacy
        page.family(
            "aios_payloads_sent_total",
            "counter",
            "Request bodies sent to a cloud.",
            _keyed(privacy.payloads_sent.items()),
            ("model",),
        )
        page.family(
            "aios_private_payloads_sent_total",
            "counter",
            "Request bodies sent to a cloud that must not leave the device: always 0.",
            [((), privacy.private_payloads_sent)],
            (),
        )

    def _device(self, page: Page, status: AgentStatus) -> None:
        state = status.device_state
        page.family(
            "aios_device_strained",
            "gauge",
            "1 while requests leave for this reason that the device could answer.",
            [((reason.value,), int(reason.value in state.strained)) for reason in STRAINS],
            ("reason",),
        )
        for name, text, value in (
            ("aios_temperature_celsius", "The hottest zone.", state.temperature_c),
            ("aios_battery_percent", "Charge of the device's batteries.", state.battery_percent),
            (
                "aios_memory_pressure_percent",
                "Of the last 10 s some task waited for memory.",
                state.memory_pressure_percent,
            ),
        ):
            page.family(name, "gauge", text, [((), value)] if value is not None else [], ())


def _rss_bytes(model: ModelStatus) -> int | None:
    known = [worker.rss_bytes for worker in model.workers if worker.rss_bytes is not None]
    return sum(known) if known else None


_BUILD = ("version", "profile")
_Sample = tuple[tuple[str, ...], float]


def _keyed(items: Iterable[tuple[str, float]]) -> list[_Sample]:
    return [((key,), value) for key, value in items]


class Page:
    """Families of samples, written one after the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str, samples: list[_Sample], labels: tuple[str, ...]) -> None:
        """One family; without samples it is left out."""
        if samples:
            self._head(name, kind, text)
            self._lines += [f"{name}{_labels(labels, values)} {_number(value)}" for values, value in samples]

    def histograms(
        self,
        name: str,
        text: str,
        series: Mapping[_Labels, _Histogram],
        labels: tuple[str, ...],
    ) -> None:
        """A family of histograms."""
        if series:
            self._head(name, "histogram", text)
        for values, histogram in series.items():
            seen = 0
            for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
                seen += count
                edge = "+Inf" if bound == float("inf") else _number(bound)
                self._lines.append(f"{name}_bucket{_labels((*labels, 'le'), (*values, edge))} {seen}")
            self._lines.append(f"{name}_sum{_labels(labels, values)} {_number(histogram.total)}")
            self._lines.append(f"{name}_count{_labels(labels, values)} {seen}")

    def text(self) -> bytes:
        """All of it."""
        return ("\n".join(self._lines) + "\n").encode()

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + pairs + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
