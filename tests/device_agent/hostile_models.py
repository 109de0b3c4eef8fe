"""Raw ONNX models that somebody made to do harm, or that are broken in ways a tool doesn't make them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Build = Callable[[Path], None]
X = {"x": ["n"]}
Y = {"y": ["n"]}


def model(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], *more: Any, kind: int = TensorProto.INT64
) -> bytes:
    """A model of INT64 tensors; ``more``: initializers. The ``kind`` of the outputs may be another."""
    ends = [
        [helper.make_tensor_value_info(name, of, shape) for name, shape in side.items()]
        for side, of in ((inputs, TensorProto.INT64), (outputs, kind))
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.evil", 1)]
    graph = helper.make_graph(nodes, "g", *ends, list(more))
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()  # type: ignore[no-any-return]


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def file(content: bytes) -> Build:
    def build(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(content)

    return build


def weights(name: str, dims: list[int], raw: bytes = b"1234") -> Any:
    """A tensor that says it has these dimensions."""
    tensor = TensorProto()
    tensor.name, tensor.data_type, tensor.raw_data = name, TensorProto.FLOAT, raw
    tensor.dims.extend(dims)
    return tensor


def external(location: str, beside: Build = lambda folder: None, **more: str) -> Build:
    """A model that gives away 16 bytes of a file."""
    tensor = TensorProto()
    tensor.name, tensor.data_type, tensor.data_location = "w", TensorProto.INT8, TensorProto.EXTERNAL
    tensor.dims.extend([16])
    for key, value in {"location": location, "offset": "0", "length": "16", **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    content = model([node("Identity", ["w"], ["y"])], {}, {"y": [16]}, tensor, kind=TensorProto.INT8)

    def build(folder: Path) -> None:
        file(content)(folder)
        beside(folder)

    return build


def link(name: str, target: str) -> Build:
    return lambda folder: (folder / name).symlink_to(target)


def pipe(name: str) -> Build:
    return lambda folder: os.mkfifo(folder / name)


def sixteen(folder: Path) -> None:
    (folder / "w").write_bytes(bytes(16))


IDENTITY = model([node("Identity", ["x"], ["y"])], X, Y)

#: Refused, with the check that refuses it and what its reason says.
REFUSED: dict[str, tuple[Build, str, str]] = {
    "nothing": (file(b""), "load", "can't load"),
    "noise": (file(random.Random(0).randbytes(5000)), "load", "can't load"),
    "text": (file(b"# not a model\n" * 40), "load", "can't load"),
    "cut off": (file(IDENTITY[:-7]), "load", "can't load"),
    "something behind it": (file(IDENTITY + b"\xff" * 20), "load", "can't load"),
    "a field of 32 GB": (file(b"\x3a\xff\xff\xff\xff\x7f" + IDENTITY), "load", "can't load"),
    "an operator of its own": (
        file(model([node("Foo", ["x"], ["y"], domain="com.evil")], X, Y)),
        "load",
        "com.evil:Foo",
    ),
    "no such operator": (file(model([node("Foo", ["x"], ["y"])], X, Y)), "load", "Foo"),
    "a circle": (file(model([node("Add", ["x", "y"], ["z"]), node("Neg", ["z"], ["y"])], X, Y)), "load", "acyclic"),
    "an input from nowhere": (file(model([node("Add", ["x", "z"], ["y"])], X, Y)), "load", "'z'"),
    "a lie about a datatype": (
        file(model([node("Identity", ["x"], ["y"])], X, Y, kind=TensorProto.FLOAT)),
        "load",
        "tensor(float)",
    ),
    "weights of negative size": (
        file(model([node("Identity", ["w"], ["y"])], X, {"y": None}, weights("w", [-4]), kind=TensorProto.FLOAT)),
        "load",
        "dimensions",
    ),
    "weights beyond 64 bits": (
        file(
            model([node("Identity", ["w"], ["y"])], X, {"y": None}, weights("w", [2**33] * 2), kind=TensorProto.FLOAT)
        ),
        "load",
        "overflow",
    ),
    "data that lie outside": (external("../../secret"), "load", "../../secret"),
    "data by a whole path": (external("/etc/hostname"), "load", "absolute path"),
    "data that aren't there": (external("w"), "load", "can't load"),
    "data behind their end": (external("w", sixteen, offset="99999999999"), "load", "can't load"),
    "data before their beginning": (external("w", sixteen, offset="-5"), "load", "can't load"),
    "data behind a link": (external("w", link("w", "../../secret")), "repository", "w is a link"),
    "data behind a link to a folder": (external("d/secret", link("d", "../..")), "repository", "d is a link"),
    "a device for data": (external("w", link("w", "/dev/zero")), "repository", "w is a link"),
    "a pipe for data": (external("w", pipe("w")), "repository", "w is neither"),
    "a pipe that nobody names": (lambda folder: (file(IDENTITY)(folder), pipe("p")(folder))[0], "repository", "p is"),
    "a link for a model": (link("model.onnx", "/etc/hostname"), "repository", "model.onnx is a link"),
}


def endless() -> bytes:
    """Adds one to the text of x as often as x says."""
    ends = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("a", TensorProto.INT64, ["n"]),
    ]
    results = [
        helper.make_tensor_value_info("d", TensorProto.BOOL, []),
        helper.make_tensor_value_info("b", TensorProto.INT64, ["n"]),
    ]
    nodes = [node("Identity", ["c"], ["d"]), node("Add", ["a", "one"], ["b"])]
    body = helper.make_graph(nodes, "body", ends, results)
    return model(
        [node("Squeeze", ["x"], ["times"]), node("Loop", ["times", "", "zero"], ["y"], body=body)],
        {"x": [1]},
        {"y": [1]},
        numpy_helper.from_array(np.array([1], dtype=np.int64), "one"),
        numpy_helper.from_array(np.array([0], dtype=np.int64), "zero"),
    )


def slow_to_load(seconds: float = 60.0) -> bytes:
    """Products of constants, which are computed while it is loaded: far more than ``seconds`` on any device."""
    side = 4096
    shape = numpy_helper.from_array(np.array([side, side], dtype=np.int64), "shape")
    nodes = [node("ConstantOfShape", ["shape"], ["m0"])]
    nodes += [node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(int(10 * seconds))]
    nodes += [node("Identity", [f"m{int(10 * seconds)}"], ["y"])]
    return model(nodes, {}, {"y": None}, shape, kind=TensorProto.FLOAT)


#: Loaded, and then: a division that ends the process (on x86, by -1), a loop without end, more rows than it said, more
#: elements than can be counted.
SERVED = {
    "divides": model(
        [node("Div", ["least", "x"], ["y"])],
        X,
        Y,
        numpy_helper.from_array(np.array([-(2**63)], dtype=np.int64), "least"),
    ),
    "loops": endless(),
    "lies": model([node("Identity", ["x"], ["y"])], X, {"y": [2]}),
    "grows": model([node("ConstantOfShape", ["x"], ["y"])], {"x": [2]}, {"y": None}, kind=TensorProto.FLOAT),
}
