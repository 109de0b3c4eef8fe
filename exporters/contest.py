"""One profile's candidates: built, verified, measured, and one of them chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aios_edge.errors import MissingExtra, RuntimeUnavailable
from aios_edge.host import Host as Machine
from aios_edge.host import describe, matches
from aios_edge.profile import DeviceProfile
from exporters import graph, ort
from exporters.bundle import DOCUMENTS_BYTES
from exporters.data import Data
from exporters.encode import Encoder
from exporters.evaluate import Logits, Quality, quality
from exporters.golden_samples import CPU
from exporters.measure import SHAPES, Measured
from exporters.quantize import STATIC, Plan, plans_for
from exporters.recipe import ExportRecipe
from exporters.report import Candidate, Host, Interval, Latency, ProfileReport
from exporters.select import Choice, Figures, select
from exporters.stages import Made, Stages

ONE_THREAD = tuple((batch, length, 1) for batch, length in SHAPES)

Shape = tuple[int, int, int]  # batch, length, threads


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all profiles of one export share.

    ``tuned``: the folder of the fine-tuning. ``reference``: fp32's answers to the validation rows. ``shapes``: what
    every candidate is timed at.
    """

    recipe: ExportRecipe
    data: Data
    encoder: Encoder
    tokenizer_bytes: int
    tuned: Path
    converted: Made
    reference: Logits
    machine: Machine
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate with all that was found out on validation."""

    made: Made
    logits: Logits
    quality: Quality
    measured: Measured
    size_bytes: int
    bundle_size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A candidate that was asked for and isn't there, and why: not available here, or it failed."""

    plan: Plan
    reason: str


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A profile's candidates in its order of preference, and which of them won."""

    profile: DeviceProfile
    tried: tuple[Tried, ...]
    absent: tuple[Absent, ...]
    choice: Choice
    max_drop: float
    on_target: bool
    host: Host

    @property
    def winner(self) -> Tried:
        """The chosen candidate; only where there is one."""
        return next(t for t in self.tried if t.made.plan.name == self.choice.chosen)


def hold(profile: DeviceProfile, common: Common, stages: Stages) -> Contest:
    """Build, verify and measure every candidate of a profile on validation rows, then choose."""
    match = matches(profile, common.machine)
    # Figures come from the CPU: they speak of a profile only if that is where it runs the model.
    on_target = match.ok and bool(profile.providers) and profile.providers[0].name == CPU
    longest = common.encoder.max_length
    shapes = common.shapes
    if on_target and (own := _conditions(profile, longest)) not in shapes:
        shapes = (*shapes, own)
    asked = common.recipe.accuracy.max_drop
    max_drop = profile.budgets.max_drop if asked is None else min(asked, profile.budgets.max_drop)
    tried: list[Tried] = []
    absent: list[Absent] = []

    def choose() -> Choice:
        figures = [_figures(t, profile, longest, on_target=on_target) for t in tried]
        return select(figures, profile.budgets, max_drop=max_drop, on_target=on_target)

    for plan in plans_for(profile, tuned_static=common.recipe.search.neural_compressor):
        if tried and not on_target and not common.recipe.search.exhaustive and choose().chosen:
            break  # preference decides here, and the rest comes after the one that keeps its promises
        made = _made(plan, common, stages, max_drop=max_drop)
        if isinstance(made, Absent):
            absent.append(made)
            continue
        logits = stages.answers(made, "validation", common.data.validation, common.encoder)
        truth, labels = common.data.validation.labels, common.data.labels
        size = graph.size_bytes(made.folder)
        tried.append(
            Tried(
                made=made,
                logits=logits,
                quality=quality("validation", logits, common.reference, truth, labels),
                measured=stages.measured(made, common.converted, shapes),
                size_bytes=size,
                bundle_size_bytes=size + common.tokenizer_bytes + DOCUMENTS_BYTES,
            )
        )
    return Contest(
        profile=profile,
        tried=tuple(tried),
        absent=tuple(absent),
        choice=choose(),
        max_drop=max_drop,
        on_target=on_target,
        host=Host(
            host=describe(common.machine),
            cpu_flags=tuple(sorted(common.machine.cpu_flags)),
            matches_profile=match.ok,
            reasons=match.reasons,
            runtime=ort.machine_note(),
        ),
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
        ),
        problem=contest.choice.remedy,
    )


def latency_of(measured: Measured) -> Latency | None:
    """One request of 32 tokens on one thread."""
    timing = measured.timing(*ONE_THREAD[0])
    return Latency(p50=timing.p50, p95=timing.p95) if timing else None


def shapes_within(positions: int, *, exhaustive: bool = True) -> tuple[Shape, ...]:
    """The usual shapes that a model of so many positions can take, or only the one that decides; where there is none,
    one request of that length."""
    wanted = ONE_THREAD if exhaustive else ONE_THREAD[:1]
    return tuple(shape for shape in wanted if shape[1] <= positions) or ((1, positions, 1),)


def _conditions(profile: DeviceProfile, longest: int) -> Shape:
    """The profile's shape; its length cut to the longest input, as an agent does when it checks the budget."""
    budgets = profile.budgets
    return budgets.latency_batch, min(budgets.latency_length, longest), profile.threads.intra_op


def _figures(tried: Tried, profile: DeviceProfile, longest: int, *, on_target: bool) -> Figures:
    timing = tried.measured.timing(*_conditions(profile, longest)) if on_target else None
    return Figures(
        name=tried.made.plan.name,
        is_fp32=tried.made.plan.precision == "fp32",
        drop=tried.quality.drop.value if tried.quality.drop else None,
        agreement=tried.quality.agreement,
        size_bytes=tried.size_bytes,
        bundle_size_bytes=tried.bundle_size_bytes,
        latency_p50_s=timing.p50 if timing else None,
        latency_p95_s=timing.p95 if timing else None,
        speedup=timing.speedup if timing else None,
        rss_bytes=tried.measured.rss_bytes if on_target else None,
    )


def _made(plan: Plan, common: Common, stages: Stages, *, max_drop: float) -> Made | Absent:
    """A candidate; one that an optional package makes may be absent, which ends nothing."""
    if plan.precision != STATIC:
        return stages.candidate(plan, common.converted.folder, common.data, common.encoder)
    try:
        return stages.tuned_static(
            plan,
            common.tuned,
            common.converted.folder,
            common.data,
            common.encoder,
            common.reference,
            max_drop=max_drop,
        )
    except MissingExtra as error:
        return Absent(plan=plan, reason=f"not available here: {error}")
    except RuntimeUnavailable as error:
        return Absent(plan=plan, reason=f"could not be built: {error}")


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


def _candidate(tried: Tried, contest: Contest) -> Candidate:
    name, found = tried.made.plan.name, tried.quality
    timing = tried.measured.timing(*ONE_THREAD[0])
    drop = found.drop
    return Candidate(
        name=name,
        precision=tried.made.plan.precision,
        chosen=name == contest.choice.chosen,
        reason=contest.choice.reasons[name],
        size_bytes=tried.size_bytes,
        bundle_size_bytes=tried.bundle_size_bytes,
        metrics=found.metrics,
        drop=Interval(value=drop.value, low=drop.low, high=drop.high, split=found.split) if drop else None,
        agreement=found.agreement,
        speedup=timing.speedup if timing else None,
        latency_s=latency_of(tried.measured),
        latency=tried.measured.timings,
        rss_bytes=tried.measured.rss_bytes,
        max_batch_size=tried.measured.max_batch_size,
        measured_on=contest.host,
        operators=tried.made.built.operators,
        tuning=tried.made.built.tuning,
        not_measured=found.reason,
    )
