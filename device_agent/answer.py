"""What a request is answered with, before it becomes bytes: a value on its way from model host or cloud to HTTP."""

from __future__ import annotations

import msgspec

from device_agent.power.reading import PowerReading
from device_agent.router import LEAST_RETRY_S
from device_agent.values import Reason, Shed
from device_agent.wire import DoneItem


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of one inference above idle; ``energy_j`` None when the device's power isn't known, ``method`` why."""

    energy_j: float | None
    method: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of: local output (``outputs`` and ``binary``), a remote body (``remote_body``), or ``error``.

    ``confidence``: the lowest probability of a label in a local answer; None where the answer has no probabilities."""

    status: int
    route: str  # local, cloud, shed, error
    reason: Reason
    outputs: bytes = b""
    binary: bytes = b""
    remote_body: bytes | None = None
    remote_json_length: int | None = None
    error: str | None = None
    retry_after_s: float | None = None
    queue_s: float | None = None
    compute_s: float | None = None
    batch_size: int | None = None
    energy: Energy | None = None
    confidence: float | None = None


class Unanswered(msgspec.Struct, frozen=True, kw_only=True):
    """No cloud endpoint answered: why (``cloud_failed``, ``budget``), and which were tried."""

    reason: Reason
    endpoints: tuple[str, ...]


_SHED_TEXT = {
    Reason.CLOUD_UNAVAILABLE: "this device would be late and no cloud endpoint can take it",
    Reason.CLOUD_FAILED: "this device would be late and the cloud failed",
    Reason.BUDGET: "this device can't answer in time and the cloud's budget of the day is spent",
    Reason.LOCAL_ONLY: "this device would be late and the request is local-only",
    Reason.WORKER_LOST: "the model's worker is not running",
    Reason.QUARANTINED: "the model's workers died again and again; none is started for now",
    Reason.LOADING: "the model was unloaded to make room for others, and is loaded again",
    Reason.QUEUE_FULL: "too many requests are waiting",
    Reason.DEADLINE_PASSED: "the deadline has passed",
    Reason.DRAINING: "the agent is stopping, or the model was unloaded",
}


def shed_answer(shed: Shed) -> Answer:
    """503, or 504 when nobody waits for the answer any more; both say when to come back."""
    text = _SHED_TEXT.get(shed.reason, shed.reason.value)
    return Answer(
        status=504 if shed.reason is Reason.DEADLINE_PASSED else 503,
        route="shed",
        reason=shed.reason,
        error=f"{text} [{shed.reason.value}]; retry after {shed.retry_after_s:.2f} s",
        retry_after_s=shed.retry_after_s,
    )


def energy_share(reading: PowerReading | None, compute_s: float, batch_size: int) -> Energy:
    """A request's share of what the device used above idle while its batch ran."""
    if reading is None:
        return Energy(energy_j=None, method="unknown: power not sampled yet")
    if reading.active_w is None:
        why = reading.active_reason or reading.reason or "no power source"
        return Energy(energy_j=None, method=f"unknown: {why}")
    if reading.active_w <= 0.0:  # no inference is free: the sample was over before this one began
        return Energy(energy_j=None, method="unknown: the device was idle in the last power sample")
    # The reading is of the last second, not of this batch: however good the sensor, the share is an estimate.
    return Energy(energy_j=reading.active_w * compute_s / max(batch_size, 1), method="estimated")


def local_answer(
    item: DoneItem | None, payload: memoryview, reason: Reason, *, queue_s: float, energy: Energy | None
) -> Answer | Shed:
    """A worker's account of one request; ``item`` None when it gave none. ``energy`` goes with a good one only."""
    if item is None:
        return Answer(status=500, route="error", reason=reason, error="the worker did not answer this request")
    if item.status == 504:  # its deadline passed between us and the worker
        return Shed(Reason.DEADLINE_PASSED, LEAST_RETRY_S)
    ok = item.status == 200
    return Answer(
        status=item.status,
        route="local" if ok else "error",
        reason=reason,
        outputs=bytes(item.outputs.of(payload)) if ok else b"",
        binary=bytes(item.binary.of(payload)) if ok and item.binary.length else b"",
        error=None if ok else item.error or "the worker could not answer",
        queue_s=queue_s,
        compute_s=item.compute_s,
        batch_size=item.batch_size,
        energy=energy if ok else None,
        confidence=item.confidence if ok else None,
    )
