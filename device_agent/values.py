"""The values that cross the agent's module boundaries on a request's way, all frozen.

Times named ``_at`` are seconds of one monotonic clock (``time.monotonic``); durations end in ``_s``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from aios_edge.errors import AiosEdgeError, PromiseBroken
from aios_edge.manifest import TensorSpec
from aios_edge.oip.envelope import Parameters
from aios_edge.telemetry import ProviderStep


class Reason(str, enum.Enum):
    """Why a request went where it went; the code in responses and telemetry."""

    IDLE = "idle"  # local: the worker was free
    IN_TIME = "in_time"  # local: predicted to complete before the deadline
    NO_DEADLINE = "no_deadline"  # local: nothing to be late for
    LOCAL_ONLY = "local_only"  # local: the client forbade the cloud, or the model never leaves
    CLOUD_UNAVAILABLE = "cloud_unavailable"  # local although slow, or shed: no cloud, or its breaker is open
    PREDICTED_LATE = "predicted_late"  # cloud: this device would be late
    HOT = "hot"  # cloud: the device is at its temperature limit
    THROTTLED = "throttled"  # cloud: the device is being throttled
    BATTERY_LOW = "battery_low"  # cloud: the battery is nearly empty
    MEMORY_PRESSURE = "memory_pressure"  # cloud: work here waits for memory
    LOW_CONFIDENCE = "low_confidence"  # cloud: this device answered, and wasn't sure
    WORKER_LOST = "worker_lost"  # cloud or shed: the worker died or is starting
    QUARANTINED = "quarantined"  # cloud or shed: its workers died again and again, and none is started
    LOADING = "loading"  # cloud, local or shed: the model was unloaded for others, and is to be loaded again
    RETRIED = "retried"  # local: run again, alone, after its worker died
    CLOUD_FAILED = "cloud_failed"  # local or shed: the cloud was tried and failed
    HEDGED = "hedged"  # cloud: the endpoint that was asked first took long, and a second one was sooner
    BUDGET = "budget"  # local or shed: only the spent budget of an endpoint kept it from the cloud
    QUEUE_FULL = "queue_full"  # shed
    DEADLINE_PASSED = "deadline_passed"  # shed: nobody waits for this answer any more
    DRAINING = "draining"  # shed: the agent is stopping, or the model was unloaded


#: States of a model that answers requests: ``resting`` and ``waking`` ones were unloaded to make room for others.
SERVING = frozenset(("ready", "resting", "waking"))


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of one request; ``body`` stays as it came (Open Inference Protocol JSON, then binary tensors).

    ``json_length`` is the length of the JSON part, or None when the body is JSON alone. ``cost_hint_bytes``
    estimates the work from the size of the input data.
    """

    request_id: int  # the agent's own number
    model: str
    body: bytes
    json_length: int | None
    client_id: str | None  # the protocol's "id", echoed
    priority: int
    deadline_at: float | None
    local_only: bool
    arrived_at: float
    cost_hint_bytes: int
    natural: bool = False  # asks with the task's natural input, which a foreign server may not know
    tenant: str = ""  # who asks, where there are tenants
    lowered: bool = False  # claimed a higher priority than its tenant may

    @property
    def changed_parameters(self) -> Parameters:
        """What of the client's own parameters holds otherwise than it asked: said to it, and to the cloud."""
        return {"priority": self.priority} if self.lowered else {}


class Local(msgspec.Struct, frozen=True, tag=True):
    """Run it on this device. ``safe``: it has a deadline and was predicted to be in time, margin included."""

    reason: Reason
    safe: bool = False


class Cloud(msgspec.Struct, frozen=True, tag=True):
    """Send it to the cloud endpoint of that name."""

    reason: Reason
    endpoint: str


class Shed(msgspec.Struct, frozen=True, tag=True):
    """Refuse it now: HTTP 503 with Retry-After."""

    reason: Reason
    retry_after_s: float


Decision = Local | Cloud | Shed


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request: the telemetry window's only input about requests.

    ``route`` is ``local``, ``cloud``, ``shed`` or ``error``; figures that don't apply are None.
    """

    model: str
    route: str
    reason: str
    status: int
    latency_s: float
    queue_s: float | None = None
    compute_s: float | None = None
    batch_size: int | None = None
    late: bool | None = None  # None: it had no deadline
    energy_j: float | None = None
    request_id: int | None = None  # the agent's own number
    client_id: str | None = None  # the protocol's "id"


class ActivationCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One check of the activation: its name, whether it passed, and what was seen against what was promised.

    ``skipped``: it could not be made here, ``detail`` says why; it then counts as neither kept nor broken.
    """

    name: str
    passed: bool
    detail: str
    measured: float | None = None
    promised: float | None = None
    skipped: bool = False


#: When a worker uses TensorRT: always, and builds the engine as it loads; where the engine is there; not at all.
Engines = Literal["build", "cached", "off"]


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """TensorRT's engine for a model on this device: ``cached``, ``built`` just now, ``missing`` (it can be built),
    ``unfit`` (it was built and must not serve), ``failed`` to be built, or ``nothing`` to build here; ``reason`` of the
    last three. ``took_s``: to build it, when that was."""

    state: Literal["cached", "built", "missing", "unfit", "failed", "nothing"]
    reason: str | None = None
    folder: str | None = None
    size_bytes: int | None = None
    took_s: float | None = None


class ActivationReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker found when it loaded a bundle and checked its contract on this device.

    ``inputs`` and ``outputs`` are the session's, and so is ``intra_op_threads``; ``cpus`` are those that the worker's
    threads may run on. A raw model has no bundle id; here it is a digest over its files.
    """

    bundle_id: str
    model: str
    version: str
    providers_requested: tuple[str, ...]
    providers_active: tuple[str, ...]
    provider_reason: str | None  # why the active chain differs from the requested one
    checks: tuple[ActivationCheck, ...]
    latency_p95_s: float | None  # this device's own first measurement: its live baseline
    rss_bytes: int | None
    load_s: float
    provider_steps: tuple[ProviderStep, ...] = ()  # the chain, provider by provider
    engine: EngineReport | None = None  # None: no TensorRT in the chain, or its engines aren't kept
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    intra_op_threads: int | None = None
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RefusedBundle:
    """A bundle that may not serve here, and what refused it."""

    path: Path
    error: AiosEdgeError

    @property
    def check(self) -> str:
        """The name of the check that failed; of what broke before a check could, its kind."""
        return self.error.promise if isinstance(self.error, PromiseBroken) else type(self.error).__name__


@dataclass(frozen=True, kw_only=True)
class CheckedBundles:
    """What ``agent check`` found: every bundle is in one of the two. ``profile_mismatch``: why the profile isn't this
    machine's, None when it is."""

    activations: tuple[ActivationReport, ...]
    refused: tuple[RefusedBundle, ...]
    profile_mismatch: str | None = None

    @property
    def error(self) -> AiosEdgeError | None:
        """The first refusal, in the order of the settings."""
        return self.refused[0].error if self.refused else None
