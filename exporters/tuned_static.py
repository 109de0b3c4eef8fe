"""neural-compressor's candidates as stages of the export: cached like every other one, or absent with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from aios_edge.errors import MissingExtra, RuntimeUnavailable
from exporters import (
    convert,
    encode,
    first_token,
    fold_weights,
    graph,
    inc,
    inc_worker,
    ort,
    product_codes,
    quantize,
    rare_rows,
    scheme,
    signature,
    steps,
    tables,
)
from exporters.cache import code_digest
from exporters.data import Data, Labelled
from exporters.plans import Plan
from exporters.stages import Made, Stages
from exporters.variants import Variant


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A candidate that was asked for and isn't there, and why: not available here, or it failed."""

    plan: Plan
    reason: str


def make(plan: Plan, whole: Variant, data: Data, stages: Stages, *, max_drop: float) -> Made | Absent:
    """The candidate; an optional package makes it, so that its absence ends nothing.

    It starts from torch, and the trials of a tuned one see validation rows. Of the ``whole`` network only: a pruned one
    has heads and words of its own, and each would cost another search.
    """
    try:
        static = _static(plan, whole, data, stages)
        return _tuned(plan, static, whole, data, stages, max_drop) if plan.tuned else static
    except MissingExtra as error:
        return Absent(plan=plan, reason=f"not available here: {error}")
    except RuntimeUnavailable as error:
        return Absent(plan=plan, reason=f"could not be built: {error}")


def _static(plan: Plan, whole: Variant, data: Data, stages: Stages) -> Made:
    """What the backend makes at its defaults: the same for both candidates, so its name is no ingredient."""
    calibration = data.train.spread(quantize.CALIBRATION_SAMPLES)
    ingredients = {
        "convert": whole.fp32.folder.name,  # which stands for the fine-tuned model too
        "plan": [plan.precision, plan.reduce_range],
        "tools": {**stages.tools, **inc.versions()},
        "code": code_digest(
            inc, inc_worker, fold_weights, scheme, convert, signature, first_token, tables, rare_rows, product_codes,
            graph, steps, ort, encode, stages.task,
        ),
        "calibration": calibration,
    }  # fmt: skip

    def build(work: Path) -> None:
        stages.progress.stage("quantize", f"{plan.name}, by neural-compressor")
        inc.build(plan, _job(plan, whole, stages), whole.encoder.samples(calibration), work)

    folder = stages.produce("quantize", ingredients, build)
    return Made(name=plan.name, plan=plan, folder=folder, built=quantize.load_built(folder))


def _tuned(plan: Plan, static: Made, whole: Variant, data: Data, stages: Stages, max_drop: float) -> Made:
    """The first configuration that keeps the promise. The ``static`` candidate is the first trial, by the answers that
    judge it anyway; where it is kept, both are one model in one folder."""
    held_out, step = data.validation, max(1, -(-len(data.validation) // inc.TUNING_ROWS))
    texts, labels = held_out.texts[::step], held_out.labels[::step]
    samples = whole.encoder.samples
    rows = inc.Rows(
        samples=samples(texts),
        labels=np.asarray(labels),
        reference=whole.reference[::step].argmax(axis=1),
    )
    promise = inc.Promise(accuracy=float(np.mean(rows.reference == rows.labels)), max_drop=max_drop)
    answers = stages.answers(static, "validation", held_out, whole.encoder)
    first = rows.judge(inc.DEFAULT, answers[::step].argmax(axis=1))
    if promise.kept_by(first):
        return replace(static, built=msgspec.structs.replace(static.built, tuning=inc.marked([first], 0)))
    ingredients = {
        "static": static.folder.name,  # which stands for code, tools and calibration too
        "rows": Labelled(texts=texts, labels=labels).digest(),
        "first": msgspec.to_builtins(first),
        "promise": msgspec.to_builtins(promise),
    }

    def build(work: Path) -> None:
        stages.progress.stage("quantize", f"{plan.name}, tuned by neural-compressor")
        job = msgspec.structs.replace(_job(plan, whole, stages), promise=promise)
        calibration = samples(data.train.spread(quantize.CALIBRATION_SAMPLES))
        inc.tune(plan, job, calibration, rows, first, static.built, work)

    folder = stages.produce("quantize", ingredients, build)
    built = quantize.load_built(folder)
    return replace(static, folder=static.folder if built.tuning[0].kept else folder, built=built)


def _job(plan: Plan, whole: Variant, stages: Stages) -> inc.Job:
    return inc.Job(
        model=str((whole.trained / "model").absolute()),
        inputs=whole.identity.inputs,
        levels=scheme.REDUCED_LEVELS if plan.reduce_range else scheme.LEVELS,
        threads=stages.threads,
    )
