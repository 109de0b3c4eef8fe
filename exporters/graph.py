"""Looking at and saving ONNX graphs: fused-operator counts, zero points, versions, external data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aios_edge.errors import PromiseBroken

MODEL = "model.onnx"
EXTERNAL = "model.onnx.data"
#: The oldest runtime that must load a bundle is onnxruntime 1.23 (Python 3.10 stops there). It knows opset 23; 20 is
#: the newest that anything here writes, and was loaded and run there.
MAX_IR = 11
MAX_OPSET = 20
_EXTERNAL_FROM_BYTES = 1024
#: What is fused -> the operators that it becomes, and one that shows where it didn't: there it keeps torch's name.
_FUSED = {
    "attention": (("Attention", "QAttention"), ("Softmax",)),
    "GELU": (("BiasGelu", "Gelu", "FastGelu"), ("Erf", "Tanh")),
    "layer norm": (("LayerNormalization", "SkipLayerNormalization"), ("ReduceMean",)),
}
_LAYER = re.compile(r"\blayer\.(\d+)\b")  # as torch's names have it
#: Operators that take integers and give floats at once; what onnxruntime's CPU provider has fast kernels for.
_INTEGER = ("QAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_QUANTIZED = "_quant"  # what onnxruntime's quantizer puts behind a name
_SHOWN = 3


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


def size_bytes(folder: Path) -> int:
    """Model and external data together."""
    return sum(path.stat().st_size for path in model_files(folder).values())


def model_files(folder: Path) -> dict[str, Path]:
    """The files that ship, by their name in the bundle."""
    return {name: folder / name for name in (MODEL, EXTERNAL) if (folder / name).is_file()}


def outline(path: Path) -> Any:
    """The model without the weights that lie beside it."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def operator_counts(path: Path) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in outline(path).graph.node)


def check_fusion(model: Any, *, layers: int, where: str, gelu: bool = True) -> None:
    """Raise :class:`PromiseBroken` (``fusion``) unless every layer of a BERT-class encoder was fused; what was not is
    named by a node that is left of it.

    Lost fusion is silent otherwise: the model stays right and becomes slow. ``gelu``: it has GELUs at all.
    """
    counts = Counter(node.op_type for node in model.graph.node)
    least = {"attention": layers, "GELU": layers if gelu else 0, "layer norm": 2 * layers}
    lost, told, untold = [], [], 0
    for kind, (fused, pieces) in _FUSED.items():
        left = _left(model, pieces) if least[kind] else []
        seen = sum(counts[name] for name in fused)
        wanted = max(least[kind], seen + len(left))  # head and embeddings may have one more, which would hide a loss
        if seen < wanted:
            lost.append(f"{kind} {seen} of {wanted}")
            told += left
            untold += wanted - seen - len(left)
    if lost:
        names = f"; left: {_listed(told)}" if told else ""
        silent = f"; of {untold} no node tells where" if untold else ""
        raise PromiseBroken(
            "fusion",
            f"the graph optimizer fused {', '.join(lost)}{names}{silent}",
            where=where,
            remedy="Use the versions of torch, transformers and onnxruntime in constraints.txt",
        )


def _left(model: Any, pieces: Sequence[str]) -> list[str]:
    """Nodes of these operators with their layer, one of each module."""
    found: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name or node.output[0]
        layer = _LAYER.search(name)
        if node.op_type in pieces and (layer or node.op_type != "Tanh"):  # a pooler's own Tanh stays one
            told = f"'{name}' (layer {layer[1]})" if layer else f"'{name}'"
            found.setdefault(name.rpartition("/")[0], told)
    return list(found.values())


def _listed(told: Sequence[str]) -> str:
    return ", ".join(told[:_SHOWN]) + (f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "")


def products(model: Any) -> list[str]:
    """Names of the nodes that multiply something computed from an input with a constant matrix."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    computed = {entry.name for entry in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if computed.intersection(node.input):
            computed.update(node.output)
        if node.op_type in ("MatMul", "Attention") and node.input[0] in computed and node.input[1] in matrices:
            found.append(node.name)
    return found


def check_products(model: Any, wanted: Sequence[str], *, where: str) -> None:
    """Raise :class:`PromiseBroken` (``fusion``) unless each of the ``wanted`` products (nodes, by their name before it)
    became one operator on integers; one that stays in float, or falls into pieces, is right and slow."""
    names = [(node.name.removesuffix(_QUANTIZED), node.op_type) for node in model.graph.node]
    # By name, because another operator would make up the number; counted, because names may be repeated.
    lost = Counter(wanted) - Counter(name for name, operator in names if operator in _INTEGER)
    if not lost:
        return
    left = {name: operator for name, operator in names if operator not in _INTEGER}
    told = [f"'{name}' ({left.get(name, 'gone')})" for name in lost.elements()]
    done = f"{len(wanted) - len(told)} of {len(wanted)} products run on 8-bit integers in one operator"
    raise PromiseBroken(
        "fusion",
        f"{done}; not {_listed(told)}",
        where=where,
        remedy="Use the version of onnxruntime in constraints.txt",
    )


def split_gemms(model: Any) -> int:
    """Each plain ``Gemm`` as ``MatMul`` and ``Add``, in place, unless others read its weight too; how many.

    Heads are written as Gemm; everything that quantizes looks for MatMul, and onnxruntime has no 8-bit kernel for a
    Gemm whose bias is float. A constant weight is transposed where it lies, a computed one by an operator.
    """
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    arranged, count = [], 0
    for node in model.graph.node:
        keys = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        plain = not keys.get("transA") and keys.get("alpha", 1.0) == 1.0 == keys.get("beta", 1.0)
        own = node.op_type == "Gemm" and uses[node.input[1]] == 1
        if not (own and plain and len(node.input) == 3):
            arranged.append(node)
            continue
        count += 1
        activation, weight, bias = node.input
        if keys.get("transB") and weight not in tensors:
            stored, weight = weight, f"{weight}/turned"
            arranged.append(helper.make_node("Transpose", [stored], [weight], name=weight, perm=[1, 0]))
        elif keys.get("transB"):
            turned = np.ascontiguousarray(numpy_helper.to_array(tensors[weight]).T)
            tensors[weight].CopyFrom(numpy_helper.from_array(turned, weight))
        product = f"{node.output[0]}/product"
        arranged.append(helper.make_node("MatMul", [activation, weight], [product], name=node.name))
        arranged.append(helper.make_node("Add", [product, bias], list(node.output), name=f"{node.name}/bias"))
    copies = [type(node).FromString(node.SerializeToString()) for node in arranged]  # they live in what is emptied
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return count


def check_zero_points(model: Any) -> None:
    """Raise :class:`PromiseBroken` (``symmetric``) unless each QuantizeLinear and DequantizeLinear has zero point 0."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        count += 1
        name = node.input[2] if len(node.input) > 2 else ""
        if name and (name not in tensors or numpy_helper.to_array(tensors[name]).any()):
            what = f"node '{node.name}' has a zero point other than 0, which TensorRT refuses"
            raise PromiseBroken("symmetric", what, where="quantize")
    if not count:
        raise PromiseBroken("symmetric", "no node was quantized", where="quantize")
