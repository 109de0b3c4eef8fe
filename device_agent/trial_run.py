"""A trial on its way: a bundle that waits for another's place answers part of its requests (:mod:`device_agent.trial`).

Copies are made of batches that were answered, so no client waits for one. They go to the successor as a client's
requests would, those of one batch at a time, and only while nobody waits for the worker that serves and the device
isn't to be spared. They never leave the device: a copy has no way to the cloud.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import msgspec

from aios_edge.telemetry import TrialFigures
from device_agent.answer import Answer
from device_agent.model_host import ModelHost
from device_agent.surroundings import Surroundings
from device_agent.trial import Phase, Seen, TrialRules, Verdict, compare, judge
from device_agent.values import InferenceRequest
from device_agent.wire import DoneItem
from device_agent.worker_pool import BatchResult

log = logging.getLogger("device_agent.model")


class TrialRun:
    """From its making until :meth:`stop`. ``on_end`` hears once why the successor must go; None: it may take over."""

    def __init__(
        self,
        current: ModelHost,
        successor: ModelHost,
        rules: TrialRules,
        around: Surroundings,
        on_end: Callable[[str | None], None],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.current = current
        self.successor = successor
        self.rules = rules
        # What both learnt before they shared the device.
        self.expected = (current.service, successor.service)
        self.ended = False
        self.over = asyncio.Event()  # nobody tries any more
        self._around = around
        self._on_end = on_end
        self._draw = draw
        self._phases = list(rules.phases)
        self._copied: dict[int, tuple[str, ...] | None] = {}  # the last copies, with what their clients were told
        self._on_the_way: set[int] = set()  # those of them that aren't answered yet
        self._begin_phase()

    @property
    def phase(self) -> Phase:
        """Which one this is, or was the last."""
        return self._phase

    @property
    def figures(self) -> TrialFigures:
        """How it stands."""
        now, before = self.successor.record.conduct, self.current.record.conduct
        return TrialFigures(
            successor=self.successor.bundle.manifest.version,
            phase=self._phase,
            answers=self._seen.answers,
            of_answers=self.rules.requests,
            ends_in_s=round(max(self._began_at + self.rules.lasts_s - self._around.clock(), 0.0), 3),
            compared=self._seen.compared,
            disagreed=self._seen.disagreed,
            max_disagreement=self.rules.max_disagreement,
            skipped=self._seen.skipped,
            failures=now.failures,
            slow_batches=now.slow,
            p95_s=now.p95_s,
            current_failures=before.failures,
            current_slow_batches=before.slow,
            current_p95_s=before.p95_s,
        )

    @property
    def away(self) -> str:
        """Why a successor whose worker isn't there can't take over."""
        return f"its worker is away: {self.successor.detail}"

    def takes(self) -> ModelHost:
        """Who answers a request that comes now."""
        if self._phase != "canary" or self.ended or self._on_the_way or not self.successor.instance.ready:
            return self.current
        return self.successor if self._draw() < self.rules.canary_share else self.current

    def stop(self) -> None:
        """No copies any more, and nobody is judged. Copies on their way end as requests do."""
        self.ended = True
        self.over.set()
        self._timer.cancel()
        for host in (self.current, self.successor):
            host.record.unwatch()
            host.instance.tell_classes(False)

    def _begin_phase(self) -> None:
        self._phase: Phase = self._phases.pop(0)
        self._seen = Seen()
        self._began_at = self._around.clock()
        self._timer = asyncio.get_running_loop().call_later(self.rules.lasts_s, self._time_is_up)
        shadow = self._phase == "shadow"
        self.current.record.watch(self.expected, self._look, self._copy if shadow else None)
        self.successor.record.watch(self.expected, self._look, self._answered, strict=shadow)
        for host in (self.current, self.successor):
            host.instance.tell_classes(shadow)

    def _answered(self, requests: Sequence[InferenceRequest], result: BatchResult) -> None:
        """The successor answered, copies or clients."""
        compared = disagreed = 0
        for item in result.done.items:
            if item.status == 200 and item.request_id in self._copied:
                rows, differ = compare(self._copied[item.request_id], _labels(self.successor, item))
                compared, disagreed = compared + rows, disagreed + differ
        self._seen = self._seen.plus(answers=len(requests), compared=compared, disagreed=disagreed)
        self._look()

    def _time_is_up(self) -> None:
        self._look(self.rules.lasts_s)  # by the loop's clock, which may be a moment ahead of ours

    def _look(self, at_least_s: float = 0.0) -> None:
        if self.ended:
            return
        elapsed_s = max(self._around.clock() - self._began_at, at_least_s)
        verdict = judge(self.rules, self._seen, elapsed_s, self.successor.record.conduct, self.current.record.conduct)
        if verdict.over and verdict.reason is None and not self.successor.instance.ready:
            verdict = Verdict(over=True, reason=self.away)
        if not verdict.over:
            return
        self._timer.cancel()
        if verdict.reason is None and not self._seen.answers:
            log.warning(
                "trial of %s: nobody asked in %.3g s, its %s shows nothing", self.current.name, elapsed_s, self._phase
            )
        if verdict.reason is None and self._phases:
            self._begin_phase()
            return
        self.ended = True
        self._on_end(verdict.reason)

    # Copies

    def _copy(self, requests: Sequence[InferenceRequest], result: BatchResult) -> None:
        now, answers = self._around.clock(), {item.request_id: item for item in result.done.items if item.status == 200}
        due = [
            msgspec.structs.replace(request, deadline_at=None, local_only=True, arrived_at=now)
            for request in requests
            if request.request_id in answers and self._draw() < self.rules.shadow_share
        ]
        if self.ended or not due:
            return
        if not self._room():
            self._seen = self._seen.plus(skipped=len(due))
            return
        self._copied = {copy.request_id: _labels(self.current, answers[copy.request_id]) for copy in due}
        self._on_the_way = set(self._copied)
        asyncio.get_running_loop().call_soon(self._submit, due)  # whoever was answered hears it first

    def _room(self) -> bool:
        state, _ = self._around.device()
        spared = self._around.strain() is not None or state.throttled is True
        return self.successor.instance.ready and not (self._on_the_way or self.current.queued or spared)

    def _submit(self, copies: Sequence[InferenceRequest]) -> None:
        for copy in copies:

            def answered(answer: Answer, number: int = copy.request_id) -> None:
                self._on_the_way.discard(number)
                if answer.route == "shed":  # the successor didn't come to it
                    self._seen = self._seen.plus(skipped=1)

            self.successor.submit(copy, answered).arrival = None  # no decision that a trace should tell of


def _labels(host: ModelHost, item: DoneItem) -> tuple[str, ...] | None:
    """What a worker said, by name: two bundles may have their labels in another order. No label is an empty one."""
    if item.classes is None:
        return None
    labels = host.bundle.manifest.labels
    return tuple(labels[index] if 0 <= index < len(labels) else "" for index in item.classes)
