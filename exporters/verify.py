"""Parity: the converted model answers as torch does, or nothing is exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import PromiseBroken
from exporters.encode import Encoder, Sample, length_of

#: Largest difference of a logit, relative to the largest logit. fp32 kernels differ by about 1e-6.
TOLERANCE = 1e-3
#: Rows whose best two logits are so close that rounding decides.
ROUNDING_SHARE = 0.005
_REMEDY = "Use the versions of torch, transformers and onnxruntime in constraints.txt, and report this model"
_ROWS = 48
_BATCH = 8

Run = Callable[[Sample], NDArray[np.float32]]


def parity_batches(samples: Sequence[Sample], encoder: Encoder) -> list[tuple[list[int], Sample]]:
    """(row numbers, padded batch): short beside long ones, so that padding and masks are exercised; one row alone."""
    order = sorted(range(len(samples)), key=lambda index: length_of(samples[index]))
    picked = [order[i] for i in np.linspace(0, len(order) - 1, min(_ROWS, len(order))).astype(int)]
    count = max(1, len(picked) // _BATCH)
    groups = [picked[start::count] for start in range(count)] + [[picked[-1]]]
    return [(rows, encoder.pad([samples[row] for row in rows])) for rows in groups]


def check_same_accuracy(torch_epochs: Sequence[float], converted: float, rows: int) -> None:
    """Raise :class:`PromiseBroken` (``parity``) where the graph is not as accurate as torch was on the same rows.

    Parity looks at some rows and compares numbers; this is another way to the same answer, so a parity check that
    checks nothing is found. ``torch_epochs`` may be empty (nothing was trained).
    """
    best = max(torch_epochs, default=converted)
    if abs(best - converted) * rows > max(1, ROUNDING_SHARE * rows):
        what = f"is right on {converted:.4f} of the validation rows, torch was on {best:.4f}"
        raise PromiseBroken("parity", what, where="converted model", remedy=_REMEDY)


def check_parity(name: str, run: Run, wanted: Run, batches: Sequence[tuple[list[int], Sample]]) -> float:
    """The largest relative difference; raises :class:`PromiseBroken` (``parity``) naming the worst row."""
    worst, worst_row = 0.0, -1
    if not sum(len(rows) for rows, _ in batches):
        raise PromiseBroken("parity", "was compared with torch on no row", where=name, remedy=_REMEDY)
    for rows, batch in batches:
        expected, seen = wanted(batch), run(batch)
        if np.shape(seen) != np.shape(expected) or len(np.atleast_1d(seen)) != len(rows):
            what = f"answers {len(rows)} rows with shape {np.shape(seen)}, torch with {np.shape(expected)}"
            raise PromiseBroken("parity", what, where=name, remedy=_REMEDY)
        scale = max(1.0, float(np.abs(expected).max()))
        differences = np.abs(seen - expected).max(axis=1) / scale
        differences = np.where(np.isfinite(differences), differences, np.inf)
        if float(differences.max()) > worst:
            worst, worst_row = float(differences.max()), rows[int(differences.argmax())]
    if worst > TOLERANCE:
        raise PromiseBroken(
            "parity",
            f"differs from torch by {worst:.2g} (allowed {TOLERANCE:g}), worst in validation row {worst_row + 1}",
            where=name,
            remedy=_REMEDY,
        )
    return worst
