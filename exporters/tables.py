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
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= LEAST_ENTRIES
    }

    def looks_up(node: Any) -> bool:
        return node.op_type == "Gather" and node.input[0] in tables and _axis(node) == 0

    lookups = [node for node in graph.node if looks_up(node)]
    looked_up = {node.input[0] for node in lookups}
    # A table that is multiplied with as well stays whole.
    looked_up -= {name for node in graph.node if not looks_up(node) for name in node.input}
    arrays = {name: numpy_helper.to_array(tables[name]) for name in sorted(looked_up)}
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
        name = node.input[0] if looks_up(node) else ""
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
    copies = [type(node).FromString(node.SerializeToString()) for node in arranged]  # they live in what is emptied
    del graph.node[:]
    graph.node.extend(copies)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in split:
            del graph.initializer[index]
    return len(arrays) + len(split), len(split)


def _axis(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)
