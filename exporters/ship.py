"""After the choice: the test split is read, the promise is kept or nothing ships, and bundles are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.bundle.write import write_bundle
from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.errors import PromiseBroken
from aios_edge.manifest import Measured, Provenance, Purpose
from exporters import graph, tensorrt
from exporters.bundle import UNMEASURED_BATCH, UNMEASURED_BATCH_CPU, contract_of, manifest_of
from exporters.calibration import Calibration, calibrate
from exporters.class_drop import ClassDrop, class_drops, class_misses
from exporters.confusion import Confusion, confusion
from exporters.contest import Contest
from exporters.data import Labelled
from exporters.encode import TOKENIZER, length_of
from exporters.evaluate import Metrics, Quality, check_reference, metrics, quality
from exporters.facts import Facts, documents, splits_of
from exporters.finetune import Tuned
from exporters.golden_samples import judge, margins_of, pick, record
from exporters.plans import on_cpu
from exporters.select import apart
from exporters.source import Source
from exporters.stages import Stages, tool_versions
from exporters.target import observed_of, session_of
from exporters.trials import Common, Tried


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the test split said: the baseline's answers [rows] and metrics, each winner's quality, calibration and
    confusion by candidate name (the latter two only of finite outputs), and by profile the classes in which its winner
    changed."""

    rows: int
    digest: str
    answer: NDArray[Any]
    baseline: Metrics
    majority_accuracy: float
    winners: Mapping[str, Quality]
    calibrations: Mapping[str, Calibration]
    confusions: Mapping[str, Confusion]
    class_drops: Mapping[str, tuple[ClassDrop, ...]]


def try_on_test(test: Labelled, contests: Sequence[Contest], common: Common, stages: Stages) -> Trial:
    """Winners and baselines on the held-out rows; candidates that lost never meet them."""
    labels = common.data.labels
    reference = stages.answers(common.whole.fp32, "test", test, common.whole.encoder)
    check_reference(reference, len(test), len(labels))
    truth = np.asarray(test.labels)
    majority = int(np.bincount(np.asarray(common.data.train.labels)).argmax())
    winners: dict[str, Quality] = {}
    calibrations: dict[str, Calibration] = {}
    confusions: dict[str, Confusion] = {}
    drops: dict[str, tuple[ClassDrop, ...]] = {}
    for contest in contests:
        winner, name = contest.winner, contest.winner.made.name
        logits = stages.answers(winner.made, "test", test, winner.variant.encoder)
        if name not in winners:
            winners[name] = quality("test", logits, reference, test.labels, labels)
            if winners[name].metrics is not None:
                calibrations[name] = calibrate(winner.logits, common.data.validation.labels, logits, test.labels)
                confusions[name] = confusion("test", logits, reference, test.labels, labels)
        drops[contest.profile.name] = class_drops(logits, reference, test.labels, labels, max_drop=contest.max_drop)
    return Trial(
        rows=len(test),
        digest=test.digest(),
        answer=reference.argmax(axis=1),
        baseline=metrics(reference.argmax(axis=1), truth, labels),
        majority_accuracy=float(np.mean(truth == majority)),
        winners=winners,
        calibrations=calibrations,
        confusions=confusions,
        class_drops=drops,
    )


def broken_promise(trial: Trial, contests: Sequence[Contest]) -> PromiseBroken | None:
    """The first profile whose winner loses too much on the test split, as the error to raise."""
    for contest in contests:
        name = contest.winner.made.name
        found = trial.winners[name]
        where = f"profile {contest.profile.name}"
        if found.drop is None:
            return PromiseBroken(
                "accuracy_drop", f"{name} has no accuracy on the test split ({found.reason})", where=where
            )
        if found.drop.value > contest.max_drop + 1e-12:
            lost, allowed = apart(found.drop.value, contest.max_drop, digits=4)
            what = f"{name} loses {lost} on the test split, {allowed} are allowed"
            remedy = "Nothing was shipped. Allow a larger max_drop or prefer another precision in the profile"
            return PromiseBroken("accuracy_drop", what, where=where, remedy=remedy)
        for miss in class_misses(trial.class_drops[contest.profile.name], max_drop=contest.max_drop):
            what, remedy = f"{name} {miss.reason} on the test split", f"Nothing was shipped; {miss.remedy}"
            return PromiseBroken(miss.promise, what, where=where, remedy=remedy)
    return None


