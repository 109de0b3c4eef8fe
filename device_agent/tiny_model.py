"""ONNX models of one node, written as protobuf by hand: the agent's install has no package that writes ONNX.

What an execution provider does with them shows whether it starts here at all, whatever becomes of a real model.
"""

from __future__ import annotations

FLOAT, STRING = 1, 8  # onnx.TensorProto.DataType


def identity(element_type: int = FLOAT) -> bytes:
    """y = Identity(x) of one element (IR 8, opset 13). Accelerators take floats; strings are left to the CPU."""
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity")
    tensors = _field(11, _tensor(b"x", element_type)) + _field(12, _tensor(b"y", element_type))
    graph = _field(1, node) + _field(2, b"g") + tensors
    return b"\x08\x08" + _field(7, graph) + _field(8, b"\x10\x0d")


def _tensor(name: bytes, element_type: int) -> bytes:
    shape = _field(2, _field(1, b"\x08\x01"))  # one dimension of 1
    return _field(1, name) + _field(2, _field(1, bytes([8, element_type]) + shape))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content
