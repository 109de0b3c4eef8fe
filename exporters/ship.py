"""After the choice: the test split is read, the promise is kept or nothing ships, and bundles are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aios_edge.bundle.read import Bundle
from aios_edge.bundle.write import write_bundle
from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.errors import PromiseBroken
from aios_edge.manifest import Measured, Provenance, Purpose
from exporters import graph, tensorrt
from exporters.bundle import UNMEASURED_BATCH, UNMEASURED_BATCH_CPU, contract_of, manifest_of
from exporters.calibration import Calibration, calibrate
from exporters.contest import Common, Contest, Tried
from exporters.data import Labelled
from exporters.encode import TOKENIZER, length_of
from exporters.evaluate import Metrics, Quality, metrics, quality
from exporters.golden_samples import CPU, judge, margins_of, pick, record
from exporters.select import apart
from exporters.stages import Stages, tool_versions
from exporters.target import observed_of, session_of


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the test split said: the baseline's metrics, and each winner's quality and calibration by candidate name
    (no calibration for outputs that are not finite)."""

    rows: int
    baseline: Metrics
    majority_accuracy: float
    winners: Mapping[str, Quality]
    calibrations: Mapping[str, Calibration]


def try_on_test(test: Labelled, contests: Sequence[Contest], common: Common, stages: Stages) -> Trial:
    """Winners and baselines on the held-out rows; candidates that lost never meet them."""
    labels = common.data.labels
    reference = stages.answers(common.whole.fp32, "test", test, common.whole.encoder)
    truth = np.asarray(test.labels)
    majority = int(np.bincount(np.asarray(common.data.train.labels)).argmax())
    winners: dict[str, Quality] = {}
    calibrations: dict[str, Calibration] = {}
    for winner in (contest.winner for contest in contests):
        name = winner.made.name
        if name not in winners:
            logits = stages.answers(winner.made, "test", test, winner.variant.encoder)
            winners[name] = quality("test", logits, reference, test.labels, labels)
            if winners[name].metrics is not None:
                calibrations[name] = calibrate(winner.logits, common.data.validation.labels, logits, test.labels)
    return Trial(
        rows=len(test),
        baseline=metrics(reference.argmax(axis=1), truth, labels),
        majority_accuracy=float(np.mean(truth == majority)),
        winners=winners,
        calibrations=calibrations,
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
    source: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a bundle's accuracy rests on."""

    quality: Quality
    rows: int
    split: str
    temperature: float


def write(contest: Contest, trial: Trial, making: Making, target: Path) -> Bundle:
    """Write one profile's bundle; whole or not at all."""
    name = contest.winner.made.name
    seen = Seen(
        quality=trial.winners[name], rows=trial.rows, split="test", temperature=trial.calibrations[name].temperature
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
        on_cpu=bool(profile.providers) and profile.providers[0].name == CPU,
    )
    manifest = manifest_of(
        variant.identity,
        profile=profile.name,
        precision=precision,
        session=session_of(tried, contest) if serves else tried.made.built.session,
        max_batch_size=largest,
        provenance=Provenance(
            source=making.source,
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
    return write_bundle(target, manifest, contract, files, golden)
