"""One profile's candidates: built, verified, measured, and one of them chosen."""

from __future__ import annotations

from dataclasses import dataclass

from aios_edge.host import Host as Machine
from aios_edge.host import describe, matches
from aios_edge.profile import DeviceProfile
from exporters import graph, ort
from exporters.bundle import DOCUMENTS_BYTES
from exporters.data import Data
from exporters.evaluate import Logits, Quality, quality
from exporters.golden_samples import CPU
from exporters.measure import SHAPES, Measured
from exporters.quantize import Plan, plans_for
from exporters.recipe import ExportRecipe
from exporters.report import Candidate, Host, Interval, Latency, ProfileReport
from exporters.select import Choice, Figures, misses, select
from exporters.stages import Made, Stages
from exporters.structure import Structure, following
from exporters.variants import Variant, Variants

ONE_THREAD = tuple((batch, length, 1) for batch, length in SHAPES)

Shape = tuple[int, int, int]  # batch, length, threads


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all profiles of one export share. ``shapes``: what every candidate is timed at."""

    recipe: ExportRecipe
    data: Data
    variants: Variants
    machine: Machine
    shapes: tuple[Shape, ...]

    @property
    def whole(self) -> Variant:
        """The fine-tuned network; its fp32 answers are what all candidates are compared with."""
        return self.variants.whole


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate with all that was found out on validation."""

    variant: Variant
    made: Made
    logits: Logits
    quality: Quality
    measured: Measured
    size_bytes: int
    bundle_size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A profile's candidates in its order of preference, and which of them won."""

    profile: DeviceProfile
    tried: tuple[Tried, ...]
    choice: Choice
    max_drop: float
    on_target: bool
    host: Host

    @property
    def winner(self) -> Tried:
        """The chosen candidate; only where there is one."""
        return next(t for t in self.tried if t.made.name == self.choice.chosen)


def hold(profile: DeviceProfile, common: Common, stages: Stages) -> Contest:
    """Build, verify and measure every candidate of a profile on validation rows, then choose."""
    match = matches(profile, common.machine)
    # Figures come from the CPU: they speak of a profile only if that is where it runs the model.
    on_target = match.ok and bool(profile.providers) and profile.providers[0].name == CPU
    longest = common.whole.encoder.max_length
    shapes = common.shapes
    if on_target and (own := _conditions(profile, longest)) not in shapes:
        shapes = (*shapes, own)
    asked = common.recipe.accuracy.max_drop
    max_drop = profile.budgets.max_drop if asked is None else min(asked, profile.budgets.max_drop)
    tried: list[Tried] = []

    def choose() -> Choice:
        figures = [_figures(t, profile, longest, on_target=on_target) for t in tried]
        return select(figures, profile.budgets, max_drop=max_drop, on_target=on_target)

    def try_out(variant: Variant, plan: Plan) -> Tried:
        rows = common.data.validation
        made = stages.candidate(variant.candidate(plan.name), plan, variant.fp32.folder, common.data, variant.encoder)
        logits = stages.answers(made, "validation", rows, variant.encoder)
        size = graph.size_bytes(made.folder)
        return Tried(
            variant=variant,
            made=made,
            logits=logits,
            quality=quality("validation", logits, common.whole.reference, rows.labels, common.data.labels),
            measured=stages.measured(made, common.whole.fp32, shapes),
            size_bytes=size,
            bundle_size_bytes=size + variant.tokenizer_bytes + DOCUMENTS_BYTES,
        )

    plans = plans_for(profile)
    for plan in plans:
        if tried and not on_target and not common.recipe.search.exhaustive and choose().chosen:
            break  # preference decides here, and the rest comes after the one that keeps its promises
        tried.append(try_out(common.whole, plan))

    rungs = common.variants.rungs()
    fits = [_fits(rung, tried[0], profile, common, longest, on_target=on_target) for rung in rungs]
    kept: dict[Structure, bool] = {}
    while len(kept) < common.recipe.search.structures and (rung := following(rungs, kept, fits)) is not None:
        smaller = try_out(common.variants.pruned(rung), plans[0])
        figures = _figures(smaller, profile, longest, on_target=on_target)
        kept[rung] = not misses(figures, profile.budgets, max_drop=max_drop, on_target=on_target)
        tried.insert(sum(t.size_bytes < smaller.size_bytes for t in tried[: len(kept) - 1]), smaller)
    return Contest(
        profile=profile,
        tried=tuple(tried),
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
        candidates=tuple(_candidate(t, contest) for t in contest.tried),
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


def _fits(
    rung: Structure, whole: Tried, profile: DeviceProfile, common: Common, longest: int, *, on_target: bool
) -> bool:
    """Whether a smaller network may keep the profile's budgets, as far as arithmetic and the whole one's time tell."""
    budgets, shape = profile.budgets, common.variants.shape
    size = shape.size_bytes(rung, whole.made.plan.precision) + common.whole.tokenizer_bytes + DOCUMENTS_BYTES
    if budgets.bundle_size_bytes is not None and size > budgets.bundle_size_bytes:
        return False
    timing = whole.measured.timing(*_conditions(profile, longest)) if on_target else None
    if timing is None or budgets.latency_p95_s is None:
        return True
    return timing.p95 * shape.products(rung) / shape.products(shape.whole) <= budgets.latency_p95_s


def _figures(tried: Tried, profile: DeviceProfile, longest: int, *, on_target: bool) -> Figures:
    timing = tried.measured.timing(*_conditions(profile, longest)) if on_target else None
    return Figures(
        name=tried.made.name,
        is_fp32=tried.made.plan.precision == "fp32",
        is_pruned=tried.variant.structure is not None,
        drop=tried.quality.drop.value if tried.quality.drop else None,
        agreement=tried.quality.agreement,
        size_bytes=tried.size_bytes,
        bundle_size_bytes=tried.bundle_size_bytes,
        latency_p50_s=timing.p50 if timing else None,
        latency_p95_s=timing.p95 if timing else None,
        speedup=timing.speedup if timing else None,
        rss_bytes=tried.measured.rss_bytes if on_target else None,
    )


def _candidate(tried: Tried, contest: Contest) -> Candidate:
    name, found = tried.made.name, tried.quality
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
        not_measured=found.reason,
    )
