"""The datatypes of the Open Inference Protocol and the numpy arrays that hold them.

numpy has no BF16: such a tensor is held as its bit patterns in uint16 under the tag ``BF16``, which loses nothing
(NaN payloads included) and is what onnxruntime's raw buffers want. :func:`widen_bf16` and :func:`narrow_bf16`
convert to and from float32. BYTES are object arrays of ``bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RequestError

#: Datatype -> the numpy type that holds it; little-endian is the wire's order.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
INTEGERS = frozenset(name for name in DTYPES if "INT" in name)

_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in ("BF16", "BYTES")}


class Tensor(msgspec.Struct, frozen=True):
    """An array and its datatype, which says more than the array's dtype for BF16 and BYTES."""

    datatype: str
    array: NDArray[Any]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Tensor:
        """The tensor of an array: strings and bytes become BYTES; uint16 is UINT16, never BF16.

        Raises :class:`RequestError` for a dtype the protocol doesn't have.
        """
        if array.dtype.kind in "SUO":
            return cls("BYTES", _bytes_array(array))
        if (name := _NAMES.get(array.dtype.newbyteorder("<"))) is None:
            raise RequestError(
                f"numpy's {array.dtype} has no datatype in the protocol", remedy="Convert the array first"
            )
        return cls(name, array.astype(DTYPES[name], copy=False))


def dtype_of(datatype: str, where: str) -> np.dtype[Any]:
    """The numpy type of a datatype; raises :class:`RequestError` for an unknown one."""
    if (dtype := DTYPES.get(datatype)) is None:
        raise RequestError(f"{datatype[:20]!r} is not a datatype", where=where, remedy=f"Known: {', '.join(DTYPES)}")
    return dtype


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16 bit patterns as float32, exactly: BF16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to the nearest BF16, ties to even, as bit patterns; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN's payload away
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _bytes_array(array: NDArray[Any]) -> NDArray[Any]:
    """An object array of bytes from one of str, bytes or objects of both."""
    result = np.empty(array.shape, dtype=np.object_)
    for index, item in enumerate(array.ravel().tolist()):
        if not isinstance(item, (str, bytes)):
            raise RequestError(f"element {index} is {type(item).__name__}, not text or bytes")
        result.flat[index] = item.encode() if isinstance(item, str) else item
    return result
