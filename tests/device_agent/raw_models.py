"""Raw ONNX models for tests: written node by node, and two that many tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aios_edge.oip.datatypes import DTYPES, Tensor, narrow_bf16

NUMBERS = sorted(set(DTYPES) - {"BYTES"})
KINDS = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}


def kind(datatype: str) -> int:
    from onnx import TensorProto

    number: int = getattr(TensorProto, KINDS.get(datatype, datatype))
    return number


def write(folder: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **options: Any) -> None:
    """``folder/model.onnx``; tensors as ``name: (datatype, shape)``, or (datatype,) for a sequence of them."""
    import onnx
    from onnx import helper

    folder.mkdir(parents=True)
    ends = [
        [
            helper.make_tensor_value_info(name, kind(datatype), *shape)
            if shape
            else helper.make_tensor_sequence_value_info(name, kind(datatype), None)
            for name, (datatype, *shape) in side.items()
        ]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *ends, options.pop("initializers", []))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, folder / "model.onnx", **options)


def echo(folder: Path, datatypes: list[str], shape: list[Any]) -> None:
    from onnx import helper

    nodes = [helper.make_node("Identity", [f"in_{d}"], [f"out_{d}"]) for d in datatypes]
    names = {
        datatype: [f"{datatype}_{dim}" if isinstance(dim, str) else dim for dim in shape] for datatype in datatypes
    }
    inputs, outputs = ({f"{side}_{d}": (d, names[d]) for d in datatypes} for side in ("in", "out"))
    write(folder, nodes, inputs, outputs)


def scale(folder: Path, factor: float) -> None:
    """y = x * factor, the factor in a file beside the model."""
    from onnx import helper, numpy_helper

    table = numpy_helper.from_array(np.full(400, factor, dtype=np.float32), "table")
    nodes = [helper.make_node("Mul", ["x", "table"], ["y"])]
    tensor = ("FP32", ["n", 400])
    options = {"save_as_external_data": True, "location": "weights", "size_threshold": 0, "convert_attribute": False}
    write(folder, nodes, {"x": tensor}, {"y": tensor}, initializers=[table], **options)


def some(datatype: str, shape: tuple[int, ...]) -> Tensor:
    """Values at the edges of the datatype."""
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, dtype=np.object_)
        array[:] = ["ä\0b".encode(), b"", b"x" * 300][:count]
    elif datatype == "BOOL":
        array = np.arange(count) % 2 == 1
    elif datatype in ("BF16", "FP16", "FP32", "FP64"):
        wide = np.array([-0.0, 1 / 3, -3.0e4][:count], dtype=np.float32)
        array = narrow_bf16(wide) if datatype == "BF16" else wide.astype(DTYPES[datatype])
    else:
        limits = np.iinfo(DTYPES[datatype])
        array = np.array([limits.min, limits.max, 7][:count], dtype=DTYPES[datatype])
    return Tensor(datatype, array.reshape(shape))
