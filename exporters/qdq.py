"""Static quantization of a graph, written by us: the inputs of products, and nothing else.

onnxruntime's own ``quantize_static`` quantizes what comes out of a product as well, which costs a text encoder several
points of agreement and gains nothing where the next operator (a bias, a norm, a softmax) works in float anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from exporters.equalize import products
from exporters.ranges import Range
from exporters.scheme import Scheme, rounded_weight, weight_scale

#: ``qdq``: QuantizeLinear and DequantizeLinear around standard operators. ``integer``: onnxruntime's operators that
#: multiply integers, as its CPU provider runs them fast. ``simulated``: ``qdq`` with the rounded weights in float: the
#: same answers at the speed of fp32, for trials.
Form = Literal["qdq", "integer", "simulated"]
_MICROSOFT = "com.microsoft"
_ATTENTION_KEYS = ("num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary")


def quantize(model: Any, ranges: Mapping[str, Range], scheme: Scheme, form: Form) -> int:
    """Quantize every product whose activation has a range, in place; returns how many products that were."""
    from onnx import helper

    writer = _Writer(model, scheme, form)
    groups = products(model)
    wanted = {node.output[0]: name for name in ranges for node in groups[name]}
    arranged: list[Any] = []
    for node in model.graph.node:
        name = wanted.get(node.output[0])
        if name is None:
            arranged.append(node)
            continue
        arranged += writer.activation(name, ranges[name])
        arranged += writer.product(node, name)
    copies = [type(node).FromString(node.SerializeToString()) for node in arranged]  # they live in what is emptied
    del model.graph.node[:]
    model.graph.node.extend(copies)
    if form == "integer":
        _fold_biases(model.graph)
        if not any(entry.domain == _MICROSOFT for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    return len(wanted)


class _Writer:
    """The nodes and constants of one graph's quantization."""

    def __init__(self, model: Any, scheme: Scheme, form: Form) -> None:
        self._constants = model.graph.initializer
        self._known = {tensor.name: tensor for tensor in model.graph.initializer}
        self._scheme, self._form = scheme, form
        self._written: set[str] = set()

    def activation(self, name: str, found: Range) -> list[Any]:
        """Quantize an activation, once for all its products."""
        from onnx import helper

        if name in self._written:
            return []
        self._written.add(name)
        scale, zero = self._scheme.grid(found.low, found.high)
        integer = np.int8 if self._scheme.symmetric else np.uint8
        names = [f"{name}/s8", self._add(f"{name}/scale", scale), self._add(f"{name}/zero", zero.astype(integer))]
        nodes = [helper.make_node("QuantizeLinear", [name, *names[1:]], names[:1], name=f"{name}/quantize")]
        if self._form != "integer":
            nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}/left"], name=f"{name}/dequantize"))
        return nodes

    def product(self, node: Any, name: str) -> list[Any]:
        """The product of an activation with its weight in s8, one scale per output channel."""
        from onnx import helper, numpy_helper

        weight = node.input[1]
        matrix = numpy_helper.to_array(self._known[weight]).astype(np.float32)
        levels = self._scheme.weight_levels
        if self._form == "simulated":
            self._replace(weight, rounded_weight(matrix, levels))
            return [self._reading(node, f"{name}/left", weight)]
        steps = weight_scale(matrix, levels)
        self._replace(weight, np.round(matrix / steps).astype(np.int8))
        scale = self._add(f"{weight}/scale", steps)
        zero = self._add(f"{weight}/zero", np.zeros(len(steps), dtype=np.int8))
        if self._form == "qdq":
            left = f"{weight}/left"
            dequantize = helper.make_node("DequantizeLinear", [weight, scale, zero], [left], name=left, axis=1)
            return [dequantize, self._reading(node, f"{name}/left", left)]
        inputs = [f"{name}/s8", weight, f"{name}/scale", scale, f"{name}/zero", zero]
        if node.op_type == "Attention":
            inputs = [inputs[0], weight, node.input[2], inputs[2], scale, [*node.input, "", ""][3], inputs[4], zero]
            made = helper.make_node("QAttention", inputs, node.output, name=node.name, domain=_MICROSOFT)
            made.attribute.extend(entry for entry in node.attribute if entry.name in _ATTENTION_KEYS)
            return [made]
        return [helper.make_node("MatMulIntegerToFloat", inputs, node.output, name=node.name, domain=_MICROSOFT)]

    def _reading(self, node: Any, activation: str, weight: str) -> Any:
        made = type(node).FromString(node.SerializeToString())
        made.input[0], made.input[1] = activation, weight
        return made

    def _add(self, name: str, array: Any) -> str:
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _replace(self, name: str, array: Any) -> None:
        from onnx import numpy_helper

        self._known[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _fold_biases(graph: Any) -> None:
    """A constant added to a product goes into its own operator: onnxruntime does it for dynamic products only."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {output.name: [] for output in graph.output}
    for node in graph.node:
        for entry in node.input:
            readers.setdefault(entry, []).append(node)
    outputs = {output.name for output in graph.output}
    folded: set[str] = set()
    for node in graph.node:
        only = readers.get(node.output[0], [])
        if node.op_type != "MatMulIntegerToFloat" or len(only) != 1 or node.output[0] in outputs:
            continue
        bias = [entry for entry in only[0].input if entry in constants and len(constants[entry].dims) == 1]
        if only[0].op_type == "Add" and bias:
            folded.add(only[0].output[0])
            node.input.append(bias[0])
            node.output[0] = only[0].output[0]
    kept = [
        type(node).FromString(node.SerializeToString())
        for node in graph.node
        if node.op_type != "Add" or node.output[0] not in folded
    ]
    del graph.node[:]
    graph.node.extend(kept)
