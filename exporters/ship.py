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
from aios_edge.manifest import Measured, Provenance
from exporters import graph
from exporters.bundle import UNMEASURED_BATCH, UNMEASURED_BATCH_CPU, Identity, contract_of, manifest_of
from exporters.calibration import Calibration, calibrate
from exporters.contest import Common, Contest
from exporters.data import Labelled
from exporters.encode import TOKENIZER, length_of
from exporters.evaluate import Metrics, Quality, check_reference, metrics, quality
from exporters.golden_samples import CPU, judge, margins_of, pick, record
from exporters.select import apart
from exporters.stages import Stages, tool_versions


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the test split said: the baseline's answers [rows] and metrics, and each winner's quality and calibration by
    candidate name (no calibration for outputs that are not finite)."""

    rows: int
    answer: NDArray[Any]
    baseline: Metrics
    majority_accuracy: float
    winners: Mapping[str, Quality]
    calibrations: Mapping[str, Calibration]


def try_on_test(test: Labelled, contests: Sequence[Contest], common: Common, stages: Stages) -> Trial:
    """Winners and baselines on the held-out rows; candidates that lost never meet them."""
    labels = common.data.labels
    reference = stages.answers(common.converted, "test", test, common.encoder)
    check_reference(reference, len(test), len(labels))
    truth = np.asarray(test.labels)
    majority = int(np.bincount(np.asarray(common.data.train.labels)).argmax())
    winners: dict[str, Quality] = {}
    calibrations: dict[str, Calibration] = {}
    for winner in (contest.winner for contest in contests):
        name = winner.made.plan.name
        if name not in winners:
            logits = stages.answers(winner.made, "test", test, common.encoder)
            winners[name] = quality("test", logits, reference, test.labels, labels)
            if winners[name].metrics is not None:
                calibrations[name] = calibrate(winner.logits, common.data.validation.labels, logits, test.labels)
    return Trial(
        rows=len(test),
        answer=reference.argmax(axis=1),
        baseline=metrics(reference.argmax(axis=1), truth, labels),
        majority_accuracy=float(np.mean(truth == majority)),
        winners=winners,
        calibrations=calibrations,
    )


def broken_promise(trial: Trial, contests: Sequence[Contest]) -> PromiseBroken | None:
    """The first profile whose winner loses too much on the test split, as the error to raise."""
    for contest in contests:
        name = contest.winner.made.plan.name
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


def write(
    contest: Contest, trial: Trial, common: Common, identity: Identity, tokenizer: Path, source: str, target: Path
) -> Bundle:
    """Write one profile's bundle; whole or not at all."""
    winner = contest.winner
    found = trial.winners[winner.made.plan.name]
    assert found.metrics is not None and found.drop is not None and found.agreement is not None  # broken_promise
    figures = Measured(
        accuracy=found.metrics.accuracy,
        accuracy_drop=found.drop.value,
        agreement=found.agreement,
        size_bytes=winner.size_bytes,
    )
    held_out = common.data.validation
    samples = common.encoder.samples(held_out.texts)
    rows = pick(held_out, [length_of(sample) for sample in samples], margins_of(winner.logits))
    golden = record(rows, held_out, samples, common.reference, winner.logits, common.encoder)
    manifest = manifest_of(
        identity,
        profile=contest.profile.name,
        precision=winner.made.plan.precision,
        session=winner.made.built.session,
        max_batch_size=batch_size(
            winner.made.plan.precision,
            useful=winner.measured.max_batch_size if contest.on_target else None,
            on_cpu=bool(contest.profile.providers) and contest.profile.providers[0].name == CPU,
        ),
        provenance=Provenance(
            source=source,
            candidate=winner.made.plan.name,
            recipe_sha256=sha256_bytes(canonical_json(common.recipe.document())),
            data=common.data.origin,
            finetune=common.recipe.finetune.method,
            tools=tool_versions(),
        ),
        measured=figures,
        temperature=trial.calibrations[winner.made.plan.name].temperature,
    )
    contract = contract_of(
        contest.profile,
        figures,
        judge(golden, winner.made.plan.precision),
        rows=trial.rows,
        host=contest.host.host,
        on_target=contest.on_target,
    )
    files: dict[str, Path | bytes] = {TOKENIZER: tokenizer / TOKENIZER, **graph.model_files(winner.made.folder)}
    return write_bundle(target, manifest, contract, files, golden)
