"""The data of one tensor: JSON and binary, both ways. Checks are complete; shapes and bytes are a stranger's.

``where`` names the tensor in errors. Every function raises :class:`RequestError` and nothing else.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RequestError
from aios_edge.oip.datatypes import DTYPES, FLOATS, INTEGERS, Tensor, dtype_of, narrow_bf16, widen_bf16
from aios_edge.oip.envelope import refuse_json

MAX_RANK = 32  # numpy before 2.0 has no more
MAX_DIM = 2**31 - 1
NOT_ACCEPTABLE = 422
#: As numpy's own arrays lie. Kernels add up apart what lies before the first whole vector, so elsewhere the last bit of
#: an answer would depend on how long the JSON before the data was.
_ALIGNMENT = 16

_LIMITS = {name: (int(np.iinfo(DTYPES[name]).min), int(np.iinfo(DTYPES[name]).max)) for name in INTEGERS}
_LARGE = 256  # elements; up to here Python looks at each of them sooner than numpy
_LENGTH = struct.Struct("<I")
_encoder = msgspec.json.Encoder()
_any_decoder = msgspec.json.Decoder()


def element_count(shape: tuple[int, ...], where: str) -> int:
    """Elements of a shape; 1 for a scalar's ``[]``."""
    if len(shape) > MAX_RANK:
        raise RequestError(f"shape has {len(shape)} dimensions, at most {MAX_RANK} are allowed", where=where)
    for dim in shape:
        if not 0 <= dim <= MAX_DIM:
            raise RequestError(f"dimension {dim} of shape {list(shape)} is not between 0 and {MAX_DIM}", where=where)
    return math.prod(shape)


def from_binary(datatype: str, shape: tuple[int, ...], data: memoryview, where: str) -> NDArray[Any]:
    """An array over ``data``, copied only where its address isn't aligned; the view is read-only."""
    dtype = dtype_of(datatype, where)
    count = element_count(shape, where)
    if datatype == "BYTES":
        return _shaped(_bytes_elements(data, count, where), shape, where)
    if len(data) != count * dtype.itemsize:
        raise RequestError(
            f"has {len(data)} bytes of binary data; shape {list(shape)} of {datatype} takes {count * dtype.itemsize}",
            where=where,
        )
    array: NDArray[Any] = np.frombuffer(data, dtype=np.uint8 if datatype == "BOOL" else dtype)
    if datatype == "BOOL":
        if count and int(array.max()) > 1:
            raise RequestError("a BOOL is a byte 0 or 1", where=where)
        array = array.view(np.bool_)
    if array.__array_interface__["data"][0] % _ALIGNMENT:
        array = array.copy()
    return _shaped(array, shape, where)


def to_binary(tensor: Tensor) -> bytes:
    """Little-endian elements in row-major order; BYTES each behind its length in 4 bytes."""
    if tensor.datatype == "BYTES":
        return b"".join(part for item in tensor.array.ravel().tolist() for part in (_LENGTH.pack(len(item)), item))
    return tensor.array.astype(dtype_of(tensor.datatype, "tensor"), copy=False).tobytes()


def from_json(datatype: str, shape: tuple[int, ...], data: msgspec.Raw, where: str) -> NDArray[Any]:
    """An array from a flat list, or one nested as the shape says; a scalar may also be a bare value."""
    dtype = dtype_of(datatype, where)
    count = element_count(shape, where)
    flat, kinds = _flat(data, shape, where)
    if len(flat) != count:
        raise RequestError(f"has {len(flat)} elements, shape {list(shape)} takes {count}", where=where)
    if datatype == "BYTES":
        _require(flat, kinds, (str,), datatype, where)
        array: NDArray[Any] = np.empty(count, dtype=np.object_)
        array[:] = [item.encode() for item in flat]
    elif datatype == "BOOL":
        _require(flat, kinds, (bool,), datatype, where)
        array = np.array(flat, dtype=dtype)
    elif datatype in FLOATS:
        _require(flat, kinds, (float, int), datatype, where)
        array = _floats(flat, datatype, where)
    else:
        array = _integers(flat, kinds, datatype, dtype, where)
    return _shaped(array, shape, where)


def to_json(tensor: Tensor, where: str, *, status: int = NOT_ACCEPTABLE) -> bytes:
    """A flat JSON list. What JSON can't carry raises :class:`RequestError` with ``status``."""
    array = tensor.array.ravel()
    if tensor.datatype == "BYTES":
        try:
            return _encoder.encode([item.decode() for item in array.tolist()])
        except UnicodeDecodeError:
            what, remedy = "is not UTF-8 text, which is all JSON can carry", "Ask for it as binary data (binary_data)"
            raise RequestError(what, status=status, where=where, remedy=remedy) from None
    if tensor.datatype == "BF16":
        array = widen_bf16(array)
    values = array.tolist()
    finite = tensor.datatype not in FLOATS or (
        np.isfinite(array).all() if len(values) > _LARGE else all(map(math.isfinite, values))
    )
    if not finite:
        what, remedy = "has NaN or infinite values, which JSON can't carry", "Ask for it as binary data (binary_data)"
        raise RequestError(what, status=status, where=where, remedy=remedy)
    return _encoder.encode(values)


