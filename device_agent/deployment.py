"""The bundles of this device: activated one after the other, held by model name, refused with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from aios_edge.errors import AiosEdgeError, RequestError
from aios_edge.profile import DeviceProfile
from aios_edge.session import differences
from aios_edge.telemetry import BundleStatus
from device_agent.cloud_fit import ModelShape
from device_agent.hosting import entries_of, no_bundle, open_entry, same_name, worker_spec
from device_agent.model_host import ModelHost
from device_agent.provider_chain import forget_engines
from device_agent.raw_model import RawEntry, is_raw
from device_agent.settings import BundleEntry, Settings, check_model_names
from device_agent.surroundings import Surroundings
from device_agent.values import ActivationReport, RefusedBundle

log = logging.getLogger("device_agent")


class Deployment:
    """Which models are here, and in which state; the only place that adds one or takes one away."""

    def __init__(self, settings: Settings, profile: DeviceProfile, around: Surroundings) -> None:
        self._settings = settings
        self._profile = profile
        self._around = around
        self._hosts: dict[str, ModelHost] = {}
        self._entries: dict[str, BundleEntry] = {}
        self._refused: list[BundleStatus] = []

    @property
    def hosts(self) -> Mapping[str, ModelHost]:
        """Every model that isn't refused, by name, in the order of the settings."""
        return self._hosts

    @property
    def entries(self) -> Mapping[str, BundleEntry]:
        """What agent.toml says of each of them."""
        return self._entries

    @property
    def refused(self) -> Sequence[BundleStatus]:
        """Bundles that may not serve here, with the reason."""
        return self._refused

    @property
    def ready(self) -> bool:
        """Whether every model that isn't refused serves. A worker that restarts doesn't make the agent unready: its
        requests wait or go to the cloud."""
        states = [host.state for host in self._hosts.values()]
        return "loading" not in states and any(state == "ready" for state in states)

    @property
    def degraded(self) -> bool:
        """Whether any bundle doesn't serve, for whatever reason."""
        return bool(self._refused) or any(host.state != "ready" for host in self._hosts.values())

    def host(self, model: str, version: str | None) -> ModelHost:
        """The one a client names; ``version`` None: whichever is here. Raises :class:`RequestError` (404)."""
        host = self._hosts.get(model)
        if host is None:
            raise no_model(model, self._hosts)
        ours = host.bundle.manifest.version
        if version not in (None, ours):
            raise RequestError(f"{model} has no version {version!r}", status=404, remedy=f"Its version is {ours}")
        return host

    async def activate_all(self) -> None:
        """One bundle after the other: their latency promises are measured, and shouldn't disturb each other.

        Raises the last refusal when not a single one may serve, and :class:`SettingsError` for what is written wrong.
        """
        last: AiosEdgeError | None = None
        entries = entries_of(self._settings)
        names: dict[str, BundleEntry] | None = None
        with contextlib.suppress(AiosEdgeError):  # a bundle that can't be opened is refused below, when its turn comes
            names = {open_entry(entry).manifest.name: entry for entry in entries}
        if names is not None:
            check_model_names(self._settings, names)
        for entry in entries:
            try:
                await self._activate(entry)
            except AiosEdgeError as error:
                last = error
                self._refuse(entry, error)
        kept = [host.bundle.bundle_id for host in self._hosts.values()]
        forget_engines(self._settings.device.state_dir, kept)
        if not any(host.state == "ready" for host in self._hosts.values()):
            raise last if last is not None else no_bundle()

    async def stop(self) -> None:
        """Stop every model; requests that still wait are refused as draining."""
        await asyncio.gather(*(host.stop() for host in self._hosts.values()), return_exceptions=True)

    async def _activate(self, entry: BundleEntry) -> None:
        bundle = open_entry(entry)
        name = bundle.manifest.name
        if name in self._hosts:
            raise same_name(name, entry.path)
        state_dir = self._settings.device.state_dir
        spec = worker_spec(self._settings, self._profile, entry, bundle, state_dir=state_dir)
        host = ModelHost(spec, bundle, self._around, never_leaves=entry.never_leave_device)
        self._hosts[name], self._entries[name] = host, entry
        if entry.never_leave_device:  # before its first request
            self._around.cloud.audit.keep(name)
        what = "a raw model, without a contract" if is_raw(bundle.manifest) else "checking its contract on this device"
        log.info("%s %s: %s", name, bundle.manifest.version, what)
        try:
            report = await host.activate()
        except BaseException:
            del self._hosts[name], self._entries[name]
            await host.stop()
            raise
        manifest = host.bundle.manifest
        if not entry.never_leave_device:  # else no endpoint hears as much as its name
            self._around.cloud.add(ModelShape.of(manifest), only_mapped=is_raw(manifest))
        self._tell_activated(host, report)

    def _tell_activated(self, host: ModelHost, report: ActivationReport) -> None:
        latency = None if report.latency_p95_s is None else round(report.latency_p95_s * 1e3, 3)
        self._around.emit(
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

    def _refuse(self, entry: BundleEntry, error: AiosEdgeError) -> None:
        """Tell of it under its model's name, or where that can't be read its directory's."""
        check = RefusedBundle(path=entry.path, error=error).check
        log.error("%s is refused: %s", entry.path, error)
        self._around.emit("bundle_refused", path=str(entry.path), check=check, detail=str(error))
        name, version = entry.path.name, ""
        with contextlib.suppress(AiosEdgeError):
            manifest = open_entry(entry).manifest
            name, version = manifest.name, manifest.version
        self._refused.append(
            BundleStatus(
                model=name,
                version=version,
                bundle_id=None,
                state="refused",
                detail=str(error),
                contract="none" if isinstance(entry, RawEntry) else "checked",
            )
        )


def no_model(model: str, known: Iterable[str]) -> RequestError:
    """What a client is told that names a model which isn't among those it knows of."""
    return RequestError(f"there is no model {model!r}", status=404, remedy=f"Models here: {', '.join(known) or 'none'}")
