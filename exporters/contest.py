"""One profile's candidates tried and one of them chosen; as the report has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from aios_edge.host import matches
from aios_edge.measurement import MeasuredOn, measured_on
from aios_edge.profile import DeviceProfile
from exporters import convert, ort, steps
from exporters.brought import assign, targets_of
from exporters.evaluate import Quality
from exporters.measure import SHAPES, Measured
from exporters.plans import on_cpu
from exporters.report import Candidate, Interval, Latency, ProfileReport, Pruned, Target, Training
from exporters.select import Choice
from exporters.stages import Stages
from exporters.trials import Common, Terms, TimedAt, Trials, Tried, Twin, conditions_of
from exporters.tuned_static import Absent
from exporters.variants import Variant

ONE_THREAD = tuple((batch, length, 1) for batch, length in SHAPES)
#: Said of a candidate whose name promises fewer bits for rare words than it has.
_UNSPLIT = "no table could be split by use, so rare words have as many bits as the others"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A profile's candidates in its order of preference, and which of them won.

    ``on_target``: this machine's own figures count for the profile. ``targets``: by candidate, what was measured on a
    device and brought; where there is any, it counts and this machine's figures don't. ``longest``: tokens of the
    longest input. ``absent``: candidates that couldn't be built here, ``twins``: that are the same model as another;
    both are reported all the same.
    """

    profile: DeviceProfile
    tried: tuple[Tried, ...]
    absent: tuple[Absent, ...] = ()
    twins: tuple[Twin, ...] = ()
    choice: Choice
    max_drop: float
    longest: int
    on_target: bool
    host: MeasuredOn
    targets: Mapping[str, Target] = field(default_factory=dict)

    @property
    def winner(self) -> Tried:
        """The chosen candidate; only where there is one."""
        return next(t for t in self.tried if t.made.name == self.choice.chosen)


def hold(profile: DeviceProfile, common: Common, stages: Stages) -> Contest:
    """Build, verify and measure every candidate of a profile on validation rows, then choose."""
    match = matches(profile, common.machine)
    brought = common.brought.get(profile.name, ())
    # Figures come from the CPU: they speak of a profile only if that is where it runs the model.
    on_target = match.ok and on_cpu(profile) and not brought
    longest = common.whole.encoder.max_length
    conditions, shapes = conditions_of(profile, longest), common.shapes
    if on_target and conditions not in shapes:
        shapes = (*shapes, conditions)
    asked = common.recipe.accuracy.max_drop
    terms = Terms(
        profile=profile,
        max_drop=profile.budgets.max_drop if asked is None else min(asked, profile.budgets.max_drop),
        on_target=on_target,
        brought=brought,
        longest=longest,
        shapes=shapes,
    )
    trials = Trials(terms, common, stages)
    trials.run()
    targets: dict[str, Target] = {}
    if brought:
        candidates = [tried.made for tried in trials.tried]
        targets = targets_of(assign(brought, candidates, profile, conditions[:2]), candidates)
    return Contest(
        profile=profile,
        targets=targets,
        longest=longest,
        tried=tuple(trials.tried),
        absent=tuple(trials.absent),
        twins=tuple(trials.twins),
        choice=trials.choose(targets),
        max_drop=terms.max_drop,
        on_target=on_target,
        host=measured_on(profile, common.machine, runtime=ort.machine_note()),
    )


def report_of(contest: Contest) -> ProfileReport:
    """The contest as the report has it, before the test split and the bundle."""
    return ProfileReport(
        chosen=contest.choice.chosen,
        bundle=None,
        bundle_id=None,
        max_drop=contest.max_drop,
        candidates=(
            *(_candidate(t, contest) for t in contest.tried),
            *(_absent_candidate(a, contest) for a in contest.absent),
            *(_twin_candidate(t, contest) for t in contest.twins),
        ),
        problem=contest.choice.remedy,
    )


def latency_of(measured: Measured) -> Latency | None:
    """One request of 32 tokens on one thread."""
    timing = measured.timing(*ONE_THREAD[0])
    return Latency(p50=timing.p50, p95=timing.p95) if timing else None


