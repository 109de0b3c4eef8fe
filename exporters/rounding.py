"""Error-compensating rounding: what one row of a weight loses, the rows after it make good.

GPTQ (Frantar et al., 2022) on the 8-bit grid: the rows of a weight are rounded one after the other, those of the
strongest channels first, and the error each makes on calibration activations is taken out by the rows that are still to
come. The result lies on the grid of rounding to the nearest, so whatever quantizes it afterwards finds exactly these
integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exporters.scheme import Array, rounded_weight, weight_scale

#: Added to the diagonal, as a share of its mean: fewer calibration tokens than channels leave directions unseen.
DAMPING = 0.1
_BLOCK = 128


def compensated(weight: Array, gram: Array, levels: int) -> Array:
    """A weight [C, N] on its s8 grid with the least error of ``x @ weight`` for activations with this ``gram`` [C, C].

    The largest entry of each column stays the largest, because the grid is made of it. Pure.
    """
    hessian = gram.astype(np.float64)
    mean = float(np.diag(hessian).mean())
    if not mean > 0:
        return rounded_weight(weight, levels)
    hessian[np.diag_indices(len(hessian))] += DAMPING * mean
    order = np.argsort(-np.diag(hessian), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    left = weight[order].astype(np.float64)
    scale = weight_scale(weight, levels).astype(np.float64)
    largest = np.abs(left).argmax(axis=0)
    pinned = np.round(left[largest, np.arange(left.shape[1])] / scale)
    done = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for row in range(start, end):
            steps = np.clip(np.round(left[row] / scale), -levels, levels)
            steps[largest == row] = pinned[largest == row]
            done[row] = steps * scale
            errors[row - start] = (left[row] - done[row]) / upper[row, row]
            left[row:end] -= np.outer(upper[row, row:end], errors[row - start])
        left[end:] -= upper[start:end, end:].T @ errors
    found = np.empty_like(weight)
    found[order] = done
    return found


def compensate(model: Any, nodes: Sequence[Any], gram: Array, levels: int) -> None:
    """Round the weights of one activation's products, in place; they stay float32."""
    from onnx import numpy_helper

    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:
        tensor = known[node.input[1]]
        weight = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(compensated(weight, gram, levels), tensor.name))
