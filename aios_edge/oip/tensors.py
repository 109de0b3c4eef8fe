"""Requests and responses with their tensors: decode and encode, for server and client.

A tensor's data lie in the JSON or, with ``binary_data_size``, behind it in declared order. Server side:
:func:`decode_inputs`, :func:`encode_outputs`; client side: :func:`encode_request`, :func:`decode_response`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RemoteError, RequestError
from aios_edge.oip.datatypes import DTYPES, Tensor
from aios_edge.oip.elements import element_count, from_binary, from_json, to_binary, to_json
from aios_edge.oip.envelope import (
    Parameters,
    RequestedOutput,
    TensorEnvelope,
    parse_request,
    refuse_json,
    split_body,
)


class Spec(Protocol):
    """Anything with a tensor's name, datatype and shape: a manifest's ``TensorSpec``."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class DecodedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs by name, in the client's order. ``outputs`` None asks for all; ``binary_output`` is what an output
    without its own ``binary_data`` gets."""

    inputs: dict[str, Tensor]
    outputs: tuple[RequestedOutput, ...] | None = None
    binary_output: bool = False

    def wanted(self, names: Iterable[str]) -> tuple[RequestedOutput, ...]:
        """What it asks for of a model with these outputs."""
        return self.outputs or tuple(RequestedOutput(name=name) for name in names)

    def wants_binary(self, output: RequestedOutput) -> bool:
        """Whether this output is to come as binary data; raises :class:`RequestError` for a flag that is none."""
        flag = _flag(output.parameters, "binary_data", f"output {output.name[:80]!r}")
        return self.binary_output if flag is None else flag


class DecodedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A server's answer. ``parameters`` are as they came, so their values may be null."""

    outputs: dict[str, Tensor]
    parameters: dict[str, Any] = {}
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None


class _Response(msgspec.Struct, frozen=True):
    outputs: tuple[TensorEnvelope, ...]
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


_requested_decoder = msgspec.json.Decoder(tuple[RequestedOutput, ...] | None)
_response_decoder = msgspec.json.Decoder(_Response)
_encoder = msgspec.json.Encoder()


def decode_inputs(
    body: bytes | memoryview, json_length: int | None, specs: Sequence[Spec] | None = None
) -> DecodedRequest:
    """Decode a request's tensors and which outputs it asks for; raises nothing but :class:`RequestError`.

    A body without JSON (``json_length`` 0) is the only input of the model: ``specs`` are its inputs. Fixed
    dimensions are the model's; of free ones the last is inferred from the size and the others are 1. For BYTES the
    whole body is one element. Such a client gets binary outputs, having shown that it reads no JSON.
    """
    envelope = parse_request(body, json_length)
    if json_length == 0:
        return DecodedRequest(inputs=_raw_input(memoryview(body), specs), binary_output=True)
    _, tail = split_body(body, json_length)
    requested = None
    if envelope.outputs is not None:
        try:
            requested = _requested_decoder.decode(envelope.outputs)
        except Exception as error:
            refuse_json(bytes(envelope.outputs), error, "outputs")
    for output in requested or ():
        _check_requested(output)
    return DecodedRequest(
        inputs=_decode_tensors(envelope.inputs, tail, "input"),
        outputs=requested or None,
        binary_output=_flag(envelope.parameters, "binary_data_output", "parameters") or False,
    )


def encode_outputs(tensors: Mapping[str, Tensor], request: DecodedRequest) -> tuple[bytes, bytes]:
    """The JSON list of outputs and the binary tensors behind it, each output the way the client asked for it.

    Raises :class:`RequestError`: 400 for an unknown output, 422 for one that JSON can't carry.
    """
    envelopes: list[TensorEnvelope] = []
    tail: list[bytes] = []
    if not request.outputs:
        for name, each in tensors.items():
            where = f"output {name[:80]!r}"
            envelopes.append(_enveloped(name, each, tail, where, binary=request.binary_output, status=422))
        return _encoder.encode(envelopes), b"".join(tail)
    seen: set[str] = set()
    for output in request.outputs:
        where = f"output {output.name[:80]!r}"
        if (tensor := tensors.get(output.name)) is None:
            raise RequestError("there is no such output", where=where, remedy=f"Outputs: {', '.join(tensors)}")
        if output.name in seen:
            raise RequestError("is asked for twice", where=where)
        seen.add(output.name)
        binary = request.wants_binary(output)
        envelopes.append(_enveloped(output.name, tensor, tail, where, binary=binary, status=422))
    return _encoder.encode(envelopes), b"".join(tail)


def encode_request(
    inputs: Mapping[str, Tensor | NDArray[Any]],
    *,
    binary: bool = True,
    outputs: Sequence[str] | None = None,
    id: str | None = None,
    parameters: Parameters | None = None,
) -> tuple[bytes, int | None]:
    """A client's request: body and JSON length (None when all of it is JSON).

    ``binary`` sends every input and asks for every output as binary. Raises :class:`RequestError` for an array the
    protocol has no datatype for, or that JSON can't carry.
    """
    tail: list[bytes] = []
    envelopes = [
        _enveloped(
            name,
            value if isinstance(value, Tensor) else Tensor.of(value),
            tail,
            f"input {name!r}",
            binary=binary,
            status=400,
        )
        for name, value in inputs.items()
    ]
    head: dict[str, Any] = {} if id is None else {"id": id}
    head["parameters"] = {**(parameters or {}), "binary_data_output": binary}
    head["inputs"] = envelopes
    if outputs is not None:
        head["outputs"] = [RequestedOutput(name=name, parameters={"binary_data": binary}) for name in outputs]
    text = _encoder.encode(head)
    return (b"".join((text, *tail)), len(text)) if binary else (text, None)


