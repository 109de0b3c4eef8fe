"""The export, top to bottom: source, fine-tune, convert, quantize, verify, select, test, bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from aios_edge.bundle.layout import is_bundle
from aios_edge.bundle.read import Bundle
from aios_edge.bundle.write import check_replaceable
from aios_edge.errors import PromiseBroken, ResourceError, UsageError
from aios_edge.host import inspect_host
from aios_edge.profile import DeviceProfile
from exporters import convert, doubts, measuring, memory, ship, steps
from exporters.brought import read_measurements
from exporters.cache import StageCache
from exporters.contest import Contest, hold, latency_of, report_of, shapes_within
from exporters.data import Data, Labelled, leaks, load_data, training_leaks
from exporters.encode import TOKENIZER
from exporters.evaluate import metrics
from exporters.label_order import broken_order
from exporters.measure import Measured
from exporters.plans import plans_for
from exporters.progress import Progress
from exporters.recipe import ExportRecipe
from exporters.rehearse import rehearse
from exporters.report import (
    REPORT_SCHEMA,
    Baseline,
    Candidate,
    ExportReport,
    Finetuned,
    NothingShipped,
    ProfileReport,
    write_report,
)
from exporters.source import Source, check_vocabulary, locate, own_labels
from exporters.stages import Stages, tool_versions
from exporters.tokenizer_fit import check_coverage, check_special_tokens, coverage
from exporters.trials import Common
from exporters.variants import Variants, plan_pruning
from exporters.verify import check_same_accuracy

#: Checkpoint with optimizer state, best model, graphs and candidates, as a multiple of the source's weights.
_DISK_FACTOR = 10
_EARLIER = "holds the bundle of an earlier export"


def run(
    recipe: ExportRecipe,
    profiles: tuple[DeviceProfile, ...],
    out: Path,
    *,
    progress: Progress,
    cache: Path,
    measured: Sequence[Path] = (),
    candidates: bool = False,
) -> ExportReport:
    """See :func:`exporters.export`."""
    started_at = time.monotonic()
    _check_profiles(profiles)
    _check_places(profiles, out)
    if candidates:
        measuring.check_measuring_places(profiles, out, recipe.search)
    brought = read_measurements(measured, profiles)
    store, machine = StageCache(cache, say=progress.message), inspect_host()
    stages = Stages(recipe, store, machine, progress)

    progress.stage("source", recipe.model.source)
    data = load_data(recipe)
    source = locate(recipe)
    if recipe.finetune.method == "none":
        data = _in_order(data, own_labels(source, data.labels))
    _check_disk(source, cache)
    tokenizer = stages.tokenizer(source)
    check_vocabulary(source, tokenizer / TOKENIZER)
    check_special_tokens(source, tokenizer / TOKENIZER)
    prunings = plan_pruning(recipe, source, data, (tokenizer / TOKENIZER).read_bytes(), profiles)
    if candidates:
        measuring.check_pruned_places(prunings, out)
    identity = stages.identity(source, data.labels, pair=data.pair)
    encoder = stages.encoder(identity, tokenizer)
    known = coverage(encoder.samples(data.validation.texts), tokenizer / TOKENIZER)
    check_coverage(known, source)
    plans = [plan for profile in profiles for plan in plans_for(profile, recipe.search)]
    warnings = [*warnings_of(recipe, data), *doubts.of_data(data, plans, known)]
    warnings += [*doubts.of_search(recipe.search, profiles), *doubts.of_pruning(prunings)]
    _warn(warnings, progress)

    tuned_folder, tuned = stages.finetune(source, data, encoder)
    variants = Variants(stages, data, identity, tokenizer, tuned_folder)
    whole = variants.whole
    answer, truth = whole.reference.argmax(axis=1), np.asarray(data.validation.labels)
    as_fp32 = metrics(answer, truth, data.labels)
    check_same_accuracy(tuned.validation_accuracy, as_fp32.accuracy, len(data.validation))
    if problem := broken_order(answer, truth, data.labels, where="validation rows"):
        raise problem
    found = doubts.of_answers("validation", answer, data.validation, data)
    _warn(found, progress)
    warnings += found

    shapes = shapes_within(source.max_length, exhaustive=recipe.search.exhaustive)
    cost = stages.measured(whole.fp32, whole.fp32, shapes[:1])
    common = Common(
        recipe=recipe,
        data=data,
        variants=variants,
        machine=machine,
        shapes=shapes,
        prunings=prunings,
        brought=brought,
        for_measuring=candidates,
    )
    contests = [hold(profile, common, stages) for profile in profiles]
    for contest in contests:
        progress.message(f"{contest.profile.name}: {contest.choice.chosen or 'no candidate is left'}")

    report = ExportReport(
        schema=REPORT_SCHEMA,
        name=identity.name,
        version=identity.version,
        recipe=recipe.document(),
        source=source.name,
        data=data.origin,
        labels=data.labels,
        tools=tool_versions(),
        baseline=Baseline(
            size_bytes=steps.size_bytes(whole.fp32.folder / convert.RAW),
            latency_s=latency_of(cost),
            rss_bytes=cost.rss_bytes,
            metrics=as_fp32,
            test=None,
            majority_accuracy=None,
            parity=whole.parity,
        ),
        finetuned=Finetuned(metrics=as_fp32, **msgspec.structs.asdict(tuned)),
        profiles={contest.profile.name: report_of(contest) for contest in contests},
        warnings=tuple(warnings),
        wall_s=0.0,
        stages={},
    )

    def finish(report: ExportReport) -> ExportReport:
        stage_names = {
            "built": tuple(f"{stage}/{digest}" for stage, digest in store.built),
            "reused": tuple(f"{stage}/{digest}" for stage, digest in store.reused),
        }
        report = msgspec.structs.replace(
            report,
            warnings=(*report.warnings, *store.damaged),
            wall_s=time.monotonic() - started_at,
            stages=stage_names,
            peak_rss_bytes=memory.peak_rss_bytes() + _weighing_bytes(contests, cost),
        )
        write_report(report, out)
        return report

    def refused(problem: PromiseBroken, report: ExportReport) -> NothingShipped:
        old = [profile.name for profile in profiles if is_bundle(out / profile.name)]
        shown = tuple(f"{out.absolute().name}/{name} {_EARLIER}" for name in old)  # no path of this machine
        report = msgspec.structs.replace(report, error=str(problem), warnings=(*report.warnings, *shown))
        remedy = ". ".join(filter(None, [problem.remedy, *(f"{out / name} {_EARLIER}" for name in old)]))
        return NothingShipped(problem, finish(report), remedy=remedy)

    if problem := _nothing_left(contests):
        raise refused(problem, report)

    progress.stage("test", "the held-out rows, read once, for the chosen candidates")
    data.test.release()
    test = data.test.read_once()
    trial = ship.try_on_test(test, contests, common, stages)
    found = _shared(data, test) + doubts.of_answers("test", trial.answer, test, data)
    _warn(found, progress)
    report = _with_trial(report, trial, found)
    exchanged = broken_order(trial.answer, test.labels, data.labels, where="test rows")
    if problem := exchanged or ship.broken_promise(trial, contests):
        raise refused(problem, report)

    progress.stage("bundle", str(out))
    try:
        rehearse(contests, common, stages)
    except PromiseBroken as problem:
        raise refused(problem, report) from problem
    making = ship.Making(common=common, source=source, tuned=tuned)
    for done, contest in enumerate(contests, start=1):
        name = contest.profile.name
        bundle = ship.write(contest, trial, making, out / name)
        folders = measuring.write_for_measuring(contest, making, out) if candidates else {}
        report = _with_bundle(report, name, bundle, folders)
        progress.update(done, len(contests), name)
    return finish(report)


def _check_profiles(profiles: Sequence[DeviceProfile]) -> None:
    """Fail before the training, not after it."""
    names = [profile.name for profile in profiles]
    if not names or len(set(names)) != len(names):
        raise UsageError("needs at least one profile, each once", where="export", remedy="Use --profile NAME[,NAME…]")
    for profile in profiles:
        if not plans_for(profile):
            raise UsageError("has an empty precision_preference", where=f"profile {profile.name}")


def _check_places(profiles: Sequence[DeviceProfile], out: Path) -> None:
    """The same: a bundle must not meet somebody's files at the end of a long run."""
    for profile in profiles:
        check_replaceable(out.absolute() / profile.name)


