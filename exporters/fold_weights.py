"""Folding QDQ graphs: weights that an exporter leaves in fp32 behind QuantizeLinear become the integers they stand for.

torch exports a statically quantized model as it simulates it: the fp32 weight, then QuantizeLinear, Clip,
DequantizeLinear and Transpose on the device, each time. onnxruntime folds some of that when it loads the file, which is
then still four times as large. Here the integers are stored, transposed where the graph transposes them, and only the
DequantizeLinear that onnxruntime fuses into its 8-bit kernels stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporters.scheme import LEVELS


class _Chain(NamedTuple):
    """A weight's way to its product: the nodes of the graph that a DequantizeLinear of integers replaces."""

    quantize: Any
    clip: Any | None
    dequantize: Any
    transpose: Any | None


def fold_weights(model: Any, *, levels: int = LEVELS) -> int:
    """Store every weight that is quantized on the device as s8, in place; returns how many were.

    The integers are those that onnxruntime computes (``round(w / scale)``, half to even). Fewer ``levels`` than
    :data:`~exporters.scheme.LEVELS` get new scales, ``max|w| / levels`` of each channel.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    gone: set[str] = set()  # first outputs of nodes that are replaced
    folded: dict[str, Any] = {}  # output of a chain -> its DequantizeLinear
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or any(name not in constants for name in node.input):
            continue
        chain = _chain(node, readers, constants, outputs)
        if chain is None:
            continue
        dequantize, arrays = _folded(chain, constants, levels)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        folded[dequantize.output[0]] = dequantize
        gone.update(member.output[0] for member in chain if member is not None)
    if folded:
        kept = [node for node in graph.node if node.output[0] not in gone]
        copies = [type(node).FromString(node.SerializeToString()) for node in (*folded.values(), *kept)]
        del graph.node[:]  # what they were copied from lives in what is emptied
        graph.node.extend(copies)
        _drop_unread(graph)
    return len(folded)


def integer_products(model: Any) -> int:
    """How many products have both operands in 8 bits, the second a constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}

    def dequantized(name: str) -> bool:
        return name in makers and makers[name].op_type == "DequantizeLinear"

    return sum(
        node.op_type == "MatMul"
        and all(dequantized(name) for name in node.input)
        and makers[node.input[1]].input[0] in constants
        for node in model.graph.node
    )


def _chain(
    quantize: Any, readers: Mapping[str, list[Any]], constants: Mapping[str, Any], outputs: set[str]
) -> _Chain | None:
    """What follows a QuantizeLinear of a weight, if it is for one product alone and all its other inputs are known."""

    def next_of(node: Any, kind: str) -> Any | None:
        found = readers.get(node.output[0], [])
        fits = len(found) == 1 and found[0].op_type == kind and found[0].input[0] == node.output[0]
        return found[0] if fits and node.output[0] not in outputs else None

    clip = next_of(quantize, "Clip")
    dequantize = next_of(clip if clip is not None else quantize, "DequantizeLinear")
    if dequantize is None or any(name not in constants for name in dequantize.input[1:]):
        return None
    if clip is not None and (len(clip.input) != 3 or any(name not in constants for name in clip.input[1:])):
        return None
    return _Chain(quantize, clip, dequantize, next_of(dequantize, "Transpose"))


def _folded(chain: _Chain, constants: Mapping[str, Any], levels: int) -> tuple[Any, dict[str, NDArray[Any]]]:
    """The DequantizeLinear that replaces a chain, and its constants by name."""
    from onnx import helper, numpy_helper

    def value(name: str) -> NDArray[Any]:
        array: NDArray[Any] = numpy_helper.to_array(constants[name])
        return array

    weight, scale = value(chain.quantize.input[0]), value(chain.dequantize.input[1])
    zero = value(chain.quantize.input[2]) if len(chain.quantize.input) > 2 else np.zeros_like(scale, dtype=np.int8)
    axis = _attribute(chain.quantize, "axis", 1) % weight.ndim
    shape = [-1 if dimension == axis else 1 for dimension in range(weight.ndim)] if scale.ndim else []
    step, offset = value(chain.quantize.input[1]).reshape(shape), zero.reshape(shape).astype(np.float32)
    if levels < LEVELS:
        others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis or not scale.ndim)
        scale = (np.abs(weight).max(axis=others) / levels).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        step, offset, zero = scale.reshape(shape), np.zeros(1, dtype=np.float32), np.zeros_like(zero)
    limits = np.iinfo(zero.dtype)
    integers = np.clip(np.round(weight / step) + offset, limits.min, limits.max)
    if chain.clip is not None:
        low, high = (float(value(name)) for name in chain.clip.input[1:])
        integers = np.clip(integers, low, high)
    last = chain.dequantize
    if chain.transpose is not None:
        order = list(_attribute(chain.transpose, "perm", range(weight.ndim)[::-1]))
        integers, axis, last = integers.transpose(order), order.index(axis), chain.transpose
    name = chain.quantize.input[0]
    arrays = {
        f"{name}/s8": np.ascontiguousarray(integers.astype(zero.dtype)),
        f"{name}/scale": scale,
        f"{name}/zero": zero,
    }
    node = helper.make_node("DequantizeLinear", list(arrays), [last.output[0]], name=f"{name}/dequantized", axis=axis)
    return node, arrays


def _drop_unread(graph: Any) -> None:
    """Initializers that no node reads any more."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
