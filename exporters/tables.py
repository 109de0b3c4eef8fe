"""Embedding tables in 8 bits, one scale per channel, dequantized after the lookup: a quarter of the answer's error.

onnxruntime's fused quantized embedding has one scale for a whole table, and a single large entry then costs all others
their precision. Looked up first and dequantized after, in standard operators, a table may have a scale per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters import rare_rows

#: Smaller tables stay as they are: they save nothing.
LEAST_ENTRIES = 4096


def quantize_tables(model: Any, counts: Mapping[str, NDArray[np.intp]] | None = None, bits: int = 4) -> tuple[int, int]:
    """Turn every lookup in a float table [entries, width] into s8 lookup and dequantization, in place; how many tables,
    and how many of them have fewer bits for rare rows.

    ``counts``: how often each value of an input of the model occurs in training. A table that such an input looks up,
    and nobody else, keeps 8 bits for the rows in use only; the others, if any, get ``bits``
    (:mod:`exporters.rare_rows`), where its width allows it.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = _looked_up(graph)
    lookups = [node for node in graph.node if _looks_up(node, tables)]
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tables.items()}
    split = {}  # table -> its lookup's nodes
    for node in lookups:
        name, ids = node.input
        own = sum(other.input[0] == name for other in lookups) == 1
        if name in arrays and own and ids in (counts or {}) and rare_rows.can_split(arrays[name].shape[1], bits):
            fine = rare_rows.fine_rows((counts or {})[ids], len(arrays[name]))
            if len(fine) == len(arrays[name]):
                continue  # no row is rare
            table = arrays.pop(name)
            split[name], constants = rare_rows.lookup(name, ids, node.output[0], table, fine, bits)
            graph.initializer.extend(constants)
    arranged = []
    for node in graph.node:
        name = node.input[0] if _looks_up(node, tables) else ""
        if name in split:
            arranged += split[name]
            continue
        arranged.append(node)
        if name in arrays:
            output = node.output[0]
            raw, steps = f"{output}/s8", f"{output}/steps"
            # Not DequantizeLinear: its kernel is slow where the scale runs along the last axis.
            arranged.append(helper.make_node("Cast", [raw], [steps], name=steps, to=TensorProto.FLOAT))
            arranged.append(helper.make_node("Mul", [steps, f"{name}/scale"], [output], name=output))
            node.output[0] = raw
    for name, table in arrays.items():
        entries, scale = rare_rows.in_s8(table)
        tables[name].CopyFrom(numpy_helper.from_array(entries, name))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}/scale"))
    _arrange(graph, arranged)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in split:
            del graph.initializer[index]
    return len(arrays) + len(split), len(split)


def halve_tables(model: Any) -> int:
    """Turn every lookup in a float table into one in fp16 and a cast, in place; how many tables. For who takes standard
    operators only, and has no use for integers that nothing multiplies: TensorRT."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {
        name: tensor
        for name, tensor in _looked_up(graph).items()
        if _reach(numpy_helper.to_array(tensor)) <= float(np.finfo(np.float16).max)
    }
    arranged = []
    for node in graph.node:
        arranged.append(node)
        if _looks_up(node, tables):
            output, half = node.output[0], f"{node.output[0]}/half"
            arranged.append(helper.make_node("Cast", [half], [output], name=output, to=TensorProto.FLOAT))
            node.output[0] = half
    for name, tensor in tables.items():
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name))
    _arrange(graph, arranged)
    return len(tables)


def _looked_up(graph: Any) -> dict[str, Any]:
    """The float tables large enough to save something that are looked up by row, and nothing else; by name."""
    from onnx import TensorProto

    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= LEAST_ENTRIES
    }
    found = {node.input[0] for node in graph.node if _looks_up(node, tables)}
    # A table that is multiplied with as well stays whole.
    found -= {name for node in graph.node if not _looks_up(node, tables) for name in node.input}
    return {name: tables[name] for name in sorted(found)}


def _looks_up(node: Any, tables: Mapping[str, Any]) -> bool:
    return node.op_type == "Gather" and node.input[0] in tables and _axis(node) == 0


def _reach(table: NDArray[Any]) -> float:
    return max(float(table.max()), -float(table.min()))  # no copy: a table may be gigabytes


def _axis(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _arrange(graph: Any, nodes: list[Any]) -> None:
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]  # they live in what is emptied
    del graph.node[:]
    graph.node.extend(copies)