def _check_disk(source: Source, cache: Path) -> None:
    weights = sum(path.stat().st_size for path in source.folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    cache.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(cache).free, weights * _DISK_FACTOR
    if free < needed:
        what = f"has {free / 1e6:.0f} MB free, an export of this model needs about {needed / 1e6:.0f} MB"
        raise ResourceError(what, where=str(cache), remedy="Free some space, or choose another place with --cache")


def _in_order(data: Data, labels: tuple[str, ...]) -> Data:
    """The same data with its label numbers in the order of the model's outputs."""
    number = [labels.index(label) for label in data.labels]

    def renumber(part: Labelled) -> Labelled:
        return Labelled(texts=part.texts, labels=tuple(number[index] for index in part.labels))

    return replace(
        data,
        labels=labels,
        train=renumber(data.train),
        validation=renumber(data.validation),
        test=data.test.then(renumber),
    )


def warnings_of(recipe: ExportRecipe, data: Data) -> tuple[str, ...]:
    """What a person should know of the data, though the export goes on."""
    found = [f"{data.dropped} empty rows were dropped"] if data.dropped else []
    if recipe.data.validation is None and len(data.train) < len(data.validation):
        held_out, left = len(data.validation), len(data.train)
        found.append(f"{held_out} rows were held out for golden samples, which leaves {left} to train on")
    return tuple(found)


def _warn(found: Sequence[str], progress: Progress) -> None:
    """Say it when it is found, not after an hour."""
    for text in found:
        progress.message(f"warning: {text}")


def _nothing_left(contests: Sequence[Contest]) -> PromiseBroken | None:
    for contest in contests:
        if contest.choice.chosen is None:
            what = f"no candidate keeps its promises; the nearest: {contest.choice.remedy}"
            where = f"profile {contest.profile.name}"
            broken = contest.choice.broken or "choice"  # there is none where there was no candidate
            return PromiseBroken(broken, what, where=where, remedy="Nothing was shipped; see report.html")
    return None


def _shared(data: Data, test: Labelled) -> tuple[str, ...]:
    """Rows that were no news when they were tested on."""
    found = {"training": training_leaks(data, test), "validation": leaks(data.validation, test)}
    return tuple(
        f"{count} of {len(test)} test rows have a text that is in the {name} data as well"
        for name, count in found.items()
        if count
    )


def _weighing_bytes(contests: Sequence[Contest], cost: Measured) -> int:
    """The most that a process beside this one held: each weighs one model, one at a time."""
    weighed = [cost, *(tried.measured for contest in contests for tried in contest.tried)]
    return max(measured.peak_rss_bytes or 0 for measured in weighed)


def _with_trial(report: ExportReport, trial: ship.Trial, more: tuple[str, ...]) -> ExportReport:
    replaced = msgspec.structs.replace

    def tested(profile_name: str, profile: ProfileReport) -> ProfileReport:
        def entry(candidate: Candidate) -> Candidate:
            if not candidate.chosen:
                return candidate
            name = candidate.name
            return replaced(
                candidate,
                test=trial.winners[name],
                calibration=trial.calibrations.get(name),
                confusion=trial.confusions.get(name),
                class_drops=trial.class_drops[profile_name],
            )

        return replaced(profile, candidates=tuple(entry(candidate) for candidate in profile.candidates))

    baseline = replaced(report.baseline, test=trial.baseline, majority_accuracy=trial.majority_accuracy)
    profiles = {name: tested(name, profile) for name, profile in report.profiles.items()}
    return replaced(report, baseline=baseline, profiles=profiles, warnings=(*report.warnings, *more))


def _with_bundle(report: ExportReport, name: str, bundle: Bundle, folders: Mapping[str, str]) -> ExportReport:
    replaced = msgspec.structs.replace
    size = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
    profile = report.profiles[name]
    candidates = tuple(
        replaced(
            candidate,
            bundle_size_bytes=size if candidate.chosen else candidate.bundle_size_bytes,
            measuring_bundle=folders.get(candidate.name),
        )
        for candidate in profile.candidates
    )
    shipped = replaced(profile, bundle=name, bundle_id=bundle.bundle_id, candidates=candidates)
    return replaced(report, profiles={**report.profiles, name: shipped})
