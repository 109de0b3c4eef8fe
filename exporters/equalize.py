"""Equalization: give every channel of an activation about the same range before it is quantized.

A quantized product has one scale for a whole activation. In BERT-class encoders one or two channels reach
ten times what the others do, so the others are left with a few steps of the scale. Dividing those channels by a factor
and multiplying their rows of the weight by it changes nothing in exact arithmetic and leaves the weight, which has a
scale per output channel, room enough. This is the idea of SmoothQuant (Xiao et al., 2022); other than there, only
channels above a quantile of all channels' ranges are scaled, and the quantile is chosen for each product by the error
that it leaves on calibration samples, "not at all" included.

Where an activation comes out of a fused attention the division goes into its value weights and costs nothing;
elsewhere it is one multiplication per element.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.scheme import Array, Scheme, rounded_weight

#: Channels that reach further than this quantile of all channels are brought down to it. None: none of them.
STRENGTHS = (None, 0.999, 0.98, 0.95, 0.9, 0.75, 0.5)
#: A multiplication on the device must take at least half of the squared error of its product away.
WORTH = 0.5
#: Rows (tokens) kept of each calibration sample; ranges come from all of them.
ROWS_PER_SAMPLE = 4


@dataclass(frozen=True)
class Seen:
    """What calibration saw of one activation of ``C`` channels.

    ``low`` and ``high`` [samples, C]: each sample's range per channel. ``rows`` [R, C], ``sample`` [R]: some tokens,
    and which sample each is of.
    """

    low: Array
    high: Array
    rows: Array
    sample: NDArray[np.intp]

    @staticmethod
    def of(activation: Array) -> Seen:
        """One sample's activation [..., C]."""
        flat = activation.reshape(-1, activation.shape[-1])
        picked = flat[:: max(1, len(flat) // ROWS_PER_SAMPLE)][:ROWS_PER_SAMPLE].copy()
        sample = np.zeros(len(picked), dtype=np.intp)
        return Seen(low=flat.min(axis=0)[None], high=flat.max(axis=0)[None], rows=picked, sample=sample)

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        """Several samples as one."""
        starts = np.cumsum([0, *(len(part.low) for part in parts[:-1])])
        return Seen(
            low=np.concatenate([part.low for part in parts]),
            high=np.concatenate([part.high for part in parts]),
            rows=np.concatenate([part.rows for part in parts]),
            sample=np.concatenate([part.sample + start for part, start in zip(parts, starts, strict=True)]),
        )


def choose_factors(seen: Seen, weight: Array, *, scheme: Scheme, free: bool) -> Array:
    """The factor of each channel [C], at least 1, that leaves the least error of ``rows @ weight``. Pure.

    All are 1 where that error is not below :data:`WORTH` of the one without factors and dividing isn't ``free``.
    """
    wanted = seen.rows @ weight
    reach = np.maximum(np.abs(seen.low), np.abs(seen.high)).max(axis=0)
    candidates = [_factors(reach, strength) for strength in STRENGTHS]
    errors = [_error(seen, weight, wanted, factors, scheme) for factors in candidates]
    best = int(np.argmin(errors))
    return candidates[best if free or errors[best] < WORTH * errors[0] else 0]


def _factors(reach: Array, strength: float | None) -> Array:
    limit = None if strength is None else float(np.quantile(reach, strength, method="lower"))
    if not limit:
        return np.ones_like(reach)
    factors: Array = np.maximum(1, reach / limit).astype(np.float32)
    return factors


def _error(seen: Seen, weight: Array, wanted: Array, factors: Array, scheme: Scheme) -> float:
    low, high = (seen.low / factors).min(axis=1), (seen.high / factors).max(axis=1)  # of each sample
    if scheme.static:
        low, high = low.min(), high.max()
    else:
        low, high = low[seen.sample, None], high[seen.sample, None]
    rows = scheme.rounded(seen.rows / factors, low, high)
    left = rows @ rounded_weight(weight * factors[:, None], scheme.weight_levels)
    return float(np.mean((left - wanted) ** 2))


def products(model: Any) -> dict[str, list[Any]]:
    """Activation -> the products of it with a constant matrix that nobody else uses."""
    readers = _readers(model.graph)
    own = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2 and readers[tensor.name] == 1}
    found: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Attention") and node.input[1] in own:
            found[node.input[0]].append(node)
    return dict(found)


def equalize(model: Any, seen: Mapping[str, Seen], scheme: Scheme) -> int:
    """Equalize every activation that was seen, in place; returns how many of them were."""
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    divisions: dict[str, Any] = {}  # activation -> the node that divides it
    changed = 0
    for name, nodes in products(model).items():
        if name not in seen:
            continue
        matrices = [numpy_helper.to_array(weights[node.input[1]]).astype(np.float32) for node in nodes]
        attention = _attention_behind(graph, name, weights, readers=len(nodes))
        whole, free = np.concatenate(matrices, axis=1), attention is not None
        factors = choose_factors(seen[name], whole, scheme=scheme, free=free)
        if (factors == 1).all():
            continue
        changed += 1
        for node, matrix in zip(nodes, matrices, strict=True):
            _replace(weights[node.input[1]], matrix * factors[:, None])
        if attention is not None:
            _divide_values(attention, weights, factors)
            continue
        divided, factor = f"{name}/equalized", f"{name}/equalizing_factors"
        graph.initializer.append(numpy_helper.from_array(np.float32(1) / factors, factor))
        divisions[name] = helper.make_node("Mul", [name, factor], [divided], name=divided)
        for node in nodes:
            node.input[0] = divided
    _insert(graph, divisions)
    return changed


def _insert(graph: Any, divisions: dict[str, Any]) -> None:
    """Each division right behind the node that makes its activation."""
    arranged = []
    for node in graph.node:
        arranged.append(node)
        arranged += [divisions.pop(output) for output in node.output if output in divisions]
    arranged = [*divisions.values(), *arranged]  # what is left divides an input of the graph
    copies = [type(node).FromString(node.SerializeToString()) for node in arranged]  # they live in what is emptied
    del graph.node[:]
    graph.node.extend(copies)


def _attention_behind(graph: Any, name: str, weights: Mapping[str, Any], *, readers: int) -> Any | None:
    """The fused attention that makes this activation for its ``readers`` alone, one token of it perhaps; else None."""
    producers = {output: node for node in graph.node for output in node.output}
    counts = _readers(graph)
    if counts[name] != readers:
        return None
    node = producers.get(name)
    if node is not None and node.op_type == "Gather" and counts[node.input[0]] == 1:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Attention" or len(node.input) < 3:
        return None
    own = all(entry in weights and counts[entry] == 1 for entry in node.input[1:3])
    return node if own else None


def _readers(graph: Any) -> Counter[str]:
    found = Counter(name for node in graph.node for name in node.input)
    found.update(output.name for output in graph.output)
    return found


def _divide_values(attention: Any, weights: Mapping[str, Any], factors: Array) -> None:
    """Into the last third of the fused weight [H, 3H] and bias [3H]: what they make is a mean of these values."""
    from onnx import numpy_helper

    for name in attention.input[1:3]:
        array = numpy_helper.to_array(weights[name]).astype(np.float32)
        array[..., -len(factors) :] /= factors
        _replace(weights[name], array)


def _replace(tensor: Any, array: Array) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), tensor.name))