def _shaped(array: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):  # an empty tensor whose other dimensions overflow numpy's size
        raise RequestError(f"shape {list(shape)} is too large", where=where) from None


def _bytes_elements(data: memoryview, count: int, where: str) -> NDArray[Any]:
    if count * _LENGTH.size > len(data):  # before anything is allocated for a claimed shape
        raise RequestError(f"{len(data)} bytes are too few for {count} elements, each behind its length", where=where)
    array = np.empty(count, dtype=np.object_)
    offset = 0
    for index in range(count):
        start = offset + _LENGTH.size
        if start > len(data):
            raise RequestError(f"the data end before the length of element {index}", where=where)
        offset = start + _LENGTH.unpack_from(data, start - _LENGTH.size)[0]
        if offset > len(data):
            raise RequestError(f"element {index} is longer than the data", where=where)
        array[index] = bytes(data[start:offset])
    if offset != len(data):
        raise RequestError(f"{len(data) - offset} bytes are left over after the last element", where=where)
    return array


def _flat(data: msgspec.Raw, shape: tuple[int, ...], where: str) -> tuple[list[Any], set[type]]:
    """The elements in row-major order, and of which types they are."""
    try:
        values = _any_decoder.decode(data)
    except Exception as error:
        refuse_json(bytes(data), error, where)
    if not isinstance(values, list):
        if shape:
            raise RequestError("'data' is not a list", where=where)
        return [values], {type(values)}
    kinds = set(map(type, values))
    if list not in kinds:
        return values, kinds
    for depth, dim in enumerate(shape):
        if depth:
            rows, values = values, []
            for row in rows:
                if type(row) is not list:
                    raise RequestError(f"'data' is nested unevenly at depth {depth}", where=where)
                if len(row) != dim:
                    raise RequestError(f"a list at depth {depth} has {len(row)} elements, not {dim}", where=where)
                values += row
        elif len(values) != dim:
            raise RequestError(f"'data' has {len(values)} rows, shape {list(shape)} takes {dim}", where=where)
    return values, set(map(type, values))


def _require(flat: list[Any], kinds: set[type], wanted: tuple[type, ...], datatype: str, where: str) -> None:
    for kind in kinds.difference(wanted):
        index = next(i for i, value in enumerate(flat) if type(value) is kind)
        names = {str: "text", bool: "true or false", float: "a fraction", int: "a number", list: "a list"}
        found = names.get(kind, "null" if kind is type(None) else "an object")
        raise RequestError(f"element {index} is {found}, which is no {datatype}", where=where)


def _integers(flat: list[Any], kinds: set[type], datatype: str, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    _require(flat, kinds, (int, float), datatype, where)
    if float in kinds:
        index = next((i for i, v in enumerate(flat) if type(v) is float and not v.is_integer()), None)
        if index is not None:
            raise RequestError(f"element {index} is a fraction, which is no {datatype}", where=where)
        flat = [int(v) for v in flat]  # 2.0 is an integer to JSON
    wide = _int64(flat) if len(flat) > _LARGE else None
    if flat:
        lowest, highest = _LIMITS[datatype]
        least, most = (min(flat), max(flat)) if wide is None else (int(wide.min()), int(wide.max()))
        if (worst := least) < lowest or (worst := most) > highest:
            raise RequestError(f"{str(worst)[:24]} is out of the range of {datatype}", where=where)
    return np.array(flat, dtype=dtype) if wide is None else wide.astype(dtype, copy=False)


def _int64(flat: list[int]) -> NDArray[np.int64] | None:
    """None where one of them doesn't fit."""
    try:
        return np.array(flat, dtype=np.int64)
    except OverflowError:
        return None


def _floats(flat: list[Any], datatype: str, where: str) -> NDArray[Any]:
    try:
        with np.errstate(over="ignore"):
            wide = np.array([float(value) for value in flat], dtype=np.float64)
            array: NDArray[Any] = wide
            if datatype == "BF16":
                array = narrow_bf16(wide.astype(np.float32))
            elif datatype != "FP64":
                array = wide.astype(np.float16 if datatype == "FP16" else np.float32)
            finite = np.isfinite(widen_bf16(array) if datatype == "BF16" else array)
    except OverflowError:  # an integer beyond what a double holds
        finite = np.array(False)
    if not finite.all():
        raise RequestError(f"a value is out of the range of {datatype}", where=where)
    return array.astype(dtype_of(datatype, where), copy=False)
