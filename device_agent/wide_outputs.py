"""A model's BF16 outputs once more in FP32, for models that take strings.

onnxruntime's Python takes strings only as numpy arrays, and gives BF16 only as an ``OrtValue``, never both in one run.
So the model gets a Cast behind each such output. It is written behind the file's own bytes: of a message that comes in
two parts Protocol Buffers makes one, with the repeated fields of both
(https://protobuf.dev/programming-guides/encoding, "Last One Wins"). Field numbers are those of onnx.proto. Every value
is FP32's as well; only what is no number comes back as another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from aios_edge.manifest import TensorSpec

_SUFFIX = "__aios_fp32"
_FLOAT, _INT = 1, 2  # TensorProto.DataType, AttributeProto.AttributeType
_LENGTH_DELIMITED = 2


def needs_wide_outputs(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> bool:
    """Whether these tensors can't pass through Python as they are."""
    return any(spec.datatype == "BYTES" for spec in inputs) and any(spec.datatype == "BF16" for spec in outputs)


def wide_name(spec: TensorSpec) -> str:
    """Under which name an output is asked for."""
    return spec.name + _SUFFIX if spec.datatype == "BF16" else spec.name


def with_wide_outputs(model: bytes, outputs: Sequence[TensorSpec]) -> bytes:
    """The model with them: an ONNX file, and what is added to its graph."""
    graph = b""
    for spec in outputs:
        if spec.datatype == "BF16":
            ours = wide_name(spec).encode()
            to = _field(1, b"to") + _number(3, _FLOAT) + _number(20, _INT)
            graph += _field(1, _field(1, spec.name.encode()) + _field(2, ours) + _field(4, b"Cast") + _field(5, to))
            graph += _field(12, _field(1, ours) + _field(2, _field(1, _number(1, _FLOAT))))
    return model + _field(7, graph)


def narrowed(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each number, which had no more."""
    return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype("<u2").reshape(array.shape)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
