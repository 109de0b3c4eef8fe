"""One bundle takes another's place without losing a request, and gives it back when its live contract breaks.

The new worker starts beside the old one and goes through the whole activation. Then new requests go to it; those the
old one has are answered by the old one, and it ends. From then on, for ``policy.probation_s``, the new bundle's batches
are held against what was measured and against the previous bundle's (:mod:`device_agent.probation`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from aios_edge.errors import AiosEdgeError, BundleRefused
from device_agent.cloud_fit import ModelShape
from device_agent.engine_builds import found_unfit
from device_agent.hosting import other_name
from device_agent.kept_bundles import keep
from device_agent.model_host import ModelHost
from device_agent.probation import Conduct, breach
from device_agent.raw_model import is_raw
from device_agent.service_time import ServiceTime
from device_agent.settings import Settings
from device_agent.surroundings import Surroundings

log = logging.getLogger("device_agent")

InBackground = Callable[[Callable[[], Awaitable[None]]], object]  # as one change of the deployment, in its turn


@dataclass(eq=False)
class Probation:
    """A swapped bundle's: who serves, who served before and how well, and until when that one may come back."""

    current: ModelHost
    previous: ModelHost
    before: Conduct
    ends_at: float
    timer: asyncio.TimerHandle = field(repr=False)
    broken: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event, repr=False)


class Succession:
    """Changes who stands in ``hosts`` for a model that is there. ``leaving``: those that aren't there yet, or no more,
    and still have a worker."""

    def __init__(
        self, hosts: dict[str, ModelHost], settings: Settings, around: Surroundings, in_background: InBackground
    ) -> None:
        self.leaving: set[ModelHost] = set()
        self._hosts = hosts
        self._settings = settings
        self._around = around
        self._in_background = in_background
        self._probations: dict[str, Probation] = {}

    @property
    def probations(self) -> Mapping[str, Probation]:
        """By model."""
        return self._probations

    async def swap(self, model: str, new: ModelHost) -> None:
        """Put ``new`` in the place of the model that serves. Whatever refuses it is raised; the old one serves on."""
        began, old = self._around.clock(), self._hosts[model]
        if new.name != model:
            raise other_name(new.bundle, model)
        self.leaving.add(new)
        try:
            await new.activate()
        except BaseException:
            await new.stop()
            self.leaving.discard(new)
            raise
        self.end_probation(model)
        self._switch(model, old, new)
        self._tell("swapped", model, old, new, took_s=self._around.clock() - began)
        # What both learnt before they shared the device; the new one from its rehearsal, nobody else was served yet.
        expected = (old.service, new.service)
        await self.keep(new)
        await self.retire(old)
        self._begin_probation(model, old, new, expected)

    async def retire(self, host: ModelHost, limit_s: float | None = None) -> None:
        """Stop a model that gets no requests any more, when those it has are answered or the limit has passed."""
        self.leaving.add(host)
        await host.drain(limit_s)
        await host.stop()
        self.leaving.discard(host)

    async def keep(self, host: ModelHost) -> None:
        """Copy its bundle, so that it can be started again whatever becomes of the path. A raw model stays where it is:
        its worker refuses other files than those that went live."""
        if is_raw(host.bundle.manifest):
            return
        try:
            host.move_to(await asyncio.to_thread(keep, host.bundle, self._settings.device.state_dir))
        except AiosEdgeError as error:  # it serves from its path then
            log.warning("%s: its bundle is not kept for a restart or a way back: %s", host.name, error)

    def end_probation(self, model: str) -> None:
        """There is no way back any more."""
        if probation := self._probations.pop(model, None):
            probation.timer.cancel()
            probation.current.record.unwatch()
            probation.over.set()

    def _switch(self, model: str, old: ModelHost, new: ModelHost) -> None:
        """From here on requests go to the new one."""
        self.leaving.discard(new)
        self.leaving.add(old)
        self._hosts[model] = new
        if not new.never_leaves:
            manifest = new.bundle.manifest
            self._around.cloud.add(ModelShape.of(manifest), only_mapped=is_raw(manifest))

    def _begin_probation(
        self, model: str, old: ModelHost, new: ModelHost, expected: tuple[ServiceTime, ServiceTime]
    ) -> None:
        length_s = self._around.policy.probation_s
        if not length_s or is_raw(old.bundle.manifest):  # its files may be gone, so there is no way back
            return
        timer = asyncio.get_running_loop().call_later(length_s, self._passed, model)
        probation = Probation(new, old, old.record.conduct, self._around.clock() + length_s, timer)
        self._probations[model] = probation
        new.record.watch(expected, partial(self._judge, model, probation))

    def _passed(self, model: str) -> None:
        log.info("%s: the swap stays; the previous bundle is let go", model)

        async def let_go() -> None:  # as a change, after which its copy is removed
            self.end_probation(model)

        self._in_background(let_go)

    def _judge(self, model: str, probation: Probation) -> None:
        reason = breach(probation.current.record.conduct, probation.before)
        if reason is not None and not probation.broken:
            probation.broken = True
            log.error("%s: its live contract broke, the previous bundle comes back: %s", model, reason)
            self._in_background(partial(self._roll_back, model, probation, reason))

    async def _roll_back(self, model: str, probation: Probation, reason: str) -> None:
        if self._probations.get(model) is not probation:  # swapped again or unloaded meanwhile
            return
        began, bad, good = self._around.clock(), probation.current, probation.previous
        self.end_probation(model)
        if bad.bundle.bundle_id == good.bundle.bundle_id:  # only its engine was new
            found_unfit(bad, BundleRefused("live", reason), self._around.emit)
        try:
            await good.come_back()
        except Exception as error:  # no descriptors left, say: the bundle that is here serves on
            self._around.emit("roll_back_failed", model=model, reason=reason, detail=str(error))
            log.error("%s: the previous bundle can't come back: %s", model, error)
            return
        self._switch(model, bad, good)
        self._tell("rolled_back", model, bad, good, took_s=self._around.clock() - began, reason=reason)
        await self.retire(bad, limit_s=self._around.policy.drain_s)

    def _tell(self, kind: str, model: str, old: ModelHost, new: ModelHost, *, took_s: float, **more: str) -> None:
        detail = {
            "from": old.bundle.bundle_id,
            "to": new.bundle.bundle_id,
            "from_version": old.bundle.manifest.version,
            "to_version": new.bundle.manifest.version,
        }
        self._around.emit(kind, model=model, **detail, took_s=round(took_s, 3), **more)
        log.info("%s %s: version %s -> %s after %.2f s", model, kind, *list(detail.values())[2:], took_s)
