"""What is told of a model: in ``/status``, in the retained status over MQTT, and in the repository's index."""

from __future__ import annotations

from typing import Any

from aios_edge.telemetry import BundleStatus, Contract, WorkerFigures
from device_agent.deployment import Deployment
from device_agent.model_host import ModelHost
from device_agent.place import Place
from device_agent.raw_model import is_raw
from device_agent.rejected import Rejected
from device_agent.settings import BundleEntry
from device_agent.status import EngineBuild, ModelStatus, ProbationStatus, WorkerStatus
from device_agent.succession import Probation
from device_agent.trial_run import TrialRun


def bundle_status(host: ModelHost) -> BundleStatus:
    """A model for the broker."""
    report = host.instance.report
    return BundleStatus(
        model=host.name,
        version=host.bundle.manifest.version,
        bundle_id=_bundle_id(host),
        state=host.state,
        contract=_contract(host),
        providers_requested=report.providers_requested if report else (),
        providers_active=report.providers_active if report else (),
        providers_reason=report.provider_reason if report else None,
        provider_steps=report.provider_steps if report else (),
        detail=host.detail if host.state != "loading" else None,  # stages are for /status, not for the broker
    )


def model_status(
    host: ModelHost,
    entry: BundleEntry,
    *,
    probation: Probation | None,
    trial: TrialRun | None,
    rejected: Rejected | None,
    build: EngineBuild | None,
    now: float,
) -> ModelStatus:
    """A model for ``/status``, ``now``."""
    return ModelStatus(
        model=host.name,
        version=host.bundle.manifest.version,
        bundle_id=_bundle_id(host),
        contract=_contract(host),
        path=str(entry.path),
        pinned=entry.pinned,
        never_leave_device=host.never_leaves,
        state=host.state,
        detail=host.detail,
        worker_pid=host.instance.worker.pid,
        worker_rss_bytes=host.instance.worker.rss_bytes,
        worker_max_rss_bytes=host.instance.recycling.ceiling,
        workers_serving=host.instance.serving,
        workers=tuple(map(_worker_status, host.instance.places)),
        restarts=host.instance.restarts,
        recycles=host.instance.recycles,
        queued=host.queued,
        waiting_limit=host.room.limit,
        running=host.running,
        max_batch_size=host.bundle.manifest.max_batch_size,
        service_base_s=host.service.base_s,
        service_per_unit_s=host.service.per_unit_s,
        spread=host.service.spread,
        caution=round(host.service.caution_at(now), 3),
        activation=host.instance.report,
        engine_build=build,
        probation=None if probation is None else _probation_status(host, probation, now),
        trial=None if trial is None else trial.figures,
        rejected=rejected if trial is None else None,
    )


def worker_figures(host: ModelHost) -> tuple[WorkerFigures, ...]:
    """The workers that serve, for telemetry."""
    workers = [place.worker for place in host.instance.places if place.worker.ready]
    return tuple(WorkerFigures(pid=worker.pid, rss_bytes=worker.rss_bytes) for worker in workers)


def _worker_status(place: Place) -> WorkerStatus:
    worker = place.worker
    return WorkerStatus(
        pid=worker.pid,
        serves=worker.ready,
        rss_bytes=worker.rss_bytes if worker.ready else None,
        running=place.held,
        providers_active=worker.report.providers_active if worker.ready and worker.report is not None else (),
        detail=None if worker.ready else place.detail,
    )


def _probation_status(host: ModelHost, probation: Probation, now: float) -> ProbationStatus:
    conduct = host.record.conduct
    return ProbationStatus(
        previous=probation.previous.bundle.bundle_id,
        ends_in_s=round(max(probation.ends_at - now, 0.0), 3),
        answers=conduct.answers,
        failures=conduct.failures,
        batches=conduct.timed,
        slow=conduct.slow,
        p95_s=conduct.p95_s,
        expected_p95_s=conduct.expected_p95_s,
    )


def _bundle_id(host: ModelHost) -> str | None:
    return None if is_raw(host.bundle.manifest) else host.bundle.bundle_id


def _contract(host: ModelHost) -> Contract:
    return "none" if is_raw(host.bundle.manifest) else "checked"


def repository_index(deployment: Deployment) -> list[dict[str, Any]]:
    """Every model in Triton's words; bundles that may not serve are in it, with the reason."""
    words = {
        "ready": "READY",
        "loading": "LOADING",
        "waking": "LOADING",
        "stopped": "UNLOADING",
        "unloading": "UNLOADING",
    }
    index = [
        {
            "name": name,
            "version": host.bundle.manifest.version,
            "state": words.get(host.state, "UNAVAILABLE"),
            "reason": (host.detail or "") if host.state != "ready" else "",
        }
        for name, host in deployment.hosts.items()
    ]
    index += [
        {
            "name": bundle.model,
            "version": bundle.version,
            "state": words.get(bundle.state, "UNAVAILABLE"),
            "reason": bundle.detail or "",
        }
        for bundle in (*deployment.refused, *deployment.unloaded)
    ]
    return index
