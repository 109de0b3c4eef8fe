"""How right a model is: answers one sample at a time, as a device gives them, and the figures made of them.

Dynamic quantization finds its scales per batch, so an answer depends on its neighbours; only answers to single,
unpadded samples say what a single request will get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import PromiseBroken
from exporters.encode import Sample
from exporters.ort import Session

Logits = NDArray[np.float32]

RESAMPLES = 10_000
_SEED = 20  # of the bootstrap: the same rows give the same interval


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One label's precision, recall and F1, all 0 … 1; ``support`` counts its rows."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Precision, recall and F1 are macro averages: each class counts the same."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    rows: int
    per_class: tuple[ClassMetrics, ...]


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy lost against the fine-tuned fp32 model, with a paired 95 % bootstrap interval; below 0 is a gain."""

    value: float
    low: float
    high: float


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate's figures on one split; every figure is None when its outputs were not finite."""

    split: str
    metrics: Metrics | None
    drop: Drop | None
    agreement: float | None  # share of rows with the argmax of the fine-tuned fp32 model
    reason: str | None = None


def answers(session: Session, samples: Sequence[Sample], *, threads: int, tick: Callable[[int], None]) -> Logits:
    """Logits [N, labels], each sample alone. Threads run different samples; each answer is one thread's."""
    collected: list[Any] = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done, answer in enumerate(pool.map(session.run, samples), start=1):
            collected.append(answer[0])
            if done % 50 == 0:
                tick(done)
    return np.stack(collected).astype(np.float32)


def check_reference(logits: Logits, rows: int, classes: int) -> None:
    """Raise :class:`PromiseBroken` (``reference``) unless fp32, by which all else is judged, gave each row finite
    logits."""
    wanted = (rows, classes)
    if getattr(logits, "shape", None) != wanted or not np.isfinite(logits).all():
        found = "are not finite" if getattr(logits, "shape", None) == wanted else f"have shape {np.shape(logits)}"
        what = f"the fine-tuned model's own answers {found}, so nothing can be compared with them ({wanted} wanted)"
        remedy = "Check the source's weights, or lower learning_rate in [finetune]"
        raise PromiseBroken("reference", what, where="stage evaluate", remedy=remedy)


def quality(split: str, logits: Logits, reference: Logits, labels: Sequence[int], names: Sequence[str]) -> Quality:
    """Figures of ``logits`` against the truth and against ``reference``, the fp32 model's answers to the same rows."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        why = "the outputs are not finite" if logits.shape == reference.shape else "the outputs have a wrong shape"
        return Quality(split=split, metrics=None, drop=None, agreement=None, reason=why)
    truth, answer, wanted = np.asarray(labels), logits.argmax(axis=1), reference.argmax(axis=1)
    return Quality(
        split=split,
        metrics=metrics(answer, truth, names),
        drop=paired_drop(wanted == truth, answer == truth),
        agreement=float(np.mean(answer == wanted)),
    )


def metrics(answer: NDArray[Any], truth: NDArray[Any], names: Sequence[str]) -> Metrics:
    """Accuracy and, per class and on average, precision, recall and F1 (0 where nothing was answered)."""
    per_class = []
    for index, name in enumerate(names):
        hit = int(np.sum((answer == index) & (truth == index)))
        answered, present = int(np.sum(answer == index)), int(np.sum(truth == index))
        precision = hit / answered if answered else 0.0
        recall = hit / present if present else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        per_class.append(ClassMetrics(label=name, precision=precision, recall=recall, f1=f1, support=present))

    def macro(figures: list[float]) -> float:
        return math.fsum(figures) / len(figures)

    counted = [entry for entry in per_class if entry.support] or per_class
    return Metrics(
        accuracy=float(np.mean(answer == truth)),
        precision=macro([entry.precision for entry in counted]),
        recall=macro([entry.recall for entry in counted]),
        f1=macro([entry.f1 for entry in counted]),
        rows=len(truth),
        per_class=tuple(per_class),
    )


def paired_drop(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Drop:
    """Mean of ``before - after`` over rows. Rows resample as counts of -1, 0 and 1: a multinomial, no loop."""
    difference = before.astype(np.int8) - after.astype(np.int8)
    count = len(difference)
    shares = [float(np.mean(difference == value)) for value in (-1, 0, 1)]
    draws = np.random.default_rng(_SEED).multinomial(count, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 2] - draws[:, 0]) / count, [0.025, 0.975])
    return Drop(value=float(np.mean(difference)), low=float(low), high=float(high))
