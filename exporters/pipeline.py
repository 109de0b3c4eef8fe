"""The export, top to bottom: source, fine-tune, convert, quantize, verify, select, test, bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
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
from exporters import convert, quantize, ship
from exporters.cache import StageCache
from exporters.contest import Common, Contest, hold, latency_of, report_of, shapes_within
from exporters.data import Data, Labelled, leaks, load_data
from exporters.encode import TOKENIZER
from exporters.evaluate import metrics
from exporters.progress import Progress
from exporters.recipe import ExportRecipe
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

#: Checkpoint with optimizer state, best model, graphs and candidates, as a multiple of the source's weights.
_DISK_FACTOR = 10
_EARLIER = "holds the bundle of an earlier export"


def run(
    recipe: ExportRecipe, profiles: tuple[DeviceProfile, ...], out: Path, *, progress: Progress, cache: Path
) -> ExportReport:
    """See :func:`exporters.export`."""
    started_at = time.monotonic()
    _check_profiles(profiles)
    _check_places(profiles, out)
    store, machine = StageCache(cache), inspect_host()
    stages = Stages(recipe, store, machine, progress)

    progress.stage("source", recipe.model.source)
    data = load_data(recipe)
    source = locate(recipe)
    if recipe.finetune.method == "none":
        data = _in_order(data, own_labels(source, data.labels))
    _check_disk(source, cache)
    tokenizer = stages.tokenizer(source)
    check_vocabulary(source, tokenizer / TOKENIZER)
    identity = stages.identity(source, data.labels, pair=data.pair)
    encoder = stages.encoder(identity, tokenizer)

    tuned_folder, tuned = stages.finetune(source, data, encoder)
    samples = encoder.samples(data.validation.texts)
    converted_folder, parity = stages.convert(tuned_folder, identity, samples, encoder)
    converted = stages.baseline(converted_folder)
    reference = stages.answers(converted, "validation", data.validation, encoder)
    shapes = shapes_within(source.max_length, exhaustive=recipe.search.exhaustive)
    cost = stages.measured(converted, converted, shapes[:1])
    common = Common(
        recipe=recipe,
        data=data,
        encoder=encoder,
        tokenizer_bytes=(tokenizer / TOKENIZER).stat().st_size,
        tuned=tuned_folder,
        converted=converted,
        reference=reference,
        machine=machine,
        shapes=shapes,
    )
    contests = [hold(profile, common, stages) for profile in profiles]
    for contest in contests:
        progress.message(f"{contest.profile.name}: {contest.choice.chosen or 'no candidate is left'}")

    as_fp32 = metrics(reference.argmax(axis=1), np.asarray(data.validation.labels), data.labels)
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
            size_bytes=(converted_folder / convert.RAW).stat().st_size,
            latency_s=latency_of(cost),
            rss_bytes=cost.rss_bytes,
            metrics=as_fp32,
            test=None,
            majority_accuracy=None,
            parity=parity,
        ),
        finetuned=Finetuned(metrics=as_fp32, **msgspec.structs.asdict(tuned)),
        profiles={contest.profile.name: report_of(contest) for contest in contests},
        warnings=warnings_of(recipe, data),
        wall_s=0.0,
        stages={},
    )

    def finish(report: ExportReport) -> ExportReport:
        stage_names = {
            "built": tuple(f"{stage}/{digest}" for stage, digest in store.built),
            "reused": tuple(f"{stage}/{digest}" for stage, digest in store.reused),
        }
        report = msgspec.structs.replace(report, wall_s=time.monotonic() - started_at, stages=stage_names)
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
    test = data.test.read_once()
    trial = ship.try_on_test(test, contests, common, stages)
    report = _with_trial(report, trial, leaks(data.train, test))
    if problem := ship.broken_promise(trial, contests):
        raise refused(problem, report)

    progress.stage("bundle", str(out))
    for done, contest in enumerate(contests, start=1):
        name = contest.profile.name
        bundle = ship.write(contest, trial, common, identity, tokenizer, source.name, out / name)
        report = _with_bundle(report, name, bundle)
        progress.update(done, len(contests), name)
    return finish(report)


def _check_profiles(profiles: Sequence[DeviceProfile]) -> None:
    """Fail before the training, not after it."""
    names = [profile.name for profile in profiles]
    if not names or len(set(names)) != len(names):
        raise UsageError("needs at least one profile, each once", where="export", remedy="Use --profile NAME[,NAME…]")
    for profile in profiles:
        if not quantize.plans_for(profile):
            raise UsageError("has an empty precision_preference", where=f"profile {profile.name}")


def _check_places(profiles: Sequence[DeviceProfile], out: Path) -> None:
    """The same: a bundle must not meet somebody's files at the end of a long run."""
    if out.exists() and not out.is_dir():
        raise UsageError("is not a directory", where=str(out), remedy="Choose another place with --out")
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


def _nothing_left(contests: Sequence[Contest]) -> PromiseBroken | None:
    for contest in contests:
        if contest.choice.chosen is None:
            what = f"no candidate keeps its promises; the nearest: {contest.choice.remedy}"
            where = f"profile {contest.profile.name}"
            broken = contest.choice.broken or "choice"  # there is none where there was no candidate
            return PromiseBroken(broken, what, where=where, remedy="Nothing was shipped; see report.html")
    return None


def _with_trial(report: ExportReport, trial: ship.Trial, leaked: int) -> ExportReport:
    replaced = msgspec.structs.replace
    warnings = report.warnings
    if leaked:
        warnings = (*warnings, f"{leaked} of {trial.rows} test rows have a text that is in the training data as well")

    def tested(profile: ProfileReport) -> ProfileReport:
        def entry(candidate: Candidate) -> Candidate:
            if not candidate.chosen:
                return candidate
            name = candidate.name
            return replaced(candidate, test=trial.winners[name], calibration=trial.calibrations.get(name))

        return replaced(profile, candidates=tuple(entry(candidate) for candidate in profile.candidates))

    baseline = replaced(report.baseline, test=trial.baseline, majority_accuracy=trial.majority_accuracy)
    profiles = {name: tested(profile) for name, profile in report.profiles.items()}
    return replaced(report, baseline=baseline, profiles=profiles, warnings=warnings)


def _with_bundle(report: ExportReport, name: str, bundle: Bundle) -> ExportReport:
    replaced = msgspec.structs.replace
    size = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
    profile = report.profiles[name]
    candidates = tuple(
        replaced(candidate, bundle_size_bytes=size) if candidate.chosen else candidate
        for candidate in profile.candidates
    )
    shipped = replaced(profile, bundle=name, bundle_id=bundle.bundle_id, candidates=candidates)
    return replaced(report, profiles={**report.profiles, name: shipped})
