"""What is taken for what: the wrong answers by true label and answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporters.evaluate import Logits

#: Up to so many labels all counts are kept; a larger table is too large to read, and nearly empty.
MATRIX_LABELS = 40
MOST_PAIRS = 30


class ConfusedPair(msgspec.Struct, frozen=True, kw_only=True):
    """``rows`` of the label ``truth`` were answered ``answer``; ``fp32_rows``: the same by fine-tuned fp32."""

    truth: str
    answer: str
    rows: int
    fp32_rows: int


class Confusion(msgspec.Struct, frozen=True, kw_only=True):
    """Counts on one split. ``matrix``: a row per true label, a column per answer, both in the order of the labels; None
    for more than :data:`MATRIX_LABELS` labels. ``pairs``: the most confused ones. ``wrong``: all wrong answers."""

    split: str
    matrix: tuple[tuple[int, ...], ...] | None
    pairs: tuple[ConfusedPair, ...]
    wrong: int


def confusion(split: str, logits: Logits, reference: Logits, labels: Sequence[int], names: Sequence[str]) -> Confusion:
    """Count finite ``logits`` [N, C], and ``reference`` (fp32's answers to the same rows) beside them."""
    own, fp32 = (_counts(table, labels, len(names)) for table in (logits, reference))
    off = own - np.diag(np.diag(own))
    order = np.argsort(-off, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if off.flat[place]]
    return Confusion(
        split=split,
        matrix=tuple(tuple(map(int, row)) for row in own) if len(names) <= MATRIX_LABELS else None,
        pairs=tuple(
            ConfusedPair(truth=names[t], answer=names[a], rows=int(own[t, a]), fp32_rows=int(fp32[t, a]))
            for t, a in pairs
        ),
        wrong=int(off.sum()),
    )


def _counts(logits: Logits, labels: Sequence[int], count: int) -> NDArray[np.intp]:
    cells = np.asarray(labels) * count + logits.argmax(axis=1)
    return np.bincount(cells, minlength=count * count).reshape(count, count)
