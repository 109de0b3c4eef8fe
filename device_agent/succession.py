"""One bundle takes another's place without losing a request, and gives it back when its live contract breaks.

The new worker starts beside the old one and goes through the whole activation. Where the policy says so it is on trial
next: it answers copies of requests, or a share of them (:mod:`device_agent.trial`). Then new requests go to it; those
the old one has are answered by the old one, and it ends. From then on, for ``policy.probation_s``, the new bundle's
batches are held against what was measured and against the previous bundle's (:mod:`device_agent.probation`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused
from aios_edge.telemetry import rfc3339
from device_agent.cloud_fit import ModelShape
from device_agent.engine_builds import found_unfit
from device_agent.hosting import other_name
from device_agent.kept_bundles import keep
from device_agent.model_host import ModelHost
from device_agent.probation import Conduct, breach
from device_agent.raw_model import is_raw
from device_agent.rejected import Rejected, RejectedBundles
from device_agent.service_time import ServiceTime
from device_agent.settings import Settings
from device_agent.surroundings import Surroundings
from device_agent.trial import TrialRules, allowed_disagreement
from device_agent.trial_run import TrialRun

log = logging.getLogger("device_agent")

_PLANNED = ("successor", "of_answers", "ends_in_s")  # of a trial's figures, what isn't news when it ends

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
        self,
        hosts: dict[str, ModelHost],
        settings: Settings,
        around: Surroundings,
        rejected: RejectedBundles,
        in_background: InBackground,
        on_taken: Callable[[ModelHost], None],
    ) -> None:
        self.leaving: set[ModelHost] = set()
        self._hosts = hosts
        self._settings = settings
        self._around = around
        self._rejected = rejected
        self._in_background = in_background
        self._on_taken = on_taken
        self._probations: dict[str, Probation] = {}
        self._trials: dict[str, TrialRun] = {}

    @property
    def probations(self) -> Mapping[str, Probation]:
        """By model."""
        return self._probations

    @property
    def trials(self) -> Mapping[str, TrialRun]:
        """By model."""
        return self._trials

    def on_trial(self, model: str) -> tuple[str, ...]:
        """The id of the bundle that is on trial for that model's place, if there is one."""
        return (self._trials[model].successor.bundle.bundle_id,) if model in self._trials else ()

    async def swap(self, model: str, new: ModelHost) -> None:
        """Put ``new`` in the place of the model that serves, at once or when its trial is over. Whatever refuses it is
        raised; the old one serves on."""
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
        rules = self._trial_rules(old, new)
        another = old.bundle.bundle_id != new.bundle.bundle_id  # else only its engine is new
        if rules.phases and another and old.instance.ready:  # else there is nothing to compare with, and clients wait
            await self.keep(new)
            await self._reject(model, new, old, "its trial wasn't over")
            self._begin_trial(model, old, new, rules, began)
            return
        # What both learnt before they shared the device; the new one from its rehearsal, nobody else was served yet.
        await self._take_over(model, old, new, (old.service, new.service), began)

    async def call_off(self, model: str, why: str) -> None:
        """End a model's trial, if there is one; its successor is dropped."""
        if trial := self._trials.pop(model, None):
            trial.stop()
            self._tell_trial("trial_called_off", model, trial, reason=why)
            await self.retire(trial.successor, limit_s=self._around.policy.drain_s)

    def stop(self) -> None:
        """The agent stops: nobody is judged any more."""
        for trial in self._trials.values():
            trial.stop()
        self._trials.clear()
        for model in list(self._probations):
            self.end_probation(model)

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

    async def _take_over(
        self, model: str, old: ModelHost, new: ModelHost, expected: tuple[ServiceTime, ServiceTime], began: float
    ) -> None:
        await new.muster()  # who relied on several workers keeps them
        self._switch(model, old, new)
        self._tell("swapped", model, old, new, took_s=self._around.clock() - began)
        await asyncio.to_thread(self._rejected.forget, model)
        await self.keep(new)
        await self.retire(old)
        self._begin_probation(model, old, new, expected)

    def _trial_rules(self, old: ModelHost, new: ModelHost) -> TrialRules:
        policy = self._around.policy
        bundles = [host.bundle for host in (old, new) if not is_raw(host.bundle.manifest)]
        promised = [bundle.contract.golden.min_agreement for bundle in bundles]
        return TrialRules(
            shadow_share=policy.shadow_share,
            canary_share=policy.canary_share,
            requests=policy.trial_requests,
            lasts_s=policy.trial_s,
            max_disagreement=allowed_disagreement(policy.max_disagreement, promised),
        )

    def _begin_trial(self, model: str, old: ModelHost, new: ModelHost, rules: TrialRules, began: float) -> None:
        def on_end(reason: str | None) -> None:
            self._in_background(partial(self._end_trial, model, trial, reason, began))

        trial = TrialRun(old, new, rules, self._around, on_end)
        self._trials[model] = trial
        self._tell_trial("trial_began", model, trial)

    async def _end_trial(self, model: str, trial: TrialRun, reason: str | None, began: float) -> None:
        if self._trials.get(model) is not trial:  # called off meanwhile
            return
        del self._trials[model]
        if reason is None and not trial.successor.instance.ready:  # other changes came first, and it didn't last
            reason = trial.away
        self._tell_trial("trial_passed" if reason is None else "trial_failed", model, trial, reason=reason)
        trial.stop()
        if reason is None:
            await self._take_over(model, trial.current, trial.successor, trial.expected, began)
            self._on_taken(trial.successor)
        else:
            await self._reject(model, trial.successor, trial.current, reason)
            await self.retire(trial.successor, limit_s=self._around.policy.drain_s)

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
        if bad.bundle.bundle_id != good.bundle.bundle_id:
            self._on_taken(good)  # its engine may not have been built yet, and the other's isn't wanted any more
        self._tell("rolled_back", model, bad, good, took_s=self._around.clock() - began, reason=reason)
        await self._reject(model, bad, good, reason)
        await self.retire(bad, limit_s=self._around.policy.drain_s)
        await good.muster()

    async def _reject(self, model: str, bad: ModelHost, good: ModelHost, reason: str) -> None:
        """The next start is to begin with the good one. Raw models have no copy it could begin with; of an engine that
        had to go the bundle is the same."""
        if is_raw(bad.bundle.manifest) or is_raw(good.bundle.manifest) or bad.bundle.bundle_id == good.bundle.bundle_id:
            return
        rejected = Rejected(
            bundle_id=bad.bundle.bundle_id,
            version=bad.bundle.manifest.version,
            kept_id=good.bundle.bundle_id,
            reason=reason,
            ts=rfc3339(time.time()),
        )
        await asyncio.to_thread(self._rejected.remember, model, rejected)

    def _tell(self, kind: str, model: str, old: ModelHost, new: ModelHost, *, took_s: float, **more: str) -> None:
        detail = _both(old, new)
        self._around.emit(kind, model=model, **detail, took_s=round(took_s, 3), **more)
        log.info("%s %s: version %s -> %s after %.2f s", model, kind, *list(detail.values())[2:], took_s)

    def _tell_trial(self, kind: str, model: str, trial: TrialRun, *, reason: str | None = None) -> None:
        figures = {name: value for name, value in msgspec.structs.asdict(trial.figures).items() if name not in _PLANNED}
        why = {} if reason is None else {"reason": reason}
        self._around.emit(kind, model=model, **_both(trial.current, trial.successor), **figures, **why)
        version = trial.successor.bundle.manifest.version
        log.info("%s: %s of version %s%s", model, kind.replace("_", " "), version, f": {reason}" if reason else "")


def _both(old: ModelHost, new: ModelHost) -> dict[str, str]:
    return {
        "from": old.bundle.bundle_id,
        "to": new.bundle.bundle_id,
        "from_version": old.bundle.manifest.version,
        "to_version": new.bundle.manifest.version,
    }
