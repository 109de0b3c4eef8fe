"""An inference request, right or wrong, as it looks on each of the ways that lead in.

There are four: JSON and JSON with binary tensors (HTTP, Unix socket, MQTT), typed and raw tensors (gRPC). Nothing here
minds whether it makes sense.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

JSON, BINARY, TYPED, RAW = WAYS = ("json", "binary", "typed", "raw")
BYTES_WAYS = (BINARY, RAW)
HTTP_WAYS = (JSON, BINARY)
GRPC_WAYS = (TYPED, RAW)

_CODES = {"BOOL": "?", "INT8": "b", "UINT8": "B", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d"}
_FIELDS = {
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
    "FP32": "fp32_contents",
    "INT8": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input. ``data``: its elements; a text is JSON as it stands, None is none at all. ``content``: the bytes that
    are sent in place of the elements'. ``column``: the typed field they are sent in, in place of the datatype's."""

    name: str | None = "x"
    datatype: str | None = "INT64"
    shape: Any = (1,)
    data: Sequence[Any] | str | None = (1,)
    content: bytes | None = None
    column: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def packed(self) -> bytes:
        """As binary tensors are."""
        if self.content is not None or self.data is None:
            return self.content or b""
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(item)) + item for item in map(str.encode, self.data))
        return struct.pack(f"<{len(self.data)}{_CODES.get(self.datatype or '', 'q')}", *self.data)

    def head(self, *, binary: bool) -> dict[str, Any]:
        """Its part of the JSON."""
        whole: dict[str, Any] = {"name": self.name, "datatype": self.datatype, "shape": self.shape}
        parameters = dict(self.parameters)
        if binary:
            parameters.setdefault("binary_data_size", len(self.packed()))
        elif self.data is not None:
            whole["data"] = Verbatim(self.data) if isinstance(self.data, str) else list(self.data)
        if parameters:
            whole["parameters"] = parameters
        return {key: value for key, value in whole.items() if value is not None}


class Verbatim(str):
    """Text that stands in the JSON as it is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """``says``: a part of the error. ``status``: as HTTP has it. ``body``: in place of the JSON, or with ``ways`` of
    gRPC of the message. ``length``: in place of the JSON's real length."""

    name: str
    says: str
    status: int = 400
    ways: tuple[str, ...] = WAYS
    model: str = "id"
    version: str | None = None
    inputs: tuple[Tensor, ...] = (Tensor(),)
    outputs: Any = None
    parameters: Any = None
    id: Any = "q"
    body: bytes | None = None
    tail: bytes = b""
    length: str | None = None

    def document(self, *, binary: bool = False) -> bytes:
        """The JSON."""
        if self.body is not None:
            return self.body
        parts = {"id": self.id, "parameters": self.parameters, "outputs": self.outputs}
        whole = {key: value for key, value in parts.items() if value is not None}
        whole["inputs"] = [tensor.head(binary=binary) for tensor in self.inputs]
        return _json(whole)

    def in_binary(self) -> tuple[bytes, str]:
        """JSON with what stands behind it, and the length that is told of the first."""
        head = self.document(binary=True)
        body = b"".join((head, *(tensor.packed() for tensor in self.inputs), self.tail))
        return body, str(len(head)) if self.length is None else self.length

    def message(self, *, raw: bool) -> bytes:
        """The ``ModelInferRequest``."""
        if self.body is not None:
            return self.body
        from device_agent.grpc_door.messages import ModelInferRequest

        asked = ModelInferRequest(model_name=self.model, model_version=self.version or "", id=self.id)
        for tensor in self.inputs:
            given = asked.inputs.add(name=tensor.name or "", datatype=tensor.datatype or "", shape=tensor.shape)
            _fill(given.parameters, tensor.parameters)
            if raw:
                asked.raw_input_contents.append(tensor.packed())
            elif tensor.data:
                elements = [item.encode() for item in tensor.data] if tensor.datatype == "BYTES" else tensor.data
                column = tensor.column or _FIELDS.get(tensor.datatype or "", "int64_contents")
                getattr(given.contents, column).extend(elements)
        if self.tail:
            asked.raw_input_contents.append(self.tail)
        for output in self.outputs or ():
            _fill(asked.outputs.add(name=output["name"]).parameters, output.get("parameters", {}))
        _fill(asked.parameters, self.parameters or {})
        data: bytes = asked.SerializeToString()
        return data


def _json(value: Any) -> bytes:
    """As json.dumps, but what is :class:`Verbatim` stands as it is."""
    if isinstance(value, Verbatim):
        return value.encode()
    if isinstance(value, dict):
        return b"{" + b",".join(json.dumps(key).encode() + b":" + _json(each) for key, each in value.items()) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_json, value)) + b"]"
    return json.dumps(value).encode()


def _fill(parameters: Any, values: dict[str, Any]) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in values.items():
        if value is None:  # a parameter without a value
            parameters[name].SetInParent()
        elif type(value) is int and value >= 2**63:
            parameters[name].uint64_param = value
        else:
            setattr(parameters[name], kinds[type(value)], value)


def good(value: int) -> Case:
    """A request that is one, and is answered with the value."""
    return Case(name="good", says="", inputs=(Tensor(data=(value,)),))
