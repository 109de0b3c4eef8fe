"""What a device says over MQTT: ``status``, ``telemetry`` and ``event``, each one JSON object.

A number that was not measured is ``null`` and a ``*_reason`` beside it says why. Schema ``1.x`` only adds fields;
a reader ignores those it doesn't know.
"""

from __future__ import annotations

import datetime
from typing import Literal

import msgspec

from aios_edge.histogram import Histogram as Histogram  # part of the messages, so readers find it here too

SCHEMA = "1.0"
Scalar = str | int | float | bool | None
Contract = Literal["checked", "none"]


def rfc3339(unix_s: float) -> str:
    """A UTC time stamp as in RFC 3339, to the millisecond: ``2026-01-31T12:00:00.000Z``."""
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class ProviderStep(msgspec.Struct, frozen=True, kw_only=True):
    """An execution provider of the profile's chain at one model. ``options``: what onnxruntime was to be handed.

    ``reason``: why it isn't active. ``nodes``: how many of the model's nodes run on it, as the graph was divided when
    the session was made, and ``operators`` which; None, and ``nodes_reason``, where onnxruntime doesn't tell.
    """

    name: str
    active: bool
    reason: str | None = None
    options: dict[str, str] = {}
    nodes: int | None = None
    nodes_reason: str | None = None
    operators: dict[str, int] = {}


class BundleStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the device. ``bundle_id`` is None for a raw ONNX file, whose ``contract`` is ``none``: nothing was
    promised, nothing is checked."""

    model: str
    version: str
    bundle_id: str | None
    state: str  # loading, ready, refused, restarting …
    contract: Contract = "checked"
    providers_requested: tuple[str, ...] = ()
    providers_active: tuple[str, ...] = ()
    providers_reason: str | None = None
    provider_steps: tuple[ProviderStep, ...] = ()
    detail: str | None = None


class StatusBody(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows about itself; the reporter adds who, when and whether it is online.

    ``bundles`` and ``providers_active`` are None in the will alone, which speaks of a time it can't know.
    """

    agent_version: str
    profile: str
    providers_requested: tuple[str, ...] = ()
    providers_active: tuple[str, ...] | None = ()
    providers_reason: str | None = None  # why active differs from requested, or is None
    bundles: tuple[BundleStatus, ...] | None = ()
    bundles_reason: str | None = None
    emulated_slowdown: float | None = None  # None: this device is what it says it is


class Status(StatusBody, frozen=True, kw_only=True):
    """Retained. As the will it says ``offline``, and ``ts`` is then when the lost connection began.

    ``boot_id`` is new with every start of the agent: the same one again means only the network was away.
    """

    schema: str = SCHEMA
    ts: str
    status: Literal["online", "offline"]
    why: str
    group: str
    device: str
    boot_id: str


class PowerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the window. ``total_w`` is the device's, as ``total_method`` obtained it from ``total_source``.

    ``idle_w`` is the baseline that was subtracted for ``active_w``.
    """

    total_w: float | None = None
    total_method: str = "unknown"
    total_source: str | None = None
    total_reason: str | None = None
    idle_w: float | None = None
    idle_method: str | None = None
    active_w: float | None = None
    rails_w: dict[str, float] = {}
    samples: int = 0


class EnergyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the window. Per inference counts those that ran here only, also where the cloud was asked again; ``gross`` is
    everything the device used, ``active`` what it used above idle. ``method`` is that of the power."""

    energy_j: float | None = None
    energy_reason: str | None = None
    j_per_inference_gross: float | None = None
    j_per_inference_active: float | None = None
    j_per_inference_reason: str | None = None
    method: str = "unknown"


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """From arrival to answer, of requests that were answered, wherever they ran."""

    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    latency_reason: str | None = None
    histogram: Histogram = Histogram()


class RequestFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of the window. ``late`` of ``with_deadline``; ``batch_sizes`` counts requests by the batch they shared."""

    offered: int = 0
    answered: int = 0
    throughput_per_s: float = 0.0
    with_deadline: int = 0
    late: int = 0
    routes: dict[str, int] = {}
    reasons: dict[str, int] = {}
    batch_sizes: dict[str, int] = {}


class UnauthorizedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of the window that had no known key (401), and the addresses most of them came from, ten at most."""

    count: int = 0
    addresses: dict[str, int] = {}


class QueueFigures(msgspec.Struct, frozen=True, kw_only=True):
    """``depth`` when the window closed, and ``waiting_limits``: how many without a deadline might wait then, by model
    (those that were asked without one); waits of the window's local requests."""

    depth: int | None = None
    depth_reason: str | None = None
    waiting_limits: dict[str, int] = {}
    wait_p50_s: float | None = None
    wait_p95_s: float | None = None
    wait_reason: str | None = None


class WorkerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that serves; without a process it is a thread of the agent, and its memory the agent's."""

    pid: int | None
    rss_bytes: int | None


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Resident sets: the supervisor's, and those of each model's workers together; ``workers``: each that serves.
    ``pressure_percent``: how much of the last ten seconds some task of the device waited for memory."""

    agent_rss_bytes: int | None = None
    workers_rss_bytes: dict[str, int] = {}
    workers: dict[str, tuple[WorkerFigures, ...]] = {}
    memory_reason: str | None = None
    pressure_percent: float | None = None
    pressure_reason: str | None = None


class BudgetFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What may be spent in a day, and what is left of it now."""

    per_day: float
    left: float


class CloudSpending(msgspec.Struct, frozen=True, kw_only=True):
    """What went to an endpoint since start: inference requests, the bytes of their bodies and of the answers', and what
    they cost in the user's unit."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    cost: float = 0.0


class CloudFigures(CloudSpending, frozen=True, kw_only=True):
    """One endpoint. ``budgets``: ``requests``, ``bytes`` and ``cost``, those that have a limit."""

    budgets: dict[str, BudgetFigures] = {}


class TrialFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that answers part of a model's requests before it takes over; ``phase`` is ``shadow`` or ``canary``.

    It ends after ``of_answers`` ``answers`` of the successor, or in ``ends_in_s``. ``disagreed`` of ``compared`` rows
    got another label than from the bundle that serves, ``skipped`` copies had no room. Failures, slow batches and the
    95th percentile of their time are of this phase: the successor's, and those of the bundle that serves
    (``current_…``).
    """

    successor: str  # its version
    phase: str
    answers: int
    of_answers: int
    ends_in_s: float
    compared: int
    disagreed: int
    max_disagreement: float
    skipped: int
    failures: int
    slow_batches: int
    p95_s: float | None
    current_failures: int
    current_slow_batches: int
    current_p95_s: float | None


class PolicyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The routing policy in force: what tells it from others, and since when (RFC 3339)."""

    digest: str
    since: str


class MqttInferFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Inference asked for over MQTT, since the start. Of ``asked`` ``answered`` have their answer at the broker
    (refusals are answers), ``shed`` were refused by the door for being too many at once, ``lost`` answers never got
    there. ``ignored``: retained messages, and those that can't be read. ``waiting``: answers that the broker hasn't
    acknowledged."""

    asked: int = 0
    answered: int = 0
    shed: int = 0
    ignored: int = 0
    lost: int = 0
    lost_reason: str | None = None  # of the last one
    in_flight: int = 0
    waiting: int = 0


class OutboxFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Messages that wait for the broker, and those the byte bound cost since the outbox was made."""

    depth: int = 0
    depth_bytes: int = 0
    dropped_telemetry: int = 0
    dropped_events: int = 0
    error: str | None = None  # for example a full disk


class Temperature(msgspec.Struct, frozen=True, kw_only=True):
    """The last reading of one thermal zone."""

    name: str
    temperature_c: float


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """One window. ``seq`` counts from 1 per ``boot_id``, so that a reader sees what the outbox had to drop."""

    schema: str = SCHEMA
    ts: str
    boot_id: str
    seq: int
    window_s: float
    power: PowerFigures = PowerFigures()
    energy: EnergyFigures = EnergyFigures()
    latency: LatencyFigures = LatencyFigures()
    requests: RequestFigures = RequestFigures()
    unauthorized: UnauthorizedFigures = UnauthorizedFigures()
    queue: QueueFigures = QueueFigures()
    breakers: dict[str, str] = {}  # cloud endpoint -> closed, open, half_open
    cloud: dict[str, CloudFigures] = {}  # cloud endpoint -> what it was sent since start, and what it may still be
    thermal: tuple[Temperature, ...] = ()
    thermal_reason: str | None = None  # why there is none
    throttled: bool | None = None
    throttled_reason: str | None = None
    battery_percent: float | None = None
    battery_reason: str | None = None
    strained: tuple[str, ...] = ()  # for what requests leave that the device could answer: hot, throttled …
    cpu_utilisation: float | None = None  # 0 to 1, all cores
    cpu_utilisation_reason: str | None = None
    memory: MemoryFigures = MemoryFigures()
    trials: dict[str, TrialFigures] = {}  # by model, while they go on
    outbox: OutboxFigures = OutboxFigures()
    mqtt_infer: MqttInferFigures | None = None  # None: it isn't answered here
    policy: PolicyFigures | None = None  # None: of an agent that has none


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened: ``activated``, ``worker_crashed``, ``breaker_opened``, ``throttled`` …"""

    schema: str = SCHEMA
    ts: str
    boot_id: str
    kind: str
    detail: dict[str, Scalar] = {}
