"""What is told of the whole agent: in ``/status``, in the retained status over MQTT, and in telemetry's gauges."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

from aios_edge.profile import DeviceProfile
from aios_edge.telemetry import CloudFigures, StatusBody
from aios_edge.version import __version__
from device_agent import status as st
from device_agent.cloud import CloudPool
from device_agent.cloud_account import CloudAccount
from device_agent.deployment import Deployment
from device_agent.desk import FrontDesk
from device_agent.metrics import Metrics
from device_agent.model_views import bundle_status, model_status, worker_figures
from device_agent.mqtt_door import MqttDoor
from device_agent.policy_in_force import PolicyInForce, policy_values
from device_agent.reload import Reload
from device_agent.reporter import Reporter
from device_agent.settings import Settings
from device_agent.strain import Strain
from device_agent.window import Gauges


def agent_state(deployment: Deployment, *, serving: bool, draining: bool) -> str:
    """The agent in one word; ``serving``: its activations are over."""
    if draining:
        return "draining"
    if not serving:
        return "starting"
    return "degraded" if deployment.degraded else "ready"


def agent_status(
    settings: Settings,
    profile: DeviceProfile,
    *,
    state: str,
    now: float,
    uptime_s: float,
    listen: tuple[str, ...],
    grpc: st.GrpcStatus | None,
    deployment: Deployment,
    cloud: CloudPool,
    reporter: Reporter,
    strain: Strain,
    rules: PolicyInForce,
    reload: Reload,
    metrics: Metrics,
    desk: FrontDesk,
    mqtt_door: MqttDoor | None,
) -> st.AgentStatus:
    """Everything, ``now``."""
    device, reading = settings.device, reporter.last_reading
    return st.AgentStatus(
        agent_version=__version__,
        boot_id=reporter.boot_id,
        state=state,
        uptime_s=round(uptime_s, 3),
        device=st.DeviceStatus(id=device.id, group=device.group, profile=profile.name, state_dir=str(device.state_dir)),
        host=st.HostStatus(
            hostname=platform.node(),
            machine=platform.machine(),
            kernel=platform.release(),
            python=platform.python_version(),
            cpu_count=os.cpu_count(),
        ),
        listen=listen,
        grpc=grpc,
        models={
            name: model_status(
                host,
                deployment.entries[name],
                probation=deployment.probations.get(name),
                trial=deployment.trials.get(name),
                rejected=deployment.rejected.get(name),
                build=deployment.builds.get(name),
                now=now,
            )
            for name, host in deployment.hosts.items()
        },
        refused=tuple(deployment.refused),
        unloaded=tuple(deployment.unloaded),
        cloud={name: endpoint.status(now) for name, endpoint in cloud.endpoints.items()},
        power=reading,
        power_reason="not sampled yet" if reading is None else reading.reason,
        device_state=st.DeviceStateStatus(**msgspec.structs.asdict(strain.state), strained=strain.reasons),
        policy=st.PolicyStatus(
            digest=rules.digest, since=rules.since, values=policy_values(rules.policy), last_reload=reload.last
        ),
        privacy=st.PrivacyStatus(
            never_leave_device=cloud.audit.staying,
            payloads_sent=dict(cloud.audit.sent),
            private_payloads_sent=cloud.audit.private_sent.total(),
            kept_back=cloud.audit.kept_back,
        ),
        mqtt=reporter.counts,
        mqtt_infer=None if mqtt_door is None else _mqtt_infer(mqtt_door),
        totals=metrics.totals(),
        in_flight=desk.in_flight,
        in_flight_bytes=desk.in_flight_bytes,
        emulate=st.EmulationStatus(slowdown=settings.emulate.slowdown),
        events=tuple(reporter.recent_events),
    )


def _mqtt_infer(door: MqttDoor) -> st.MqttInferStatus:
    return st.MqttInferStatus(**msgspec.structs.asdict(door.figures()), link=door.link)


def status_body(settings: Settings, profile: DeviceProfile, deployment: Deployment) -> StatusBody:
    """The agent for the broker."""
    bundles = tuple(bundle_status(host) for host in deployment.hosts.values())
    reasons = [bundle.providers_reason for bundle in bundles if bundle.providers_reason]
    slowdown = settings.emulate.slowdown
    return StatusBody(
        agent_version=__version__,
        profile=profile.name,
        providers_requested=tuple(provider.name for provider in profile.providers),
        providers_active=tuple(dict.fromkeys(name for bundle in bundles for name in bundle.providers_active)),
        providers_reason="; ".join(reasons) or None,
        bundles=(*bundles, *deployment.refused, *deployment.unloaded),
        emulated_slowdown=None if slowdown == 1.0 else slowdown,
    )


def gauges(
    deployment: Deployment, cloud: CloudPool, strain: Strain, rules: PolicyInForce, mqtt_door: MqttDoor | None
) -> Gauges:
    """What telemetry tells of this moment."""
    workers = {name: host.instance.rss_bytes for name, host in deployment.hosts.items()}
    limits = {name: host.room.limit for name, host in deployment.hosts.items()}
    return Gauges(
        queue_depth=sum(host.queued for host in deployment.hosts.values()),
        waiting_limits={name: limit for name, limit in limits.items() if limit is not None},
        breakers={name: endpoint.breaker.state for name, endpoint in cloud.endpoints.items()},
        cloud={name: _cloud_figures(endpoint.account) for name, endpoint in cloud.endpoints.items()},
        strained=strain.reasons,
        agent_rss_bytes=_own_rss_bytes(),
        workers_rss_bytes={name: rss for name, rss in workers.items() if rss is not None},
        workers={name: worker_figures(host) for name, host in deployment.hosts.items()},
        trials={name: trial.figures for name, trial in deployment.trials.items()},
        policy=rules.figures(),
        mqtt_infer=mqtt_door.figures() if mqtt_door is not None else None,
    )


def _cloud_figures(account: CloudAccount) -> CloudFigures:
    return CloudFigures(**msgspec.structs.asdict(account.spent()), budgets=account.budgets())


def _own_rss_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    try:
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
