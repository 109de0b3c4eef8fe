"""From an entry of agent.toml to its bundle, and to what its worker is started with."""

from __future__ import annotations

import logging
from pathlib import Path

from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.contract import MEMORY
from aios_edge.errors import BundleRefused, SettingsError
from aios_edge.profile import DeviceProfile
from aios_edge.session import session_options
from device_agent.core_share import niceness
from device_agent.cores import cores_allowed
from device_agent.crew_size import crew_size
from device_agent.raw_model import RawEntry, is_raw, open_raw, repository_entries
from device_agent.settings import BundleEntry, Settings
from device_agent.worker_pool import WorkerSpec

log = logging.getLogger("device_agent")


def entries_of(settings: Settings) -> tuple[BundleEntry, ...]:
    """Every bundle, and every raw model of the repository. Raises :class:`SettingsError` for a repository that can't be
    read."""
    return (*settings.bundle, *repository_entries(settings.repository))


def open_entry(entry: BundleEntry) -> Bundle:
    """The entry's bundle. Its digests are the worker's to check, on the files it is about to load; here only what is
    needed to start it."""
    return open_raw(entry.path) if isinstance(entry, RawEntry) else open_bundle(entry.path, verify=False)


def check_policy(settings: Settings, profile: DeviceProfile) -> None:
    """Raises :class:`SettingsError` for a policy that this profile can't keep."""
    if profile.isolation == "thread" and settings.policy.memory_budget_bytes:
        raise _needs_processes("memory_budget_bytes", profile, "policy")
    tables = (("device", settings.device.workers), *((str(entry.path), entry.workers) for entry in settings.bundle))
    for where, workers in tables:
        if profile.isolation == "thread" and workers not in (None, 1, "auto"):
            raise _needs_processes("more than one worker", profile, f"{where}: workers")


def _needs_processes(key: str, profile: DeviceProfile, where: str) -> SettingsError:
    return SettingsError(
        f"{key} needs worker processes, and {profile.name} has isolation = thread",
        where=where,
        remedy="Remove it, or use isolation = process",
    )


def worker_spec(
    settings: Settings, profile: DeviceProfile, entry: BundleEntry, bundle: Bundle, *, state_dir: Path | None
) -> WorkerSpec:
    """How a bundle's worker is started; ``state_dir`` None: it leaves nothing behind, engines included."""
    heaviest = max(each.weight for each in (entry, *settings.bundle))
    session = session_options(bundle.manifest.session, profile.threads)
    promised = next((promise.value for promise in bundle.contract.promises if promise.name == MEMORY), None)
    if profile.isolation == "thread":  # its memory is the agent's
        if entry.max_rss_bytes:
            raise _needs_processes("max_rss_bytes", profile, str(entry.path))
        check_policy(settings, profile)
    return WorkerSpec(
        model=bundle.manifest.name,
        bundle_path=bundle.path,
        profile=settings.device.profile,
        isolation=profile.isolation,
        intra_op_threads=session.intra_op_threads,
        slowdown=settings.emulate.slowdown,
        state_dir=state_dir,
        raw_version=bundle.manifest.version if is_raw(bundle.manifest) else None,
        bundle_id=bundle.bundle_id or None,  # of a raw model only the worker knows it
        engines="cached",
        nice=niceness(entry.weight, heaviest),
        workers=_workers(settings, profile, entry, session.intra_op_threads),
        cpus=profile.threads.cpu_affinity,
        max_rss_bytes=entry.max_rss_bytes,
        promised_rss_bytes=None if promised is None else round(promised),
    )


def _workers(settings: Settings, profile: DeviceProfile, entry: BundleEntry, threads: int) -> int:
    """Of a model: as its entry says, else the device's table, else the profile. One inside the agent: a second would
    need the model's memory again, and both the same interpreter."""
    if profile.isolation == "thread":
        return 1
    asked = entry.workers or settings.device.workers or profile.threads.workers
    cores = cores_allowed(profile.threads.cpu_affinity)
    workers = crew_size(asked, threads=threads, cores=cores, providers=[each.name for each in profile.providers])
    if workers > 1 and workers * threads > cores:
        log.warning("%s: %d workers with %d threads each share %d cores", entry.path, workers, threads, cores)
    return workers


def same_name(name: str, path: Path) -> SettingsError:
    """Clients couldn't say which they mean."""
    return SettingsError(f"two models have the name {name!r}", where=str(path), remedy="Remove or rename one of them")


def other_name(bundle: Bundle, model: str) -> BundleRefused:
    """What lies at the path of a model that was asked for is another one."""
    name = bundle.manifest.name
    return BundleRefused(
        "name",
        f"the bundle there is named {name!r} now, not {model!r}",
        where=str(bundle.path),
        remedy="Give it an entry of its own in agent.toml",
    )


def no_bundle() -> SettingsError:
    """There is nothing to serve."""
    remedy = 'Add a [[bundle]] with path = "…", or raw models to [repository]'
    return SettingsError("no bundle is configured", remedy=remedy)
