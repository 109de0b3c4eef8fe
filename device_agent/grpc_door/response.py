"""The desk's answer to an inference -> ``ModelInferResponse``. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from aios_edge.errors import RemoteError
from aios_edge.oip.envelope import TensorEnvelope, split_body
from device_agent.grpc_door.contents import FIELDS, RAW_ONLY, from_bytes, json_to_bytes
from device_agent.grpc_door.messages import Message, ModelInferResponse

_INT64 = 1 << 63


class _Head(msgspec.Struct, frozen=True):
    outputs: tuple[TensorEnvelope, ...]
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Head)


def infer_response(body: bytes, json_length: int | None, *, raw: bool) -> Message:
    """The message of a good answer; ``raw``: its tensors in ``raw_output_contents``, as FP16 and BF16 always are.

    Raises :class:`RemoteError`: a cloud server's answer may be anything that begins like one.
    """
    text, tail = split_body(body, json_length)
    try:
        head = _decoder.decode(text)
        data = _data_of(head.outputs, tail)
        response = ModelInferResponse(
            model_name=head.model_name, model_version=head.model_version or "", id=head.id or ""
        )
        fill(response.parameters, head.parameters or {})
        raw = raw or any(tensor.datatype in RAW_ONLY for tensor in head.outputs)
        for tensor, elements in zip(head.outputs, data, strict=True):
            output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            if not raw:
                getattr(output.contents, FIELDS[tensor.datatype]).extend(from_bytes(tensor.datatype, elements))
            theirs = {name: value for name, value in (tensor.parameters or {}).items() if name != "binary_data_size"}
            fill(output.parameters, theirs)
        if raw:
            response.raw_output_contents.extend(bytes(elements) for elements in data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, KeyError) as error:
        raise RemoteError(f"the answer can't be told over gRPC ({error})", remedy="Ask over HTTP") from error
    return response


def fill(parameters: Message, values: Mapping[str, Any]) -> None:
    """Values of JSON as parameters: what is null is left out, and what no field can hold is JSON text."""
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, int) and -_INT64 <= value < _INT64:
            parameters[name].int64_param = value
        elif isinstance(value, float):
            parameters[name].double_param = value
        elif value is not None:
            parameters[name].string_param = value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _data_of(outputs: tuple[TensorEnvelope, ...], tail: memoryview) -> list[bytes | memoryview]:
    data: list[bytes | memoryview] = []
    offset = 0
    for tensor in outputs:
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            data.append(json_to_bytes(tensor.datatype, tensor.data))
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - offset:
            raise ValueError(f"output {tensor.name[:80]!r} has {size!r} bytes of {len(tail) - offset}")
        data.append(tail[offset : offset + size])
        offset += size
    return data
