"""What a scripted worker tells when it is asked to load a bundle."""

from __future__ import annotations

from device_agent.values import ActivationReport

REPORT = ActivationReport(
    bundle_id="b",
    model="tiny",
    version="1",
    providers_requested=(),
    providers_active=(),
    provider_reason=None,
    checks=(),
    latency_p95_s=0.01,
    rss_bytes=None,
    load_s=0.0,
)
