"""One profile's candidates: built, verified, measured, and one of them chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from aios_edge.host import Host as Machine
from aios_edge.host import matches
from aios_edge.measurement import MeasuredOn, measured_on
from aios_edge.profile import DeviceProfile, Threads
from exporters import graph, ort, tuned_static
from exporters.brought import Brought, assign, targets_of
from exporters.bundle import DOCUMENTS_BYTES
from exporters.class_drop import ClassDrop, class_drops, class_misses
from exporters.data import Data
from exporters.evaluate import Logits, Quality, quality
from exporters.golden_samples import CPU
from exporters.measure import SHAPES, Measured
from exporters.output_range import output_misses
from exporters.quantize import STATIC, Plan, plans_for
from exporters.recipe import ExportRecipe
from exporters.report import Candidate, Interval, Latency, ProfileReport, Target, Training
from exporters.select import Choice, Figures, Miss, misses, select
from exporters.stages import Made, Stages
from exporters.structure import Shape as Sizes
from exporters.structure import Structure, following
from exporters.tuned_static import Absent
from exporters.variants import Variant, Variants

ONE_THREAD = tuple((batch, length, 1) for batch, length in SHAPES)

Shape = tuple[int, int, int]  # batch, length, threads


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all profiles of one export share.

    ``shapes``: what every candidate is timed at. ``brought``: by profile, what was measured on its devices.
    ``for_measuring``: all candidates are given out as bundles.
    """

    recipe: ExportRecipe
    data: Data
    variants: Variants
    machine: Machine
    shapes: tuple[Shape, ...]
    brought: Mapping[str, tuple[Brought, ...]] = field(default_factory=dict)
    for_measuring: bool = False

    @property
    def all_candidates(self) -> bool:
        """Whether even those are built that can't win."""
        return self.recipe.search.exhaustive or self.for_measuring

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
    class_drops: tuple[ClassDrop, ...]
    broken: tuple[Miss, ...]
    measured: Measured
    size_bytes: int
    bundle_size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A profile's candidates in its order of preference, and which of them won.

    ``on_target``: this machine's own figures count for the profile. ``targets``: by candidate, what was measured on a
    device and brought; where there is any, it counts and this machine's figures don't. ``longest``: tokens of the
    longest input. ``absent``: candidates that couldn't be built here, which are reported all the same.
    """

    profile: DeviceProfile
    tried: tuple[Tried, ...]
    absent: tuple[Absent, ...] = ()
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
    on_target = match.ok and bool(profile.providers) and profile.providers[0].name == CPU and not brought
    longest = common.whole.encoder.max_length
    shapes = common.shapes
    if on_target and (own := conditions_of(profile, longest)) not in shapes:
        shapes = (*shapes, own)
    asked = common.recipe.accuracy.max_drop
    max_drop = profile.budgets.max_drop if asked is None else min(asked, profile.budgets.max_drop)
    tried: list[Tried] = []
    absent: list[Absent] = []
    targets: dict[str, Target] = {}

    def choose() -> Choice:
        if absent and not tried:
            told = "; ".join(f"{a.plan.name} is {a.reason}" for a in absent)
            return Choice(chosen=None, reasons={}, remedy=f"{told}; or prefer another precision too")
        figures = [_figures(t, profile, longest, on_target=on_target) for t in tried]
        if targets:
            figures = [_as_brought(f, targets.get(f.name)) for f in figures]
        return select(figures, profile.budgets, max_drop=max_drop, on_target=on_target or bool(targets))

    def made_of(variant: Variant, plan: Plan) -> Made:
        return stages.candidate(variant.candidate(plan.name), plan, variant.fp32.folder, common.data, variant.encoder)

    def try_out(variant: Variant, made: Made) -> Tried:
        rows = common.data.validation
        logits = stages.answers(made, "validation", rows, variant.encoder)
        size = graph.size_bytes(made.folder)
        truth, labels, reference = rows.labels, common.data.labels, common.whole.reference
        drops = class_drops(logits, reference, truth, labels, max_drop=max_drop)
        return Tried(
            variant=variant,
            made=made,
            logits=logits,
            quality=quality("validation", logits, reference, truth, labels),
            class_drops=drops,
            broken=class_misses(drops, max_drop=max_drop) + output_misses(logits, variant.reference, labels),
            measured=stages.measured(made, common.whole.fp32, shapes, profile.threads if on_target else Threads()),
            size_bytes=size,
            bundle_size_bytes=size + variant.tokenizer_bytes + DOCUMENTS_BYTES,
        )

    plans = plans_for(profile, tuned_static=common.recipe.search.neural_compressor)
    for plan in plans:
        if tried and not on_target and not brought and not common.all_candidates and choose().chosen:
            break  # preference decides here, and the rest comes after the one that keeps its promises
        if plan.precision != STATIC:
            tried.append(try_out(common.whole, made_of(common.whole, plan)))
            continue
        made = tuned_static.make(plan, common.whole, common.data, stages, max_drop=max_drop)
        if isinstance(made, Absent):
            absent.append(made)
        else:
            tried.append(try_out(common.whole, made))

    pruning, of_pruned = common.variants.pruning, next((plan for plan in plans if plan.precision != STATIC), None)
    if pruning is not None and of_pruned is not None:
        whole = tried[0]
        kept: dict[Structure, bool] = {}
        fits = [_fits(rung, pruning.shape, whole, common, profile, longest, on_target) for rung in pruning.rungs]
        while len(kept) < common.recipe.search.structures and (rung := following(pruning.rungs, kept, fits)):
            variant = common.variants.pruned(rung, pruning)
            smaller = try_out(variant, made_of(variant, of_pruned))
            figures = _figures(smaller, profile, longest, on_target=on_target)
            kept[rung] = not misses(figures, profile.budgets, max_drop=max_drop, on_target=on_target)
            # Who asks for pruning prefers the smaller of those that keep their promises.
            tried.insert(sum(t.size_bytes < smaller.size_bytes for t in tried[: len(kept) - 1]), smaller)
    if brought:
        candidates = [t.made for t in tried]
        given = assign(brought, candidates, profile, conditions_of(profile, longest)[:2])
        targets.update(targets_of(given, candidates))
    return Contest(
        profile=profile,
        targets=targets,
        longest=longest,
        tried=tuple(tried),
        absent=tuple(absent),
        choice=choose(),
        max_drop=max_drop,
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


def conditions_of(profile: DeviceProfile, longest: int) -> Shape:
    """The profile's shape; its length cut to the longest input, as an agent does when it checks the budget."""
    budgets = profile.budgets
    return budgets.latency_batch, min(budgets.latency_length, longest), profile.threads.intra_op


