"""One profile's candidates, each built, verified and measured: those of the whole network, then of smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aios_edge.contract import BUNDLE_SIZE, LATENCY_P95, MEMORY
from aios_edge.errors import DataError
from aios_edge.host import Host as Machine
from aios_edge.profile import DeviceProfile, Threads
from exporters import graph, tuned_static
from exporters.brought import Brought, assign, targets_of
from exporters.budget_fit import Whole, is_fast, is_light, with_room
from exporters.bundle import DOCUMENTS_BYTES
from exporters.class_drop import ClassDrop, class_drops, class_misses
from exporters.data import Data
from exporters.evaluate import Logits, Quality, quality
from exporters.measure import Measured, Timing
from exporters.output_range import output_misses
from exporters.plans import STATIC, Plan, by_precision, of_pruned, on_cpu, plans_for
from exporters.quantize import CALIBRATION_SAMPLES, check_calibration
from exporters.recipe import ExportRecipe
from exporters.report import Target
from exporters.select import SPEEDUP, Choice, Figures, Miss, misses, select
from exporters.stages import Made, Stages
from exporters.structure import Outcome, Structure, following
from exporters.tuned_static import Absent
from exporters.variants import Pruning, Variant, Variants

TimedAt = tuple[int, int, int]  # batch, length, threads

#: Promises that a narrower network keeps sooner; all others a wider one does.
_COSTS = frozenset({BUNDLE_SIZE, LATENCY_P95, MEMORY, SPEEDUP})


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all profiles of one export share.

    ``shapes``: what every candidate is timed at. By profile: ``prunings``, the smaller networks it may get, and
    ``brought``, what was measured on its devices. ``for_measuring``: all candidates are given out as bundles.
    """

    recipe: ExportRecipe
    data: Data
    variants: Variants
    machine: Machine
    shapes: tuple[TimedAt, ...]
    prunings: Mapping[str, Pruning] = field(default_factory=dict)
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
class Unquantized:
    """A pruned network in fp32, before candidates were made of it. ``whole``: what it was pruned from."""

    whole: Structure
    quality: Quality
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate with all that was found out on validation. ``before``: its network as it was pruned and recovered;
    None for the whole one, whose fp32 is the baseline."""

    variant: Variant
    made: Made
    logits: Logits
    quality: Quality
    class_drops: tuple[ClassDrop, ...]
    broken: tuple[Miss, ...]
    measured: Measured
    size_bytes: int
    bundle_size_bytes: int
    before: Unquantized | None = None


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A candidate that came out as the same model as another one, ``of``, and so has its figures."""

    made: Made
    of: Tried


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a profile's candidates are held to. ``on_target``: this machine's own figures count for the profile;
    ``brought``: a device's figures, which count instead; ``longest``: tokens of the longest input; ``shapes``: what is
    timed."""

    profile: DeviceProfile
    max_drop: float
    on_target: bool
    brought: tuple[Brought, ...]
    longest: int
    shapes: tuple[TimedAt, ...]


class Trials:
    """Tries one profile's candidates. ``tried`` is in the order of preference; ``absent`` couldn't be built here;
    ``twins`` are no models of their own."""

    def __init__(self, terms: Terms, common: Common, stages: Stages) -> None:
        self._terms, self._common, self._stages = terms, common, stages
        self.tried: list[Tried] = []
        self.absent: list[Absent] = []
        self.twins: list[Twin] = []
        self._too_few: DataError | None = None
        self._plans = self._calibrated(plans_for(terms.profile, common.recipe.search))

    def run(self) -> None:
        """All candidates that may win, or all there are where the recipe or the caller wants to see them.

        Raises :class:`DataError` where calibration texts are too few for all that can be built here.
        """
        self._try_whole()
        if self._too_few is not None and not self.tried:
            raise self._too_few
        profile = self._terms.profile
        # The profile's own precisions only: pruned candidates come first, and a wish is never preferred.
        plans = of_pruned([plan for plan in plans_for(profile) if plan in self._plans])
        pruning = self._common.prunings.get(profile.name)
        if pruning is not None and plans:
            self._try_smaller(pruning, plans)

    def choose(self, targets: Mapping[str, Target]) -> Choice:
        """Among those tried so far; ``targets``: by candidate, what was measured on a device."""
        if self.absent and not self.tried:
            told = "; ".join(f"{absent.plan.name} is {absent.reason}" for absent in self.absent)
            return Choice(chosen=None, reasons={}, remedy=f"{told}; or prefer another precision too")
        figures = [self._figures(tried) for tried in self.tried]
        if targets:
            figures = [_as_brought(f, targets.get(f.name)) for f in figures]
        terms = self._terms
        on_target = terms.on_target or bool(targets)
        return select(figures, terms.profile.budgets, max_drop=terms.max_drop, on_target=on_target)

    def _calibrated(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        """Those that there are texts enough for; the others are absent."""
        texts, kept = self._common.data.train.spread(CALIBRATION_SAMPLES), []
        for plan in plans:
            try:
                check_calibration(plan, self._common.whole.encoder.samples(texts) if plan.fixes_ranges else ())
                kept.append(plan)
            except DataError as error:
                self._too_few = error
                self.absent.append(Absent(plan=plan, reason=f"could not be built: {error}"))
        return tuple(kept)

    @property
    def _preference_decides(self) -> bool:
        """Whether nothing can win that comes after a candidate which keeps its promises."""
        return not self._terms.on_target and not self._terms.brought and not self._common.all_candidates

    def _try_whole(self) -> None:
        terms, common = self._terms, self._common
        for plan in self._plans:
            if self.tried and self._preference_decides and self.choose({}).chosen:
                break  # the rest comes after the one that keeps its promises
            if plan.precision != STATIC:
                self.tried.append(self._try(common.whole, self._made(common.whole, plan)))
                continue
            made = tuned_static.make(plan, common.whole, common.data, self._stages, max_drop=terms.max_drop)
            if isinstance(made, Absent):
                self.absent.append(made)
            elif (same := next((tried for tried in self.tried if tried.made.folder == made.folder), None)) is not None:
                self.twins.append(Twin(made=made, of=same))
            else:
                self.tried.append(self._try(common.whole, made))

    def _try_smaller(self, pruning: Pruning, plans: tuple[Plan, ...]) -> None:
        """Pruned networks, one after the other, each in the precisions of ``plans`` that the budgets have room for."""
        common, budgets, whole = self._common, self._terms.profile.budgets, list(self.tried)
        shape, rungs = pruning.shape, pruning.rungs
        pruned: dict[Structure, list[Tried]] = {}
        outcomes: dict[Structure, Outcome] = {}
        rooms = {rung: with_room(rung, plans, shape, budgets) for rung in rungs}
        # Of the same precision: another one's latency, of neural-compressor's say, tells little.
        twin = next((tried for tried in whole if tried.made.plan.precision == plans[0].precision), whole[0])
        known = self._known_of(twin)
        fits = [
            is_fast(rung, shape, budgets, known) and any(is_light(rung, p, shape, budgets, known) for p in rooms[rung])
            for rung in rungs
        ]
        measured = [rung for rung in rungs if self._was_measured(rung)]
        most = max(common.recipe.search.structures, len(measured))
        while len(outcomes) < most:
            # Who gave them out may have gone another way, by latencies of its own.
            waiting = (rung for rung in measured if rung not in outcomes)
            if (rung := next(waiting, None) or following(rungs, outcomes, fits)) is None:
                break
            variant = common.variants.pruned(rung, pruning)
            tried, outcomes[rung] = self._try_precisions(variant, plans, rooms[rung])
            before = self._before(variant, shape.whole)
            pruned[rung] = [replace(each, before=before) for each in tried]
            # Who asks for pruning prefers the narrower of those that keep their promises.
            narrowest = sorted(pruned, key=shape.products)
            self.tried = [each for rung in narrowest for each in pruned[rung]] + whole

    def _try_precisions(
        self, variant: Variant, plans: tuple[Plan, ...], room: tuple[Plan, ...]
    ) -> tuple[list[Tried], Outcome]:
        """One network in each precision that there is ``room`` for, or the first; what came of the first that kept its
        promises, or of the first."""
        tried, outcomes = list[Tried](), list[Outcome]()
        groups = by_precision(plans)
        for alike in [group for group in groups if set(group) & set(room)] or groups[:1]:
            if self._preference_decides and any(outcome.kept for outcome in outcomes):
                break
            first = next((number for number, plan in enumerate(alike) if plan in room), len(alike) - 1)
            found, outcome = self._try_sizes(variant, alike[first:])
            tried += found
            outcomes.append(outcome)
        if self._common.for_measuring or self._terms.brought:  # what was given out may be what was measured
            done = [each.made.plan for each in tried]
            tried += [self._try(variant, self._made(variant, plan)) for plan in plans if plan not in done]
        return tried, next((outcome for outcome in outcomes if outcome.kept), outcomes[0])

    def _try_sizes(self, variant: Variant, plans: tuple[Plan, ...]) -> tuple[list[Tried], Outcome]:
        """One network as the first of ``plans``, and while that is too large, which an estimate may not have foreseen,
        as the next; what came of the last."""
        terms, found, broken = self._terms, list[Tried](), set[str]()
        for plan in plans:
            found.append(self._try(variant, self._made(variant, plan)))
            target = self._target(found[-1])
            figures, on_target = self._figures(found[-1]), terms.on_target or target is not None
            if target is not None:
                figures = _as_brought(figures, target)
            missed = misses(figures, terms.profile.budgets, max_drop=terms.max_drop, on_target=on_target)
            broken = {miss.promise for miss in missed}
            if BUNDLE_SIZE not in broken:
                break
        return found, Outcome(costly=bool(broken & _COSTS), inaccurate=bool(broken - _COSTS))

    def _made(self, variant: Variant, plan: Plan) -> Made:
        name, converted = variant.candidate(plan.name), variant.fp32.folder
        return self._stages.candidate(name, plan, converted, self._common.data, variant.encoder)

    def _try(self, variant: Variant, made: Made) -> Tried:
        terms, common, stages = self._terms, self._common, self._stages
        rows, labels, reference = common.data.validation, common.data.labels, common.whole.reference
        logits = stages.answers(made, "validation", rows, variant.encoder)
        drops = class_drops(logits, reference, rows.labels, labels, max_drop=terms.max_drop)
        broken = class_misses(drops, max_drop=terms.max_drop) + output_misses(logits, variant.reference, labels)
        threads = terms.profile.threads if terms.on_target else Threads()
        size = graph.size_bytes(made.folder)
        return Tried(
            variant=variant,
            made=made,
            logits=logits,
            quality=quality("validation", logits, reference, rows.labels, labels),
            class_drops=drops,
            broken=broken,
            measured=stages.measured(made, common.whole.fp32, terms.shapes, threads),
            size_bytes=size,
            bundle_size_bytes=size + variant.tokenizer_bytes + DOCUMENTS_BYTES,
        )

    def _before(self, variant: Variant, whole: Structure) -> Unquantized:
        """What pruning alone bought; it decides nothing, so one shape is timed."""
        data, baseline = self._common.data, self._common.whole
        labels = data.validation.labels
        return Unquantized(
            whole=whole,
            quality=quality("validation", variant.reference, baseline.reference, labels, data.labels),
            measured=self._stages.measured(variant.fp32, baseline.fp32, self._common.shapes[:1]),
        )

    def _was_measured(self, rung: Structure) -> bool:
        return any(each.found.candidate.startswith(rung.candidate("")) for each in self._terms.brought)

    def _target(self, tried: Tried) -> Target | None:
        """What a device's measurement says of a candidate, where there is one."""
        terms = self._terms
        compared = [each.made for each in self.tried if each.made.name == "fp32" and each is not tried]
        candidates = [*compared, tried.made]
        names = {made.name for made in candidates}
        brought = [each for each in terms.brought if each.found.candidate in names]
        shape = conditions_of(terms.profile, terms.longest)[:2]
        return targets_of(assign(brought, candidates, terms.profile, shape), candidates).get(tried.made.name)

    def _known_of(self, tried: Tried) -> Whole:
        """What tells how a smaller network would do on the profile's devices: their own figures, or this machine's
        latency where it is one of them, and its memory where the model runs on the CPU."""
        target, timing = self._target(tried), self._timing(tried)
        rss = tried.measured.rss_bytes if on_cpu(self._terms.profile) else None
        return Whole(
            size_bytes=tried.size_bytes,
            p95_s=target.p95 if target else timing.p95 if timing else None,
            rss_bytes=target.rss_bytes if target else rss,
        )

    def _timing(self, tried: Tried) -> Timing | None:
        """At the profile's conditions, where this machine's figures count."""
        terms = self._terms
        return tried.measured.timing(*conditions_of(terms.profile, terms.longest)) if terms.on_target else None

    def _figures(self, tried: Tried) -> Figures:
        timing = self._timing(tried)
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
            rss_bytes=tried.measured.rss_bytes if self._terms.on_target else None,
            broken=tried.broken,
        )


def conditions_of(profile: DeviceProfile, longest: int) -> TimedAt:
    """The profile's shape; its length cut to the longest input, as an agent does when it checks the budget."""
    budgets = profile.budgets
    return budgets.latency_batch, min(budgets.latency_length, longest), profile.threads.intra_op


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
