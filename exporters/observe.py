"""The calibrating passes: samples run through a graph one at a time, each folded into what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import DataError, PromiseBroken
from exporters import ort
from exporters.encode import Sample
from exporters.equalize import Seen, products
from exporters.ranges import Range, Spread, choose
from exporters.scheme import Array, Scheme

#: Fixed ranges of fewer samples would cut what the next text brings. Scales found at run time can't.
LEAST_STATIC = 8
#: Activations whose grams together take more are observed in several passes.
_GRAM_BYTES = 256_000_000
#: Tokens that wait before they are multiplied: a product of [C, C] for each short text is mostly memory traffic.
_TOKENS = 512


def check_samples(samples: Sequence[Sample], scheme: Scheme) -> None:
    """Raise :class:`DataError` where there are too few different samples for the scheme."""
    different = len({tuple(array.tobytes() for array in sample.values()) for sample in samples})
    least = LEAST_STATIC if scheme.static else 1
    if different < least:
        what = f"has {different} different calibration samples, this quantization needs at least {least}"
        remedy = "Give more training rows, or prefer dynamic-s8 in the profile"
        raise DataError(what, where="quantize", remedy=remedy)


def channels(model: Any, samples: Sequence[Sample]) -> dict[str, Seen]:
    """What each activation that is multiplied with a constant matrix shows of its channels."""
    parts: dict[str, list[Seen]] = {name: [] for name in products(model)}
    for name, activation in _folded(model, list(parts), samples):
        parts[name].append(Seen.of(activation))
    return {name: Seen.joined(seen) for name, seen in parts.items()}


def ranges_of(model: Any, samples: Sequence[Sample], scheme: Scheme) -> dict[str, Range]:
    """The range of each of these activations for a static scheme."""
    from onnx import numpy_helper

    groups = products(model)
    spreads = {name: Spread() for name in groups}
    for name, activation in _folded(model, list(groups), samples):
        spreads[name].fold(activation)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def weight_of(name: str) -> Array:
        matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in groups[name]]
        return np.concatenate(matrices, axis=1).astype(np.float32)

    return {name: choose(spread, weight_of(name), scheme) for name, spread in spreads.items()}


def grams(model: Any, names: Sequence[str], samples: Sequence[Sample]) -> Iterator[tuple[str, Array]]:
    """The sum of ``x xᵀ`` [C, C] over all tokens of each named activation; a part of them in memory at a time."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    groups = products(model)
    left = list(names)
    while left:
        part: dict[str, Array] = {}
        while left and sum(gram.nbytes for gram in part.values()) < _GRAM_BYTES:
            width = weights[groups[left[0]][0].input[1]].dims[0]
            part[left.pop(0)] = np.zeros((width, width), dtype=np.float32)
        waiting: dict[str, list[Array]] = {name: [] for name in part}
        for name, activation in _folded(model, list(part), samples):
            waiting[name].append(activation.reshape(-1, activation.shape[-1]))
            if sum(map(len, waiting[name])) >= _TOKENS:
                part[name] += _gram(waiting.pop(name))
                waiting[name] = []
        for name, gram in part.items():
            yield name, gram + _gram(waiting[name]) if waiting[name] else gram


def _gram(tokens: Sequence[Array]) -> Array:
    flat = np.concatenate(tokens)
    found: Array = flat.T @ flat
    return found


def _folded(model: Any, names: list[str], samples: Sequence[Sample]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Raises :class:`PromiseBroken` (``calibration``) for a value that isn't finite."""
    if not names:  # convolutions only, say; a runtime that is asked for nothing gives everything
        return
    for number, arrays in enumerate(ort.activations(model, names, samples), start=1):
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                what = f"calibration sample {number} of {len(samples)} makes activation '{name}' NaN or infinite"
                remedy = "The fine-tuned weights overflow: lower learning_rate, or take another source model"
                raise PromiseBroken("calibration", what, where="quantize", remedy=remedy)
            yield name, array