def _fits(
    rung: Structure, shape: Sizes, whole: Tried, common: Common, profile: DeviceProfile, longest: int, on_target: bool
) -> bool:
    """Whether a smaller network may keep the profile's budgets, as far as arithmetic and the whole one's time tell."""
    budgets = profile.budgets
    size = shape.size_bytes(rung, whole.made.plan.precision) + common.whole.tokenizer_bytes + DOCUMENTS_BYTES
    if budgets.bundle_size_bytes is not None and size > budgets.bundle_size_bytes:
        return False
    timing = whole.measured.timing(*conditions_of(profile, longest)) if on_target else None
    if timing is None or budgets.latency_p95_s is None:
        return True
    return timing.p95 * shape.products(rung) / shape.products(shape.whole) <= budgets.latency_p95_s


def _figures(tried: Tried, profile: DeviceProfile, longest: int, *, on_target: bool) -> Figures:
    timing = tried.measured.timing(*conditions_of(profile, longest)) if on_target else None
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
        broken=tried.broken,
    )


def _as_brought(figures: Figures, target: Target | None) -> Figures:
    """The figures with those of the device, or with none where others were measured there and this one wasn't."""
    return replace(
        figures,
        brought=target is not None,
        latency_p50_s=target.p50 if target else None,
        latency_p95_s=target.p95 if target else None,
        speedup=target.speedup if target else None,
        rss_bytes=target.rss_bytes if target else None,
    )


def _candidate(tried: Tried, contest: Contest) -> Candidate:
    name, found = tried.made.name, tried.quality
    timing = tried.measured.timing(*ONE_THREAD[0])
    drop = found.drop
    return Candidate(
        name=name,
        precision=tried.made.plan.precision,
        chosen=name == contest.choice.chosen,
        eligible=name in contest.choice.eligible,
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
        kept_float=tried.made.built.kept_float,
        tuning=tried.made.built.tuning,
        not_measured=found.reason,
        target=contest.targets.get(name),
        class_drops=tried.class_drops,
        structure=tried.variant.structure,
        recovery=_recovery(tried.variant),
    )


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


def _recovery(variant: Variant) -> Training | None:
    if variant.structure is None:
        return None
    tuned = variant.tuned
    return Training(
        epochs=tuned.epochs,
        best_epoch=tuned.best_epoch,
        validation_accuracy=tuned.validation_accuracy,
        training_loss=tuned.training_loss,
    )