def decode_response(body: bytes | memoryview, json_length: int | None) -> DecodedResponse:
    """A server's 200 answer; raises :class:`RemoteError` when it isn't one."""
    try:
        text, tail = split_body(body, json_length)
        try:
            response = _response_decoder.decode(text)
        except Exception as error:
            refuse_json(text, error)
        outputs = _decode_tensors(response.outputs, tail, "output")
    except RequestError as error:
        raise RemoteError(f"the answer is no inference response: {error}") from error
    return DecodedResponse(
        outputs=outputs,
        parameters=response.parameters or {},
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id,
    )


def _enveloped(
    name: str, tensor: Tensor, tail: list[bytes], where: str, *, binary: bool, status: int
) -> TensorEnvelope:
    """A tensor's JSON; its binary data are appended to ``tail``."""
    shape = tuple(tensor.array.shape)
    if not binary:
        data = msgspec.Raw(to_json(tensor, where, status=status))
        return TensorEnvelope(name=name, datatype=tensor.datatype, shape=shape, data=data)
    tail.append(to_binary(tensor))
    parameters: Parameters = {"binary_data_size": len(tail[-1])}
    return TensorEnvelope(name=name, datatype=tensor.datatype, shape=shape, parameters=parameters)


def _decode_tensors(envelopes: Sequence[TensorEnvelope], tail: memoryview, kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    for envelope in envelopes:
        where = f"{kind} {envelope.name[:80]!r}"
        if envelope.name in tensors:
            raise RequestError("is there twice", where=where)
        size = None
        if parameters := envelope.parameters:
            if shared := next((name for name in parameters if name.startswith("shared_memory")), None):
                what, remedy = f"has {shared!r}; shared memory isn't supported", "Send binary data"
                raise RequestError(what, where=where, remedy=remedy)
            size = parameters.get("binary_data_size")
        if size is None:
            if not envelope.has_json_data():
                raise RequestError("has neither 'data' nor 'binary_data_size'", where=where)
            array = from_json(envelope.datatype, envelope.shape, envelope.data, where)
        else:
            if envelope.has_json_data():
                raise RequestError("has both 'data' and 'binary_data_size'", where=where)
            if type(size) is not int or size < 0:
                raise RequestError(f"binary_data_size {size!r} is not a size in bytes", where=where)
            if offset + size > len(tail):
                left = len(tail) - offset
                raise RequestError(f"needs {size} bytes of binary data, {left} are left in the body", where=where)
            array = from_binary(envelope.datatype, envelope.shape, tail[offset : offset + size], where)
            offset += size
        tensors[envelope.name] = Tensor(envelope.datatype, array)
    if offset != len(tail):
        raise RequestError(f"{len(tail) - offset} bytes of binary data are left over behind the last {kind}")
    return tensors


def _check_requested(output: RequestedOutput) -> None:
    """A wish that nobody reads is refused: the client would take its output for what it asked for."""
    where = f"output {output.name[:80]!r}"
    _flag(output.parameters, "binary_data", where)
    for name, value in (output.parameters or {}).items():
        if name.startswith("shared_memory"):
            raise RequestError(
                f"has {name!r}; shared memory isn't supported", where=where, remedy="Ask for binary data"
            )
        if name == "classification":
            if value:
                raise RequestError("the classification extension isn't supported", where=where)
        elif name != "binary_data":
            remedy = "The only parameter of an output is 'binary_data'"
            raise RequestError(f"has the unknown parameter {name[:80]!r}", where=where, remedy=remedy)


def _raw_input(data: memoryview, specs: Sequence[Spec] | None) -> dict[str, Tensor]:
    if specs is None or len(specs) != 1:
        raise RequestError(
            "a body without JSON is only possible for a model with one input",
            remedy="Send JSON in front and its length in Inference-Header-Content-Length",
        )
    spec = specs[0]
    where = f"input {spec.name!r}"
    if spec.datatype == "BYTES":
        array = np.empty(tuple(abs(dim) for dim in spec.shape), dtype=np.object_)  # -1 becomes 1
        if array.size != 1:
            raise RequestError("a body without JSON is one element, the model takes more", where=where)
        array.flat[0] = bytes(data)
        return {spec.name: Tensor("BYTES", array)}
    free = [index for index, dim in enumerate(spec.shape) if dim < 0]
    shape = [1 if dim < 0 else dim for dim in spec.shape]
    if free:
        row_bytes = element_count(tuple(shape), where) * DTYPES[spec.datatype].itemsize
        shape[free[-1]] = len(data) // row_bytes if row_bytes else 0
    return {spec.name: Tensor(spec.datatype, from_binary(spec.datatype, tuple(shape), data, where))}


def _flag(parameters: Parameters | None, name: str, where: str) -> bool | None:
    if not parameters:
        return None
    value = parameters.get(name)
    if value is not None and type(value) is not bool:
        raise RequestError(f"{name} is {value!r}, not true or false", where=where)
    return value


__all__ = [
    "DecodedRequest",
    "DecodedResponse",
    "Tensor",
    "decode_inputs",
    "decode_response",
    "encode_outputs",
    "encode_request",
]
