"""Which class each row of an answer got, as an index: what two bundles are compared by. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aios_edge.manifest import Manifest
from aios_edge.tasks import Prediction

NO_CLASS = -1  # the model's output is no number


def classes_of_predictions(predictions: Sequence[Prediction]) -> tuple[int, ...]:
    """Of natural input."""
    return tuple(
        prediction.probabilities.index(prediction.score) if math.isfinite(prediction.score) else NO_CLASS
        for prediction in predictions
    )


def classes_of_outputs(outputs: Mapping[str, NDArray[np.generic]], manifest: Manifest) -> tuple[int, ...] | None:
    """Of the model's own tensors; None where there are no labels, or not one figure for each of them in a row."""
    table = outputs.get(manifest.postprocess.output)
    if table is None or not manifest.labels or table.dtype.kind != "f":
        return None
    if table.ndim != 2 or table.shape[1] != len(manifest.labels):
        return None
    fine = np.isfinite(table.max(axis=1))  # NaN anywhere is the largest
    return tuple(np.where(fine, table.argmax(axis=1), NO_CLASS).tolist())
