"""neural-compressor's candidate as a stage of the export: cached like every other one, or absent with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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

    It starts from torch, and its trials see validation rows. Of the ``whole`` network only: a pruned one has heads and
    words of its own, and each would cost another search.
    """
    try:
        return _made(plan, whole, data, stages, max_drop=max_drop)
    except MissingExtra as error:
        return Absent(plan=plan, reason=f"not available here: {error}")
    except RuntimeUnavailable as error:
        return Absent(plan=plan, reason=f"could not be built: {error}")


def _made(plan: Plan, whole: Variant, data: Data, stages: Stages, *, max_drop: float) -> Made:
    held_out, step = data.validation, max(1, -(-len(data.validation) // inc.TUNING_ROWS))
    rows = Labelled(texts=held_out.texts[::step], labels=held_out.labels[::step])
    calibration = data.train.spread(quantize.CALIBRATION_SAMPLES)
    ingredients = {
        "convert": whole.fp32.folder.name,  # which stands for the fine-tuned model too
        "plan": [plan.name, plan.precision, plan.reduce_range],
        "rows": rows.digest(),
        "max_drop": max_drop,
        "tools": {**stages.tools, **inc.versions()},
        "code": code_digest(
            inc, inc_worker, fold_weights, scheme, convert, signature, first_token, tables, rare_rows, product_codes,
            graph, steps, ort, encode, stages.task,
        ),
        "calibration": calibration,
    }  # fmt: skip

    def build(work: Path) -> None:
        stages.progress.stage("quantize", f"{plan.name}, tuned by neural-compressor")
        answers = whole.reference[::step].argmax(axis=1)
        job = inc.Job(
            model=str((whole.trained / "model").absolute()),
            inputs=whole.identity.inputs,
            accuracy=float(np.mean(answers == np.asarray(rows.labels))),
            max_drop=max_drop,
            levels=scheme.REDUCED_LEVELS if plan.reduce_range else scheme.LEVELS,
            threads=stages.threads,
        )
        samples = whole.encoder.samples
        judged = inc.Rows(samples=samples(rows.texts), labels=rows.labels, reference=answers.tolist())
        inc.build(plan, job, samples(calibration), judged, work)

    folder = stages.produce("quantize", ingredients, build)
    return Made(name=plan.name, plan=plan, folder=folder, built=quantize.load_built(folder))
