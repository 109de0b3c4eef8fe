"""Before a bundle goes live: does its contract hold on this device?

The checks, in order, each known by its name in reports, events and errors:

==================  ====================================================================================
``schema`` …        what :func:`aios_edge.bundle.read.open_bundle` verifies: ``schema``, ``unlisted``,
                    ``digest``, ``manifest``, ``promises``, ``size``
``replaced``        it is the bundle that the supervisor read, not one that took its place since
``purpose``         the bundle was made to serve, not only to be measured
``profile``         the contract promises no less than this device's profile asks, and the session takes no more
                    threads than it grants
``load``            onnxruntime loads the model, and its tensors are those of the manifest
``golden``          recorded inputs give the recorded outputs, as tensors
``golden_raw``      raw text gives the recorded tensors and labels
``latency_p95_s``   the profile's latency budget, measured here
``memory_bytes``    the profile's memory budget, measured here
==================  ====================================================================================

``quick``, after a crash, leaves out ``purpose`` and the last two and looks at a few golden samples: the bundle has been
through the full check on this device before, and every second counts. ``bench`` weighs a bundle that way too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aios_edge.bundle.checks import CHECKS as BUNDLE_CHECKS
from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.errors import BundleRefused, RequestError, RuntimeUnavailable
from aios_edge.golden import read_golden
from aios_edge.profile import DeviceProfile
from aios_edge.tasks import Task, task_for
from device_agent import activation_golden as golden_checks
from device_agent import activation_measure as measure
from device_agent.affinity import cpus
from device_agent.runtime import Runtime, open_runtime
from device_agent.values import ActivationCheck, ActivationReport, Engines
from device_agent.worker_memory import resident_bytes

QUICK_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Activated:
    """A bundle that may go live, or a ``raw`` model (:mod:`device_agent.raw_model`): its requests pass as they are.

    ``takes_empty``: empty tensors reach it as well, for a crash would cost this process alone.
    """

    runtime: Runtime
    task: Task
    bundle: Bundle
    report: ActivationReport
    raw: bool = False
    takes_empty: bool = False


class ActivationRefused(BundleRefused):
    """A check failed; ``report`` lists what was measured until then (None when the bundle couldn't be read)."""

    report: ActivationReport | None = None


def activate(
    bundle_path: Path,
    profile: DeviceProfile,
    check: str = "full",
    *,
    alone: bool,
    state_dir: Path | None = None,
    bundle_id: str | None = None,
    engines: Engines = "build",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Activated:
    """Load a bundle and check its contract on this device.

    ``alone``: this process holds nothing but this model, so its resident set is the model's. ``state_dir``: where
    engines are kept that take minutes to build (None: nowhere), ``engines`` whether to build one. ``bundle_id``: which
    bundle is meant (None: any).
    Raises :class:`ActivationRefused` with the check's name as ``promise``; :class:`MissingExtra` and
    :class:`UsageError` (no such directory) as they come.
    """
    record = Record(on_stage)
    try:
        record.stage("bundle")
        bundle = open_bundle(bundle_path)
        record.bundle = bundle
        record.checks.extend(ActivationCheck(name=name, passed=True, detail="verified") for name in BUNDLE_CHECKS)

        if bundle_id not in (None, bundle.bundle_id):
            raise BundleRefused("replaced", "another bundle took its place", where=str(bundle_path), remedy="Load it")

        record.stage("profile")
        if check != "quick":
            record.add(measure.check_purpose(bundle.manifest))
        record.add(measure.check_profile(bundle, profile))

        record.stage("load")
        started_at = time.perf_counter()
        record.runtime = runtime = open_runtime(bundle, profile, state_dir=state_dir, engines=engines)
        record.load_s = time.perf_counter() - started_at
        record.add(golden_checks.check_tensors(bundle.manifest, runtime))

        golden = read_golden(bundle.file(bundle.contract.golden.file))
        count = len(golden.raw)
        indices = range(count)[:: max(1, count // QUICK_SAMPLES)][:QUICK_SAMPLES] if check == "quick" else range(count)
        record.stage("golden")
        outputs = golden_checks.run_samples(runtime, golden, indices)
        record.add(golden_checks.check_outputs(bundle, golden, outputs, runtime.providers_active))
        runtime.keep_engine()
        record.stage("golden_raw")
        task = task_for(bundle.manifest, bundle.path)
        record.add(golden_checks.check_raw(bundle, golden, outputs, task))

        if check != "quick":
            record.stage("latency_p95_s")
            inputs = measure.latency_inputs(golden, profile.budgets, bundle.manifest.preprocess.max_length)
            record.add(measure.check_latency(runtime, inputs, profile))
            record.stage("memory_bytes")
            record.add(measure.check_memory(resident_bytes() if alone else None, profile))
    except BundleRefused as error:
        raise record.refused(error) from error
    except (RequestError, RuntimeUnavailable) as error:  # the model doesn't take what it was recorded with
        raise record.refused(BundleRefused(record.current, error.what)) from error
    return Activated(runtime=runtime, task=task, bundle=bundle, report=record.report(alone))


class Record:
    """What is known so far, for the report of a success and of a refusal alike."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self.current = ""
        self._on_stage = on_stage
        self.bundle: Bundle | None = None
        self.runtime: Runtime | None = None
        self.load_s = 0.0
        self.checks: list[ActivationCheck] = []

    def stage(self, name: str) -> None:
        """A stage begins: checks are named after theirs."""
        self.current = name
        self._on_stage(name)

    def add(self, check: ActivationCheck) -> None:
        """Note a check; raises :class:`BundleRefused` when it failed."""
        self.checks.append(check)
        if not check.passed and not check.skipped:
            raise BundleRefused(check.name, check.detail, where=str(self.bundle.path) if self.bundle else None)

    def refused(self, error: BundleRefused) -> ActivationRefused:
        """The refusal with everything that is known so far."""
        if all(check.name != error.promise for check in self.checks):
            self.checks.append(ActivationCheck(name=error.promise, passed=False, detail=error.what))
        refused = ActivationRefused(error.promise, error.what, where=error.where, remedy=error.remedy)
        refused.report = self.report(alone=False) if self.bundle else None
        return refused

    def report(self, alone: bool) -> ActivationReport:
        """What is known so far; ``alone`` as of :func:`activate`."""
        assert self.bundle is not None
        runtime = self.runtime
        latency = next((check.measured for check in self.checks if check.name == "latency_p95_s"), None)
        return ActivationReport(
            bundle_id=self.bundle.bundle_id,
            model=self.bundle.manifest.name,
            version=self.bundle.manifest.version,
            providers_requested=tuple(runtime.providers_requested) if runtime else (),
            providers_active=tuple(runtime.providers_active) if runtime else (),
            provider_reason=runtime.provider_reason if runtime else None,
            checks=tuple(self.checks),
            latency_p95_s=latency,
            rss_bytes=resident_bytes() if alone else None,
            load_s=self.load_s,
            provider_steps=runtime.steps if runtime else (),
            engine=runtime.engine if runtime else None,
            inputs=runtime.inputs if runtime else (),
            outputs=runtime.outputs if runtime else (),
            intra_op_threads=runtime.options.intra_op_threads if runtime else None,
            cpus=cpus(),
        )