def shapes_within(positions: int, *, exhaustive: bool = True) -> tuple[TimedAt, ...]:
    """The usual shapes that a model of so many positions can take, or only the one that decides; where there is none,
    one request of that length."""
    wanted = ONE_THREAD if exhaustive else ONE_THREAD[:1]
    return tuple(shape for shape in wanted if shape[1] <= positions) or ((1, positions, 1),)


def _candidate(tried: Tried, contest: Contest) -> Candidate:
    name, found = tried.made.name, tried.quality
    timing, plan = tried.measured.timing(*ONE_THREAD[0]), tried.made.plan
    bits = tried.made.built.rare_row_bits
    return Candidate(
        name=name,
        precision=plan.precision,
        chosen=name == contest.choice.chosen,
        eligible=name in contest.choice.eligible,
        reason=contest.choice.reasons[name] + (f"; {_UNSPLIT}" if plan.counts_rows and bits == 8 else ""),
        size_bytes=tried.size_bytes,
        bundle_size_bytes=tried.bundle_size_bytes,
        metrics=found.metrics,
        drop=_interval(found),
        agreement=found.agreement,
        speedup=timing.speedup if timing else None,
        latency_s=latency_of(tried.measured),
        latency=tried.measured.timings,
        rss_bytes=tried.measured.rss_bytes,
        max_batch_size=tried.measured.max_batch_size,
        measured_on=contest.host,
        operators=tried.made.built.operators,
        kept_float=tried.made.built.kept_float,
        tuning=tried.made.built.tuning,
        not_measured=found.reason,
        target=contest.targets.get(name),
        class_drops=tried.class_drops,
        rare_row_bits=bits if bits < 8 else None,
        structure=tried.variant.structure,
        pruned=_pruned(tried),
        recovery=_recovery(tried.variant),
    )


def _twin_candidate(twin: Twin, contest: Contest) -> Candidate:
    """With the figures of the other one, which alone took part."""
    built, other = twin.made.built, twin.of.made
    trials = built.tuning or other.built.tuning
    why = "the first configuration kept the promise" if len(trials) == 1 else "no other configuration was more accurate"
    return msgspec.structs.replace(
        _candidate(twin.of, contest),
        name=twin.made.name,
        chosen=False,
        reason=f"{why}: the same model as {other.name}",
        same_model_as=other.name,
        tuning=built.tuning,
        target=None,
    )


def _interval(found: Quality) -> Interval | None:
    drop = found.drop
    return Interval(value=drop.value, low=drop.low, high=drop.high, split=found.split) if drop else None


def _absent_candidate(absent: Absent, contest: Contest) -> Candidate:
    return Candidate(
        name=absent.plan.name,
        precision=absent.plan.precision,
        chosen=False,
        reason=absent.reason,
        size_bytes=None,
        bundle_size_bytes=None,
        metrics=None,
        drop=None,
        agreement=None,
        speedup=None,
        latency_s=None,
        latency=(),
        rss_bytes=None,
        max_batch_size=None,
        measured_on=contest.host,
        operators={},
        not_measured=absent.reason,
    )


def _pruned(tried: Tried) -> Pruned | None:
    if (before := tried.before) is None:
        return None
    found, timing = before.quality, before.measured.timing(*ONE_THREAD[0])
    return Pruned(
        whole=before.whole,
        size_bytes=steps.size_bytes(tried.variant.fp32.folder / convert.RAW),
        accuracy=found.metrics.accuracy if found.metrics else None,
        drop=_interval(found),
        agreement=found.agreement,
        latency_s=latency_of(before.measured),
        speedup=timing.speedup if timing else None,
    )


def _recovery(variant: Variant) -> Training | None:
    tuned, recovery = variant.tuned, variant.recovery
    if recovery is None:
        return None
    return Training(
        epochs=tuned.epochs,
        best_epoch=tuned.best_epoch,
        validation_accuracy=tuned.validation_accuracy,
        training_loss=tuned.training_loss,
        settings=recovery.settings,
        trials=recovery.trials,
    )
