"""Compute only what the answer looks at: behind the last attention, one token of each text.

A classifier of the BERT family reads a single position of the last layer (``[CLS]``). Everything between the last
attention and that read works on each token by itself, so the read can come first: the output projection, the feed
forward network and the norms of the last layer then see one token instead of all. The answers are the same; of six
layers an eighth of the arithmetic goes away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters import graph, steps

#: Operators that treat each token by itself when their other operands are constants of at most one dimension.
_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "BiasGelu", "FastGelu")
)
#: The same where scale and zero point are single numbers.
_SCALED = frozenset(("QuantizeLinear", "DequantizeLinear"))


def rewrite(source: Path, out: Path) -> None:
    """:func:`read_first` from file to file."""
    model = graph.load(source)
    read_first(model)
    steps.save(model, out)


def read_first(model: Any) -> int:
    """Move each read of one token (``Gather`` on axis 1) before the operators that treat each token by itself.

    In place; returns how many operators now see one token. What another reader needs of all tokens stays as it is. A
    tensor whose shape can't be inferred (behind a fused operator) is taken to be [batch, tokens, width].
    """
    graph = model.graph
    ranks = _ranks(model)
    reads = [
        node
        for node in graph.node
        if node.op_type == "Gather" and _attribute(node, "axis", 0) == 1 and ranks.get(node.input[1]) == 0
    ]
    return sum(_move(graph, ranks, read) for read in reads)


def _move(graph: Any, ranks: Mapping[str, int], read: Any) -> int:
    """One read; nodes are known by their first output, which is theirs alone."""
    nodes = list(graph.node)
    at = next(index for index, node in enumerate(nodes) if node.output[0] == read.output[0])
    readers: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        for name in node.input:
            readers[name].add(node.output[0])
    for output in graph.output:
        readers[output.name].add("")  # somebody outside
    passed: dict[str, tuple[int, ...]] = {}  # output of an operator -> which of its inputs carry tokens
    for node in reversed(nodes[:at]):
        output = node.output[0]
        if readers[output] and readers[output] <= {read.output[0], *passed} and (carrying := _carrying(node, ranks)):
            passed[output] = carrying
    if not passed:
        return 0

    arranged: list[Any] = []
    reads: dict[str, str] = {}  # tensor of all tokens -> the same at the one token
    for node in nodes[:at]:
        for position in passed.get(node.output[0], ()):
            name = node.input[position]
            if name not in passed:
                if name not in reads:
                    reads[name] = f"{name}/read_for/{read.output[0]}"  # another read may want another token of it
                    arranged.append(_renamed(read, name, reads[name]))
                node.input[position] = reads[name]
        if node.output[0] in passed and node.op_type == "LayerNormalization":
            _set_axis(node, -1)  # the last one, whatever number it had beside the tokens
        arranged.append(node)
    whole, one = read.input[0], read.output[0]
    for node in (arranged := [*arranged, *nodes[at + 1 :]]):  # the last operator passed now makes what was read
        node.input[:] = [one if name == whole else name for name in node.input]
        node.output[:] = [one if name == whole else name for name in node.output]
    arranged = [_copy(node) for node in arranged]  # they live in the field that is emptied
    del graph.node[:]
    graph.node.extend(arranged)
    del graph.value_info[:]  # the shapes of what was passed are others now
    return len(passed)


def _renamed(read: Any, data: str, output: str) -> Any:
    node = _copy(read)
    node.name, node.input[0], node.output[0] = output, data, output
    return node


def _ranks(model: Any) -> dict[str, int]:
    """Dimensions of every tensor whose shape is known."""
    import onnx

    graph = model.graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(steps.without_weights(model)).graph
    for value in (*inferred.input, *inferred.value_info):
        if value.type.tensor_type.HasField("shape"):
            ranks.setdefault(value.name, len(value.type.tensor_type.shape.dim))
    return ranks


def _carrying(node: Any, ranks: Mapping[str, int]) -> tuple[int, ...]:
    """Which inputs carry tokens, if the operator treats each token by itself; else none."""
    if len(node.output) != 1:
        return ()
    found = [ranks.get(name, 3) for name in node.input]
    if node.op_type in _SCALED and found[0] == 3 and not any(found[1:]):  # a scale per channel would need its axis
        return (0,)
    if node.op_type == "MatMul" and found == [3, 2]:
        return (0,)
    if node.op_type == "LayerNormalization" and found[0] == 3 and _attribute(node, "axis", -1) in (-1, 2):
        return (0,)
    if node.op_type in _ELEMENTWISE and all(rank == 3 or rank <= 1 for rank in found):
        return tuple(position for position, rank in enumerate(found) if rank == 3)
    return ()


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _set_axis(node: Any, axis: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = axis


def _copy(node: Any) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    return copied