def batch_size(precision: str, *, useful: int | None, on_cpu: bool) -> int:
    """How many requests a device may run together; ``useful`` is what was measured on the target, or None. Pure."""
    if precision.startswith("dynamic"):
        return 1  # its scales come from the whole batch: an answer would depend on who else asked
    if useful is not None:
        return useful
    return UNMEASURED_BATCH_CPU if on_cpu else UNMEASURED_BATCH


@dataclass(frozen=True, kw_only=True)
class Making:
    """What all bundles of one export are made of."""

    common: Common
    source: Source
    tuned: Tuned


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a bundle's accuracy rests on. ``trial``: the test split's, where that was read for it."""

    quality: Quality
    rows: int
    split: str
    temperature: float
    trial: Trial | None = None


def write(contest: Contest, trial: Trial, making: Making, target: Path) -> Bundle:
    """Write one profile's bundle; whole or not at all."""
    name = contest.winner.made.name
    seen = Seen(
        quality=trial.winners[name],
        rows=trial.rows,
        split="test",
        temperature=trial.calibrations[name].temperature,
        trial=trial,
    )
    return assemble(contest.winner, contest, making, seen, target, purpose="serve")


def assemble(tried: Tried, contest: Contest, making: Making, seen: Seen, target: Path, *, purpose: Purpose) -> Bundle:
    """Write a candidate's bundle. One that is made to be measured carries nothing that was measured here or there."""
    common, variant, found, profile = making.common, tried.variant, seen.quality, contest.profile
    assert found.metrics is not None and found.drop is not None and found.agreement is not None  # the caller's check
    precision, serves = tried.made.plan.precision, purpose == "serve"
    figures = Measured(
        accuracy=found.metrics.accuracy,
        accuracy_drop=found.drop.value,
        agreement=found.agreement,
        size_bytes=tried.size_bytes,
    )
    held_out = common.data.validation
    samples = variant.encoder.samples(held_out.texts)
    rows = pick(held_out, [length_of(sample) for sample in samples], margins_of(tried.logits))
    golden = record(rows, held_out, samples, variant.reference, tried.logits, variant.encoder)
    largest = batch_size(
        precision,
        useful=tried.measured.max_batch_size if contest.on_target else None,
        on_cpu=on_cpu(profile),
    )
    manifest = manifest_of(
        variant.identity,
        profile=profile.name,
        precision=precision,
        session=session_of(tried, contest) if serves else tried.made.built.session,
        max_batch_size=largest,
        provenance=Provenance(
            source=making.source.name,
            candidate=tried.made.name,
            recipe_sha256=sha256_bytes(canonical_json(common.recipe.document())),
            data=common.data.origin,
            finetune=common.recipe.finetune.method,
            tools=tool_versions(),
        ),
        measured=figures,
        temperature=seen.temperature,
        purpose=purpose,
        provider_options=tensorrt.provider_options(
            profile,
            precision,
            variant.identity.inputs,
            max_batch_size=largest,
            max_length=variant.identity.text.max_length,
        ),
    )
    contract = contract_of(
        profile,
        figures,
        judge(golden, precision),
        rows=seen.rows,
        host=contest.host.host,
        observed=observed_of(tried, contest) if serves else {},
        split=seen.split,
    )
    files: dict[str, Path | bytes] = {
        TOKENIZER: variant.tokenizer / TOKENIZER,
        **graph.model_files(tried.made.folder),
    }
    if (trial := seen.trial) is not None:
        facts = Facts(
            manifest=manifest,
            contract=contract,
            recipe=common.recipe,
            source=making.source,
            tuned=making.tuned,
            structure=variant.structure,
            recovered=variant.tuned,
            recovery=variant.recovery,
            rare_row_bits=tried.made.built.rare_row_bits,
            splits=splits_of(common.recipe, common.data, test_rows=trial.rows, test_digest=trial.digest),
            quality=found,
            class_drops=trial.class_drops[profile.name],
            calibration=trial.calibrations[tried.made.name],
            baseline=trial.baseline,
            majority_accuracy=trial.majority_accuracy,
        )
        files |= documents(facts, files)
    return write_bundle(target, manifest, contract, files, golden)
