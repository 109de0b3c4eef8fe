"""A request without rows: nothing is asked, so the answer is as many rows of each output. Pure.

Some kernels of onnxruntime divide by the number of rows, which ends the process; and no model is needed to know it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.manifest import TensorSpec
from aios_edge.oip.datatypes import DTYPES


def outputs_without_rows(
    inputs: Mapping[str, NDArray[Any]], takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]
) -> dict[str, NDArray[Any]] | None:
    """The outputs of a model for inputs of zero rows; None where that isn't what these are, or where the shape of a row
    of the answer is the model's to tell. What is wrong with the inputs otherwise is for the caller to find."""
    rows = [inputs[spec.name].shape[:1] for spec in takes if spec.name in inputs]
    if len(rows) != len(takes) or any(shape != (0,) for shape in rows):
        return None
    if not all(spec.shape[:1] == (-1,) for spec in (*takes, *gives)):  # its first dimension isn't rows
        return None
    if any(-1 in spec.shape[1:] for spec in gives):
        return None
    return {spec.name: np.empty((0, *spec.shape[1:]), dtype=DTYPES[spec.datatype]) for spec in gives}
