"""Looking at and saving ONNX graphs: fused-operator counts, zero points, versions, external data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from aios_edge.errors import PromiseBroken

MODEL = "model.onnx"
EXTERNAL = "model.onnx.data"
#: The oldest runtime that must load a bundle is onnxruntime 1.23 (Python 3.10 stops there). It knows opset 23; 20 is
#: the newest that anything here writes, and was loaded and run there.
MAX_IR = 11
MAX_OPSET = 20
_EXTERNAL_FROM_BYTES = 1024
_GELU = ("BiasGelu", "Gelu", "FastGelu")
_ATTENTION = ("Attention", "QAttention")
_NORM = ("LayerNormalization", "SkipLayerNormalization")


def load(path: Path) -> Any:
    """The whole model, external data included."""
    import onnx

    return onnx.load(str(path))


def save(model: Any, folder: Path) -> None:
    """``model.onnx`` + ``model.onnx.data``: weights beside the graph are mapped into memory, not copied.

    Raises :class:`PromiseBroken` (``opset``) when onnxruntime 1.23 could not load it.
    """
    import onnx

    used = {node.domain for node in model.graph.node} | {""}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)  # offline optimisation lists every domain the runtime knows
    opset = next((entry.version for entry in opsets if entry.domain in ("", "ai.onnx")), 0)
    if model.ir_version > MAX_IR or opset > MAX_OPSET:
        what = f"the graph has opset {opset}, IR {model.ir_version}; at most {MAX_OPSET} and {MAX_IR} load everywhere"
        raise PromiseBroken("opset", what, where="convert")
    onnx.save_model(
        model,
        str(folder / MODEL),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=EXTERNAL,
        size_threshold=_EXTERNAL_FROM_BYTES,
    )


def save_whole(model: Any, path: Path) -> None:
    """One file, weights inside (below 2 GB): for what is only a step on the way."""
    import onnx

    onnx.save(model, str(path))


def size_bytes(folder: Path) -> int:
    """Model and external data together."""
    return sum(path.stat().st_size for path in model_files(folder).values())


def model_files(folder: Path) -> dict[str, Path]:
    """The files that ship, by their name in the bundle."""
    return {name: folder / name for name in (MODEL, EXTERNAL) if (folder / name).is_file()}


def operator_counts(path: Path) -> Counter[str]:
    """How often each operator occurs."""
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def check_fusion(counts: Counter[str], *, layers: int, where: str, gelu: bool = True) -> None:
    """Raise :class:`PromiseBroken` (``fusion``) unless every layer of a BERT-class encoder was fused.

    Lost fusion is silent otherwise: the model stays right and becomes slow. ``gelu``: it has GELUs at all.
    """
    found = {
        "attention": (sum(counts[name] for name in _ATTENTION), layers),
        "GELU": (sum(counts[name] for name in _GELU), layers if gelu else 0),
        "layer norm": (sum(counts[name] for name in _NORM), 2 * layers),
    }
    lost = [f"{name} {seen} of {wanted}" for name, (seen, wanted) in found.items() if seen < wanted]
    if lost:
        raise PromiseBroken(
            "fusion",
            f"the graph optimizer fused {', '.join(lost)}",
            where=where,
            remedy="Use the versions of torch, transformers and onnxruntime in constraints.txt",
        )


def constant_matmuls(path: Path) -> tuple[str, ...]:
    """Names of the MatMul nodes whose second input is a weight.

    The others multiply activations; quantizing those would calibrate the attention mask's huge negative numbers.
    """
    model = load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    return tuple(n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights)


def check_zero_points(path: Path) -> None:
    """Raise :class:`PromiseBroken` (``symmetric``) unless each QuantizeLinear and DequantizeLinear has zero point 0."""
    from onnx import numpy_helper

    model = load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        count += 1
        name = node.input[2] if len(node.input) > 2 else ""
        if name and (name not in tensors or numpy_helper.to_array(tensors[name]).any()):
            what = f"node '{node.name}' has a zero point other than 0, which TensorRT refuses"
            raise PromiseBroken("symmetric", what, where=path.name)
    if not count:
        raise PromiseBroken("symmetric", "no node was quantized", where=path.name)
