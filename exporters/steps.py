"""Graphs that are a step on the way to a candidate: one file each, however large the model.

A protobuf message ends at 2 GB, so beyond a threshold the weights of a graph lie beside it. What ships has them there
always (:func:`exporters.graph.save`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

#: From so many bytes of weights on, they lie beside the graph.
APART_FROM_BYTES = 1_800_000_000
_EXTERNAL_FROM_BYTES = 1024
_PAGE_BYTES = 4096


def save(model: Any, path: Path, *, outputs: Sequence[Any] = ()) -> None:
    """For what is only a step on the way: one file, or with the weights beside it where they are too many for one.

    The model stays as it is; ``outputs`` are added in the file.
    """
    import onnx

    remove(path)
    if is_large(model):
        model = _pointing(model, beside(path))
    elif outputs:
        model = type(model).FromString(model.SerializeToString())
    model.graph.output.extend(outputs)
    onnx.save(model, str(path))


def settle(path: Path) -> None:
    """Bring a foreign exporter's file into the form of :func:`save`: beyond 2 GB torch writes a file a weight."""
    import onnx
    from onnx import external_data_helper as external

    bare = onnx.load(str(path), load_external_data=False)
    scattered = {
        external.ExternalDataInfo(tensor).location
        for tensor in bare.graph.initializer
        if external.uses_external_data(tensor)
    }
    if scattered or is_large(bare):
        model = onnx.load(str(path))
        for name in scattered:
            (path.parent / name).unlink()
        save(model, path)


def is_large(model: Any) -> bool:
    """Whether its weights must lie beside it: a protobuf message ends at 2 GB."""
    from onnx import helper

    weights = (helper.tensor_dtype_to_np_dtype(t.data_type).itemsize * prod(t.dims) for t in model.graph.initializer)
    return bool(sum(weights) >= APART_FROM_BYTES)


def beside(path: Path) -> Path:
    """Where the weights of a step lie, if not in its graph; onnxruntime's tools put them there too."""
    return path.with_name(path.name + ".data")


def lies_apart(path: Path) -> bool:
    """Whether a graph's weights lie beside it."""
    return beside(path).is_file()


def size_bytes(path: Path) -> int:
    """A graph with its weights, wherever they lie."""
    return path.stat().st_size + (beside(path).stat().st_size if lies_apart(path) else 0)


def remove(path: Path) -> None:
    """A graph that was a step on the way, and its weights."""
    path.unlink(missing_ok=True)
    beside(path).unlink(missing_ok=True)


def without_weights(model: Any) -> Any:
    """The same graph, with inputs where its large initializers were: all that the inference of shapes looks at."""
    from onnx import helper

    bare = _hollow(model)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _EXTERNAL_FROM_BYTES:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def with_weights(bare: Any, model: Any) -> Any:
    """A graph made by :func:`without_weights` with those of ``model`` again, each in the type that it has there now."""
    from onnx import helper, numpy_helper

    inputs = {entry.name: entry for entry in bare.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in inputs:
            continue
        wanted = inputs.pop(tensor.name).type.tensor_type.elem_type
        if wanted != tensor.data_type:
            array, kind = numpy_helper.to_array(tensor), helper.tensor_dtype_to_np_dtype(wanted)
            most = np.finfo(kind).max
            tensor = numpy_helper.from_array(np.clip(array, -most, most).astype(kind), tensor.name)
        bare.graph.initializer.append(tensor)
    kept = [entry for entry in bare.graph.input if entry.name in inputs]
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]  # they live in what is emptied
    del bare.graph.input[:]
    bare.graph.input.extend(copies)
    return bare


def _pointing(model: Any, weights: Path) -> Any:
    """The model with its large initializers in the file ``weights``, each at a multiple of a page."""
    from onnx import TensorProto, external_data_helper, numpy_helper

    light = _hollow(model)
    with weights.open("wb") as stream:
        for tensor in model.graph.initializer:
            data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()  # one copy of a table is enough
            if len(data) < _EXTERNAL_FROM_BYTES:
                light.graph.initializer.append(tensor)
                continue
            stream.write(bytes(-stream.tell() % _PAGE_BYTES))
            entry = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=b"-")
            external_data_helper.set_external_data(entry, weights.name, stream.tell(), len(data))
            entry.ClearField("raw_data")
            light.graph.initializer.append(entry)
            stream.write(data)
    return light


def _hollow(model: Any) -> Any:
    """A copy without initializers."""
    hollow = type(model)()
    _copy_fields(model, hollow, but="graph")
    _copy_fields(model.graph, hollow.graph, but="initializer")
    return hollow


def _copy_fields(source: Any, target: Any, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "MergeFrom"):  # a message, or a list
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)
