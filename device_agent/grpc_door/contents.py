"""The elements of one tensor: the protocol's typed fields, its little-endian bytes, and JSON. Pure, without numpy."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from aios_edge.errors import RequestError

#: Datatype -> the field of ``InferTensorContents`` that has its elements. FP16 and BF16 have none.
FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
RAW_ONLY = ("FP16", "BF16")
#: Datatype -> its code of :mod:`struct`; a BF16 is the upper half of a float32.
_CODES = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "BF16": "H",
    "FP32": "f",
    "FP64": "d",
}
_LENGTH = struct.Struct("<I")


def to_bytes(datatype: str, shape: Sequence[int], contents: Any, where: str) -> bytes:
    """The typed elements of an ``InferTensorContents`` as little-endian bytes, BYTES each behind its length.

    Raises :class:`RequestError` for elements in another datatype's field, too many or too few, or out of range.
    """
    if datatype in RAW_ONLY:
        remedy = "Send every tensor of the request in raw_input_contents"
        raise RequestError(f"the protocol has no typed field for {datatype}", where=where, remedy=remedy)
    if (name := FIELDS.get(datatype)) is None:
        known = ", ".join((*FIELDS, *RAW_ONLY))
        raise RequestError(f"{datatype[:20]!r} is not a datatype", where=where, remedy=f"Known: {known}")
    if wrong := [field.name for field, _ in contents.ListFields() if field.name != name]:
        raise RequestError(f"has elements in {wrong[0]}; those of {datatype} belong in {name}", where=where)
    elements = getattr(contents, name)
    if min(shape, default=0) >= 0 and len(elements) != math.prod(shape):
        taken = math.prod(shape)
        raise RequestError(f"has {len(elements)} elements, shape {list(shape)} takes {taken}", where=where)
    if datatype == "BYTES":
        return b"".join(part for item in elements for part in (_LENGTH.pack(len(item)), item))
    try:
        return struct.pack(f"<{len(elements)}{_CODES[datatype]}", *elements)
    except struct.error:  # 8 and 16 bits share a field with 32
        raise RequestError(f"an element is out of the range of {datatype}", where=where) from None


def from_bytes(datatype: str, data: bytes | memoryview) -> Sequence[Any]:
    """The elements of a typed field. Raises :class:`ValueError` for bytes that aren't whole elements."""
    if datatype == "BYTES":
        return _texts(memoryview(data))
    code = _CODES[datatype]
    count, rest = divmod(len(data), struct.calcsize(f"<{code}"))
    if rest:
        raise ValueError(f"{len(data)} bytes are no whole number of {datatype}")
    return struct.unpack(f"<{count}{code}", data)


def json_to_bytes(datatype: str, data: msgspec.Raw) -> bytes:
    """JSON elements, flat or nested, as little-endian bytes. Raises :class:`ValueError` for what aren't such."""
    try:
        elements = _flat(msgspec.json.decode(data))
        if datatype == "BYTES":
            return b"".join(part for item in map(str.encode, elements) for part in (_LENGTH.pack(len(item)), item))
        if datatype == "BOOL" and not all(type(element) is bool for element in elements):
            raise ValueError("an element of BOOL is neither true nor false")
        if datatype == "BF16":
            elements = [_bf16(element) for element in elements]
        return struct.pack(f"<{len(elements)}{_CODES[datatype]}", *elements)
    except (msgspec.MsgspecError, struct.error, OverflowError, TypeError, KeyError) as error:
        raise ValueError(str(error)) from error


def _texts(data: memoryview) -> list[bytes]:
    elements = []
    offset = 0
    while offset < len(data):
        start = offset + _LENGTH.size
        if start > len(data):
            raise ValueError("the data end within a length")
        offset = start + _LENGTH.unpack_from(data, start - _LENGTH.size)[0]
        if offset > len(data):
            raise ValueError("an element is longer than the data")
        elements.append(bytes(data[start:offset]))
    return elements


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if not any(isinstance(item, list) for item in value):
        return value
    return [element for item in value for element in _flat(item)]


def _bf16(value: float) -> int:
    """The nearest, ties to even."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
