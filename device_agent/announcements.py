"""What is said when a bundle goes live or is refused: an event for the broker, a line for the log."""

from __future__ import annotations

import contextlib
import logging

from aios_edge.errors import AiosEdgeError
from aios_edge.profile import DeviceProfile
from aios_edge.session import differences
from aios_edge.telemetry import BundleStatus
from device_agent.hosting import open_entry
from device_agent.model_host import ModelHost
from device_agent.raw_model import contract_of, is_raw
from device_agent.rejected import Rejected
from device_agent.settings import BundleEntry
from device_agent.surroundings import Emit
from device_agent.values import ActivationReport, RefusedBundle

log = logging.getLogger("device_agent")


class Announcements:
    """One place for these words, since bundles go live at the start and later."""

    def __init__(self, emit: Emit, profile: DeviceProfile) -> None:
        self._emit = emit
        self._profile = profile

    def checking(self, host: ModelHost) -> None:
        """A bundle's activation begins."""
        manifest = host.bundle.manifest
        what = "a raw model, without a contract" if is_raw(manifest) else "checking its contract on this device"
        log.info("%s %s: %s", host.name, manifest.version, what)

    def passed_over(self, host: ModelHost, entry: BundleEntry, rejected: Rejected) -> None:
        """Another bundle than what lies at its path is started, which had to go before."""
        detail = {"bundle_id": rejected.bundle_id, "version": rejected.version, "kept": rejected.kept_id}
        self._emit("bundle_passed_over", model=host.name, path=str(entry.path), **detail, reason=rejected.reason)
        log.warning(
            "%s: version %s at %s had to go (%s); version %s, which served before, is started. Loading it is up to you",
            host.name,
            rejected.version,
            entry.path,
            rejected.reason,
            host.bundle.manifest.version,
        )

    def activated(self, host: ModelHost, report: ActivationReport) -> None:
        """Its contract holds."""
        latency = None if report.latency_p95_s is None else round(report.latency_p95_s * 1e3, 3)
        self._emit(
            "activated",
            model=host.name,
            version=report.version,
            bundle_id=report.bundle_id,
            checks=", ".join(check.name for check in report.checks),
            providers=", ".join(report.providers_active),
            load_s=round(report.load_s, 3),
        )
        log.info("%s is live on %s (p95 %s ms)", host.name, ", ".join(report.providers_active), latency)
        if note := differences(host.bundle.manifest.session, self._profile.threads):
            log.info("%s %s", host.name, note)

    def refused(self, entry: BundleEntry, error: AiosEdgeError) -> BundleStatus:
        """It may not serve. The status tells of it under its model's name, or where that can't be read its
        directory's."""
        check = RefusedBundle(path=entry.path, error=error).check
        log.error("%s is refused: %s", entry.path, error)
        self._emit("bundle_refused", path=str(entry.path), check=check, detail=str(error))
        name, version = entry.path.name, ""
        with contextlib.suppress(AiosEdgeError):
            manifest = open_entry(entry).manifest
            name, version = manifest.name, manifest.version
        return BundleStatus(
            model=name,
            version=version,
            bundle_id=None,
            state="refused",
            detail=str(error),
            contract=contract_of(entry),
        )
