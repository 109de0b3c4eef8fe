"""Between numpy and onnxruntime: BF16, which numpy doesn't have, and text, which the protocol has as bytes.

BF16 tensors are bit patterns in uint16 (:mod:`aios_edge.oip.datatypes`) and stay that to the last bit: they go in as an
``OrtValue`` over the array and come out of its memory. Nothing here imports onnxruntime; ``ort`` is the module.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RequestError
from aios_edge.manifest import TensorSpec
from device_agent.wide_outputs import narrowed, wide_name

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def unservable(ort: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """Why this onnxruntime can't pass these tensors through Python; None when it can."""
    takes, gives = ({spec.datatype for spec in specs} for specs in (inputs, outputs))
    if "BF16" not in takes | gives:
        return None
    if not hasattr(ort.OrtValue, "ortvalue_from_numpy_with_onnx_type"):  # before 1.20
        return f"onnxruntime {ort.__version__} has no way to pass BF16 tensors in or out of Python"
    return None


def run_session(
    ort: Any,
    session: Any,
    outputs: Sequence[TensorSpec],
    datatypes: Mapping[str, str],
    inputs: Mapping[str, Any],
    *,
    wide: bool = False,
) -> list[NDArray[Any]]:
    """Run a session once; ``datatypes`` are those of the inputs, ``wide``: its BF16 outputs are read in FP32.

    Raises :class:`RequestError` for text that isn't UTF-8, and whatever onnxruntime raises.
    """
    names = [spec.name for spec in outputs]
    feeds = {name: _fed(ort, name, array, datatypes[name]) for name, array in inputs.items()}
    if wide:
        arrays = session.run([wide_name(spec) for spec in outputs], feeds)
        found = [
            narrowed(array) if spec.datatype == "BF16" else array for spec, array in zip(outputs, arrays, strict=True)
        ]
    elif any(spec.datatype == "BF16" for spec in outputs):
        values = {
            name: feed if isinstance(feed, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(feed)
            for name, feed in feeds.items()
        }
        found = [_array(value) for value in session.run_with_ort_values(names, values)]
    else:
        found = session.run(names, feeds)
    return [_as_bytes(array) if array.dtype.kind in "OU" else array for array in found]


def _fed(ort: Any, name: str, array: NDArray[Any], datatype: str) -> Any:
    if datatype == "BF16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(array, order="C"), _BFLOAT16)
    return _as_texts(name, array) if array.dtype.hasobject else array


def _array(value: Any) -> NDArray[Any]:
    if value.element_type() != _BFLOAT16:
        array: NDArray[Any] = value.numpy()
        return array
    if value.device_name().lower() != "cpu":  # never seen: outputs that nobody bound are brought to the CPU
        raise RuntimeError(f"a BF16 output lies on {value.device_name()}")
    shape = tuple(value.shape())
    data = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape)) if math.prod(shape) else b""
    return np.frombuffer(data, dtype="<u2").reshape(shape)


def _as_texts(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """onnxruntime takes strings as str."""
    texts = np.empty(array.shape, dtype=np.object_)
    for index, item in enumerate(array.ravel().tolist()):
        try:
            texts.flat[index] = item.decode() if isinstance(item, bytes) else str(item)
        except UnicodeDecodeError:
            raise RequestError(f"element {index} is not UTF-8", where=f"input {name!r}") from None
    return texts


def _as_bytes(array: NDArray[Any]) -> NDArray[Any]:
    encoded = np.empty(array.shape, dtype=np.object_)
    for index, item in enumerate(array.ravel().tolist()):
        encoded.flat[index] = item.encode() if isinstance(item, str) else bytes(item)
    return encoded
