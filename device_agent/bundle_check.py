"""``aios-edge agent check``: what an agent with these settings would find, without serving anything."""

from __future__ import annotations

from pathlib import Path

from aios_edge.bundle.read import Bundle
from aios_edge.errors import AiosEdgeError, UsageError
from aios_edge.host import inspect_host, matches
from aios_edge.mqtt_options import broker_address
from aios_edge.profile import DeviceProfile
from device_agent import state_dir
from device_agent.hosting import entries_of, no_bundle, open_entry, same_name, worker_spec
from device_agent.model_host import ModelHost
from device_agent.settings import BundleEntry, Settings, check_model_names
from device_agent.surroundings import Surroundings
from device_agent.values import ActivationReport, CheckedBundles, RefusedBundle


async def check_bundles(settings: Settings, profile: DeviceProfile, around: Surroundings) -> CheckedBundles:
    """Activate every bundle in a worker of its own, one after the other, and leave nothing behind.

    Raises only for what is written wrong, and :class:`ResourceError` for a state folder that can't be used.
    """
    if settings.mqtt is not None:
        broker_address(settings.mqtt.options())
    entries = entries_of(settings)
    if not entries:
        raise no_bundle()
    state_dir.try_out(settings.device.state_dir)
    opened: dict[str, tuple[BundleEntry, Bundle]] = {}
    refused: dict[Path, AiosEdgeError] = {}
    for entry in entries:
        try:
            bundle = open_entry(entry)
        except AiosEdgeError as error:
            refused[entry.path] = error
            continue
        if bundle.manifest.name in opened:
            raise same_name(bundle.manifest.name, entry.path)
        opened[bundle.manifest.name] = entry, bundle
    if not refused:  # else nobody knows the name of the one that can't be read
        check_model_names(settings, {name: entry for name, (entry, _) in opened.items()})
    # An engine that is there is used, and none is built; a strict profile, which would wait for one, keeps none.
    engines = None if profile.strict_providers else settings.device.state_dir
    reports: list[ActivationReport] = []
    for entry, bundle in opened.values():
        host = ModelHost(worker_spec(settings, profile, entry, bundle, state_dir=engines), bundle, around)
        try:
            reports.append(await host.activate())
        except UsageError:  # the profile's or the settings', not the bundle's
            raise
        except AiosEdgeError as error:
            refused[entry.path] = error
        finally:
            await host.stop()
    in_order = (entry.path for entry in entries if entry.path in refused)
    return CheckedBundles(
        activations=tuple(reports),
        refused=tuple(RefusedBundle(path=path, error=refused[path]) for path in in_order),
        profile_mismatch=profile_mismatch(profile),
    )


def profile_mismatch(profile: DeviceProfile) -> str | None:
    """Why the profile isn't this machine's, which is allowed: its estimates and budgets are then another's."""
    match = matches(profile, inspect_host())
    return None if match.ok else f"profile '{profile.name}' is not this machine ({'; '.join(match.reasons)})"
