"""The bundles of this device: activated one after the other, held by model name, refused with a reason; and how they
come and go while the agent runs.

One change at a time: activations measure latency, and shouldn't disturb each other. A change ends what it began also
when whoever asked for it went away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from aios_edge.bundle.read import Bundle
from aios_edge.errors import AiosEdgeError, RequestError, RuntimeUnavailable, WorkerLost
from aios_edge.profile import DeviceProfile
from aios_edge.telemetry import BundleStatus
from device_agent.announcements import Announcements
from device_agent.cloud_fit import ModelShape
from device_agent.engine_builds import EngineBuilds, found_unfit, may_have_engine
from device_agent.engine_cache import forget_engines, model_digest
from device_agent.hosting import entries_of, no_bundle, open_entry, other_name, same_name, worker_spec
from device_agent.kept_bundles import forget_others
from device_agent.model_host import ModelHost
from device_agent.raw_model import contract_of, digested, is_raw
from device_agent.rejected import Rejected, RejectedBundles
from device_agent.settings import BundleEntry, Settings, check_model_names
from device_agent.succession import Probation, Succession
from device_agent.surroundings import Surroundings
from device_agent.trial_run import TrialRun
from device_agent.upkeep import Upkeep
from device_agent.values import EngineReport, Engines


class Deployment:
    """Which models are here, and in which state; the only place that adds one or takes one away."""

    def __init__(self, settings: Settings, profile: DeviceProfile, around: Surroundings) -> None:
        self._settings = settings
        self._profile = profile
        self._around = around
        self._tell = Announcements(around.emit, profile)
        self._hosts: dict[str, ModelHost] = {}
        self._entries: dict[str, BundleEntry] = {}
        self._away: dict[BundleEntry, BundleStatus] = {}
        self._followed: dict[Path, BundleEntry] = {}  # what other settings say, since the start
        self._rejected = RejectedBundles(settings.device.state_dir)
        self.builds = EngineBuilds(around, self._change_over)
        self._succession = Succession(
            self._hosts, settings, around, self._rejected, self._in_background, on_taken=self.builds.consider
        )
        self._upkeep = Upkeep(self._hosts, self._entries, around, self._succession.trials)
        self._started = False
        self._closing = False
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def hosts(self) -> Mapping[str, ModelHost]:
        """Every model that is here, by name: those that serve, load or restart."""
        return self._hosts

    @property
    def entries(self) -> Mapping[str, BundleEntry]:
        """What agent.toml says of each of them."""
        return self._entries

    @property
    def probations(self) -> Mapping[str, Probation]:
        """Models whose bundle was swapped a while ago, and may have to give its place back."""
        return self._succession.probations

    @property
    def trials(self) -> Mapping[str, TrialRun]:
        """Models for whose place a bundle is on trial."""
        return self._succession.trials

    @property
    def rejected(self) -> Mapping[str, Rejected]:
        """Bundles that had to go, by model: they don't start by themselves."""
        return self._rejected.by_model

    @property
    def refused(self) -> Sequence[BundleStatus]:
        """Bundles that may not serve here, with the reason."""
        return [status for status in self._away.values() if status.state == "refused"]

    @property
    def unloaded(self) -> Sequence[BundleStatus]:
        """Bundles that were unloaded, or are about to be."""
        return [status for status in self._away.values() if status.state != "refused"]

    @property
    def ready(self) -> bool:
        """Whether the activations of the start are over and any model serves. A worker that restarts, or a model that
        is loaded later, doesn't make the agent unready."""
        return self._started and any(host.serves for host in self._hosts.values())

    @property
    def degraded(self) -> bool:
        """Whether any bundle doesn't serve that should."""
        return bool(self.refused) or any(not host.serves for host in self._hosts.values())

    def host(self, model: str, version: str | None) -> ModelHost:
        """The one a client names; ``version`` None: whichever is here. Raises :class:`RequestError` (404; 503 at the
        start, when nobody knows yet)."""
        host = self._hosts.get(model)
        if host is None:
            if away := self._status_away(model):
                remedy = f"POST /v2/repository/models/{model}/load loads it"
                raise RequestError(f"{model} is {away.state}", status=404, remedy=remedy)
            raise self._unknown(model)
        ours = host.bundle.manifest.version
        if version not in (None, ours):
            raise RequestError(f"{model} has no version {version!r}", status=404, remedy=f"Its version is {ours}")
        return host

    def answering(self, model: str, version: str | None) -> ModelHost:
        """Who answers a request: :meth:`host`, or where no version is named a bundle that is on trial for its place."""
        host, trial = self.host(model, version), self._succession.trials.get(model)
        return host if trial is None or version is not None else trial.takes()

    def no_model(self, model: str, known: Iterable[str]) -> RequestError:
        """What a client is told that names a model which isn't among those it knows of: 404, or 503 at the start, when
        nobody knows all of them."""
        if not self._started:
            what = f"there is no model {model!r} yet: the agent has just started and checks its bundles"
            return RequestError(what, status=503, remedy="Try again, or wait for /v2/health/ready")
        remedy = f"Models here: {', '.join(known) or 'none'}"
        return RequestError(f"there is no model {model!r}", status=404, remedy=remedy)

    def knows(self, model: str) -> bool:
        """Whether it is here, or could be loaded."""
        return model in self._hosts or self._status_away(model) is not None

    def serves(self, model: str, version: str | None) -> bool:
        """Whether a model serves; raises :class:`RequestError` (404) for one that agent.toml doesn't know."""
        if model not in self._hosts and self._status_away(model):
            return False
        return self.host(model, version).serves

    async def activate_all(self) -> None:
        """One bundle after the other, at the start.

        Raises the last refusal when not a single one may serve, and :class:`SettingsError` for what is written wrong.
        """
        last: AiosEdgeError | None = None
        entries = entries_of(self._settings)
        names: dict[str, BundleEntry] | None = None
        with contextlib.suppress(AiosEdgeError):  # a bundle that can't be opened is refused below, when its turn comes
            names = {open_entry(entry).manifest.name: entry for entry in entries}
        if names is not None:
            check_model_names(self._settings, names)
        async with self._turn:
            await asyncio.to_thread(self._rejected.open)
            for entry in entries:
                try:
                    await self._activate(entry)
                except AiosEdgeError as error:
                    last = error
            models = {model_digest(host.bundle) for host in self._hosts.values()}
            forget_engines(self._settings.device.state_dir, models)
            if not any(host.serves for host in self._hosts.values()):
                raise last if last is not None else no_bundle()
            self._started = True
            self._upkeep.start()
            for host in self._hosts.values():
                await self._succession.keep(host)
                self.builds.consider(host)
                self._muster(host)
            await self._tidy()

    async def load(self, model: str) -> None:
        """Triton's load: a model that isn't here is activated from its path; one that is, and whose path holds another
        bundle by now, is swapped without losing a request. Nothing happens where nothing changed.

        Raises :class:`RequestError` (404) for a model that agent.toml doesn't know, :class:`BundleRefused` and its
        like for what may not serve, and :class:`RuntimeUnavailable` when the agent stops meanwhile.
        """
        await self._change(partial(self._load, model))

    async def unload(self, model: str) -> None:
        """Triton's unload: who is here is answered, the worker ends, and its memory with it. Nothing happens to a
        model that isn't loaded. Raises :class:`RequestError` (404) for one that agent.toml doesn't know."""
        await self._change(partial(self._unload, model))

    def follow(self, settings: Settings) -> None:
        """Of other settings the numbers of workers: where a model's is another one now, so many take over from those it
        has, in their turn and as in a swap."""
        self._settings = settings
        self._followed.update({one.path: one for one in settings.bundle})
        for model, entry in self._entries.items():
            self._entries[model] = self._by_now(entry)
        for entry, status in list(self._away.items()):
            self._away[self._by_now(entry)] = self._away.pop(entry, status)
        for model, host in self._hosts.items():
            if self._with_its_workers(model, host) is not None:
                change = self._when_settled(model, partial(self._resize, model))
                task = asyncio.get_running_loop().create_task(change, name=f"workers-{model}")
                self._changes.add(task)
                task.add_done_callback(self._changes.discard)

    def give_up_changes(self) -> None:
        """The agent stops: loads end here, and no change begins any more."""
        self._closing = True
        for task in self._changes:
            task.cancel()

    async def stop(self) -> None:
        """Stop every model; requests that still wait are refused as draining."""
        self.give_up_changes()
        await self.builds.stop()
        await self._upkeep.stop()
        await asyncio.gather(*self._changes, return_exceptions=True)
        self._succession.stop()
        hosts = {*self._hosts.values(), *self._succession.leaving}
        await asyncio.gather(*(host.stop() for host in hosts), return_exceptions=True)

    # Changes, one at a time

    async def _change(self, change: Callable[[], Awaitable[None]]) -> None:
        task = self._in_background(change)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():  # whoever asked went away; the change goes on
                raise
            raise RuntimeUnavailable("the agent is stopping", remedy="Try again when it is back") from None

    def _in_background(self, change: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def in_turn() -> None:
            async with self._turn:
                if self._closing:
                    raise asyncio.CancelledError
                try:
                    await change()
                finally:
                    if not self._closing:
                        await self._tidy()

        task = asyncio.get_running_loop().create_task(in_turn(), name="deployment-change")
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task

    async def _load(self, model: str) -> None:
        host = self._hosts.get(model)
        if host is None:
            host = await self._activate(self._entry_away(model), asked=model)
            await self._succession.keep(host)
            await asyncio.to_thread(self._rejected.forget, model)
            self.builds.consider(host)
            self._muster(host)
            return
        entry = self._entries[model]
        try:
            bundle = await self._lying_at(entry)
            if bundle.bundle_id in self._succession.on_trial(model):
                return
            await self._succession.call_off(model, f"{bundle.bundle_id[:16]} was loaded")
            if bundle.bundle_id == host.bundle.bundle_id and host.serves:
                await asyncio.to_thread(self._rejected.forget, model)
                await host.instance.resting.back()
                host.instance.crew.try_now()
                return
            if bundle.bundle_id == host.bundle.bundle_id and host.state == "quarantined":
                await host.instance.release()
                return
            await self._swap(model, entry, bundle)
        except AiosEdgeError as error:
            self._tell.refused(entry, error)
            raise
        if self._hosts[model] is not host:  # else a trial began
            self.builds.consider(self._hosts[model])

    def _muster(self, host: ModelHost) -> None:
        """Start its further workers: in its turn, for activations measure latency; and nobody waits for it."""

        async def muster() -> None:
            if self._hosts.get(host.name) is host:
                await host.muster()

        if host.instance.serves_with_several:
            self._in_background(muster)

    async def _swap(self, model: str, entry: BundleEntry, bundle: Bundle) -> None:
        new = self._host(entry, bundle)
        try:
            await self._succession.swap(model, new)
        except AiosEdgeError as error:
            if not found_unfit(new, error, self._around.emit):
                raise
            await self._succession.swap(model, self._host(entry, bundle))

    async def _change_over(self, model: str, host: ModelHost, engine: EngineReport) -> None:
        """The engine of a model that serves without was built: a worker with it takes the place."""

        async def change() -> None:
            if self._hosts.get(model) is not host:  # swapped or unloaded meanwhile
                return
            new = self._host(self._entries[model], replace(host.bundle, path=host.instance.worker.spec.bundle_path))
            try:
                await self._succession.swap(model, new)
            except AiosEdgeError as error:
                if not found_unfit(new, error, self._around.emit):
                    self._around.emit("engine_failed", model=model, reason=str(error))

        await self._when_settled(model, change)

    async def _when_settled(self, model: str, change: Callable[[], Awaitable[None]]) -> None:
        """One change of a model, once its bundle has kept its contract, or holds its place."""
        changed = False

        async def in_its_turn() -> None:
            nonlocal changed
            if not self.probations.get(model) and not self.trials.get(model):  # begun by the change before this one
                changed = True
                await change()

        while not changed:
            while (other := self.probations.get(model) or self.trials.get(model)) is not None:
                await other.over.wait()
            await self._in_background(in_its_turn)

    async def _resize(self, model: str) -> None:
        host = self._hosts.get(model)
        if host is None or (new := self._with_its_workers(model, host)) is None:  # unloaded, or changed back, meanwhile
            return
        try:
            await self._succession.swap(model, new)
        except AiosEdgeError as error:
            self._tell.refused(self._entries[model], error)
            return
        self.builds.consider(new)

    def _with_its_workers(self, model: str, host: ModelHost) -> ModelHost | None:
        """What is to take the place of a model that has another number of workers than its settings say."""
        new = self._host(self._entries[model], replace(host.bundle, path=host.instance.worker.spec.bundle_path))
        return None if len(new.instance.places) == len(host.instance.places) else new

    async def _lying_at(self, entry: BundleEntry) -> Bundle:
        bundle = open_entry(entry)
        return await asyncio.to_thread(digested, bundle) if is_raw(bundle.manifest) else bundle

    async def _unload(self, model: str) -> None:
        await self._succession.call_off(model, "the model was unloaded")
        host = self._hosts.pop(model, None)
        if host is None:
            self._entry_away(model)
            return
        self._succession.end_probation(model)
        await asyncio.to_thread(self._rejected.forget, model)
        self.builds.give_up(model)
        entry, manifest = self._entries.pop(model), host.bundle.manifest
        bundle_id, why = host.bundle.bundle_id, "unloading"
        status = BundleStatus(
            model=model,
            version=manifest.version,
            bundle_id=None if is_raw(manifest) else bundle_id,
            state=why,
            detail=why,
            contract=contract_of(entry),
        )
        self._away[entry] = status
        await self._succession.retire(host, limit_s=self._around.policy.drain_s)
        self._upkeep.room_was_made()
        self._away[self._by_now(entry)] = msgspec.structs.replace(status, state="unloaded", detail="unloaded")
        self._around.emit("unloaded", model=model, version=manifest.version, bundle_id=bundle_id)

    async def _activate(self, entry: BundleEntry, *, asked: str | None = None) -> ModelHost:
        try:
            host = await self._activated(entry, asked)
        except AiosEdgeError as error:
            self._away[self._by_now(entry)] = self._tell.refused(entry, error)
            raise
        self._away.pop(self._by_now(entry), None)
        if not host.never_leaves:  # else no endpoint hears as much as its name
            manifest = host.bundle.manifest
            self._around.cloud.add(ModelShape.of(manifest), only_mapped=is_raw(manifest))
        return host

    async def _activated(self, entry: BundleEntry, asked: str | None, engines: Engines = "cached") -> ModelHost:
        bundle = open_entry(entry)
        if asked is None:
            bundle = await asyncio.to_thread(self._rejected.instead_of, bundle)
        name = bundle.manifest.name
        if asked not in (None, name):
            raise other_name(bundle, str(asked))
        if name in self._hosts:
            raise same_name(name, entry.path)
        entry = self._by_now(entry)
        host = self._host(entry, bundle, engines)
        self._hosts[name], self._entries[name] = host, entry
        if entry.never_leave_device:  # before its first request
            self._around.cloud.audit.keep(name)
        if (rejected := self._rejected.by_model.get(name)) is not None and asked is None:
            self._tell.passed_over(host, entry, rejected)
        self._tell.checking(host)
        try:
            report = await host.activate()
        except BaseException as error:
            del self._hosts[name], self._entries[name]
            await host.stop()
            if isinstance(error, AiosEdgeError) and found_unfit(host, error, self._around.emit):
                return await self._activated(entry, asked)
            if isinstance(error, WorkerLost) and engines == "cached" and may_have_engine(self._profile):
                self._around.emit("engine_failed", model=name, reason=f"with whatever engine there is: {error}")
                return await self._activated(entry, asked, "off")
            raise
        self._tell.activated(host, report)
        await self._upkeep.keep_budget(asking=name)
        return host

    def _host(self, entry: BundleEntry, bundle: Bundle, engines: Engines = "cached") -> ModelHost:
        spec = worker_spec(self._settings, self._profile, entry, bundle, state_dir=self._settings.device.state_dir)
        spec = replace(spec, engines=engines)
        # Clients know the name: two entries may claim it one after the other, and it was promised for one of them.
        stays = entry.never_leave_device or bundle.manifest.name in self._around.cloud.audit.staying
        upkeep = self._upkeep
        return ModelHost(
            spec, bundle, self._around, never_leaves=stays, make_room=upkeep.make_room, has_room=upkeep.has_room
        )

    def _by_now(self, entry: BundleEntry) -> BundleEntry:
        """What the settings say of it at this moment: others may have come while it was loaded or unloaded."""
        return self._followed.get(entry.path, entry)

    # Those that aren't here

    def _status_away(self, model: str) -> BundleStatus | None:
        entry = self._named(model)
        return None if entry is None else self._away[entry]

    def _named(self, model: str) -> BundleEntry | None:
        """Of several with that name the one that served under it: the others were refused for that."""
        named = [entry for entry, status in self._away.items() if status.model == model]
        return min(named, key=lambda entry: self._away[entry].state == "refused", default=None)

    def _entry_away(self, model: str) -> BundleEntry:
        """The entry of a model that isn't here, by the name it was told of, or by what lies at its path now."""
        if named := self._named(model):
            return named
        for entry in self._away:
            with contextlib.suppress(AiosEdgeError):
                if open_entry(entry).manifest.name == model:
                    return entry
        raise self._unknown(model)

    def _unknown(self, model: str) -> RequestError:
        return self.no_model(model, [*self._hosts, *(status.model for status in self._away.values())])

    def _ids(self) -> set[str]:
        return {host.bundle.bundle_id for host in self._hosts.values()}

    async def _tidy(self) -> None:
        """Remove copies of bundles that neither serve nor may have to come back."""
        kept = self._ids() | {probation.previous.bundle.bundle_id for probation in self.probations.values()}
        kept |= {trial.successor.bundle.bundle_id for trial in self.trials.values()}
        await asyncio.to_thread(forget_others, self._settings.device.state_dir, kept)
