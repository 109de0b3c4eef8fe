"""``GET /status``: one JSON document with everything a person would ask first. Values only; the agent fills them."""

from __future__ import annotations

from typing import Literal

import msgspec

from aios_edge.mqtt import LinkState
from aios_edge.telemetry import (
    BudgetFigures,
    BundleStatus,
    CloudSpending,
    Contract,
    Event,
    MqttInferFigures,
    PolicyFigures,
    Scalar,
    TrialFigures,
)
from device_agent.device_state import DeviceState
from device_agent.power.reading import PowerReading
from device_agent.rejected import Rejected
from device_agent.reporter import ReporterCounts
from device_agent.values import ActivationReport

STATUS_SCHEMA = "1.0"


class ProbationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that was swapped in a while ago: which one would come back, how long still, and how it does. ``slow``
    of ``batches`` took clearly longer than they should."""

    previous: str
    ends_in_s: float
    answers: int
    failures: int
    batches: int
    slow: int
    p95_s: float | None
    expected_p95_s: float | None


class EngineBuild(msgspec.Struct, frozen=True, kw_only=True):
    """A build that goes on: its worker's stage, how long it is at it, and what lies in the cache by now."""

    stage: str
    elapsed_s: float
    size_bytes: int


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of a model, or where one is to be: whether it ``serves``, requests it has, providers it runs on, and
    why there is none."""

    pid: int | None
    serves: bool
    rss_bytes: int | None
    running: int
    providers_active: tuple[str, ...]
    detail: str | None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model. A batch is predicted to take ``service_base_s + service_per_unit_s * padded tokens``, off by
    ``spread`` of it (one standard deviation); ``caution``: by how much the margin of a promise is wider than that asks
    for, because promises were broken. ``waiting_limit``: how many without a deadline may wait at the moment,
    None before the first of them, or when ``queue_delay_s`` is off. ``contract`` ``none`` is a raw model's, which has
    no ``bundle_id``. ``engine_build``: TensorRT's engine, while it is built beside. ``worker_pid`` and
    ``worker_rss_bytes`` are those of one of its ``workers``."""

    model: str
    version: str
    bundle_id: str | None
    contract: Contract
    path: str
    pinned: bool
    never_leave_device: bool
    state: str
    detail: str | None
    worker_pid: int | None
    worker_rss_bytes: int | None
    worker_max_rss_bytes: int | None
    workers_serving: int
    workers: tuple[WorkerStatus, ...]
    restarts: int
    recycles: int
    queued: int
    waiting_limit: int | None
    running: int
    max_batch_size: int
    service_base_s: float
    service_per_unit_s: float
    spread: float
    caution: float
    activation: ActivationReport | None
    engine_build: EngineBuild | None
    probation: ProbationStatus | None
    trial: TrialFigures | None
    rejected: Rejected | None


class CloudModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of our models at an endpoint. ``reason`` says why it isn't usable, and, where it was never asked, why
    nobody knows how long an answer takes."""

    remote: str
    usable: bool
    reason: str | None
    expected_s: float | None
    safe_s: float | None


class CloudStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint. ``hedges``: requests it was sent because another endpoint took long. ``budgets``: ``requests``,
    ``bytes`` and ``cost``, those that have a limit."""

    url: str
    breaker: str
    models: dict[str, CloudModelStatus]
    hedges: int
    spent: CloudSpending
    budgets: dict[str, BudgetFigures]


class EmulationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is pretended here: 1.0 means nothing."""

    slowdown: float


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The machine under the agent."""

    hostname: str
    machine: str
    kernel: str
    python: str
    cpu_count: int | None


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Who this is."""

    id: str
    group: str
    profile: str
    state_dir: str


class PrivacyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Request bodies that went to a cloud since start. ``private_payloads_sent``: of requests that must not leave, by
    word of the client or of the settings: always 0. ``kept_back``: refused at the last moment, a fault of ours too."""

    never_leave_device: tuple[str, ...]
    payloads_sent: dict[str, int]
    private_payloads_sent: int
    kept_back: int


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What became of reading the configuration again. ``digest``: of the policy in force from then on; ``changed``:
    keys with their values before and after; ``error``: why nothing was taken over."""

    outcome: Literal["changed", "unchanged", "refused"]
    digest: str
    changed: tuple[str, ...] = ()
    error: str | None = None


class PolicyStatus(PolicyFigures, frozen=True, kw_only=True):
    """The policy in force, with its values, and how the last reload went; None: there was none."""

    values: dict[str, Scalar]
    last_reload: Reloaded | None


class MqttInferStatus(MqttInferFigures, frozen=True, kw_only=True):
    """With its connection, which isn't the one that reports use."""

    link: LinkState


class DeviceStateStatus(DeviceState, frozen=True, kw_only=True):
    """What triggers look at; ``strained``: the reasons for which requests leave that this device could answer."""

    strained: tuple[str, ...] = ()


class GrpcStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The gRPC door. ``serving``: it takes calls; ``in_flight``: calls that aren't over, streams included."""

    address: str
    serving: bool
    in_flight: int


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document. ``totals``: requests since start by route."""

    schema: str = STATUS_SCHEMA
    agent_version: str
    boot_id: str
    state: str  # starting, ready, degraded, draining
    uptime_s: float
    device: DeviceStatus
    host: HostStatus
    listen: tuple[str, ...]
    grpc: GrpcStatus | None  # None: agent.toml doesn't ask for it
    models: dict[str, ModelStatus]
    refused: tuple[BundleStatus, ...]
    unloaded: tuple[BundleStatus, ...]
    cloud: dict[str, CloudStatus]
    power: PowerReading | None
    power_reason: str | None
    device_state: DeviceStateStatus
    policy: PolicyStatus
    privacy: PrivacyStatus
    mqtt: ReporterCounts
    mqtt_infer: MqttInferStatus | None  # None: it isn't answered here
    totals: dict[str, int]
    in_flight: int
    in_flight_bytes: int
    emulate: EmulationStatus
    events: tuple[Event, ...]
