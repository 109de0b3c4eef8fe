"""``ModelInferRequest`` -> the body that the desk takes: JSON, and behind it each tensor's bytes. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from aios_edge.errors import RequestError
from aios_edge.oip.envelope import MAX_TIMEOUT_US, Parameter
from device_agent.grpc_door.contents import to_bytes
from device_agent.grpc_door.messages import Message

#: The same word as in REST: here true asks for ``raw_output_contents``, false for typed fields.
RAW_OUTPUT = "binary_data_output"


class InferBody(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the desk takes it. ``raw``: whether its answer's tensors go raw."""

    body: bytes
    json_length: int
    raw: bool


def infer_body(request: Message, remaining_s: float | None) -> InferBody:
    """The request with ``remaining_s`` of its call's deadline, None without one.

    The sooner of that and the parameter ``timeout`` is its deadline. Raises :class:`RequestError`.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(raw)} tensors, there are {len(request.inputs)} inputs",
            remedy="Send the data of every input there, or none",
        )
    inputs: list[dict[str, Any]] = []
    parts = [b""]
    for index, tensor in enumerate(request.inputs):
        where = f"input {tensor.name[:80]!r}"
        if not raw:
            parts.append(to_bytes(tensor.datatype, tensor.shape, tensor.contents, where))
        elif tensor.HasField("contents") and tensor.contents.ListFields():
            raise RequestError("has data in contents and in raw_input_contents", where=where, remedy="Send one of them")
        else:
            parts.append(raw[index])
        parameters: dict[str, Any] = values_of(tensor.parameters, where)
        parameters["binary_data_size"] = len(parts[-1])
        shape = list(tensor.shape)
        inputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "parameters": parameters})
    parameters = values_of(request.parameters, "parameters")
    answer_raw = parameters.pop(RAW_OUTPUT, bool(raw) or not inputs)
    if type(answer_raw) is not bool:
        raise RequestError(f"{RAW_OUTPUT} is {answer_raw!r}, not true or false", where="parameters")
    _limit(parameters, remaining_s)
    head: dict[str, Any] = {"parameters": {**parameters, RAW_OUTPUT: True}, "inputs": inputs}
    if request.id:
        head["id"] = request.id
    if request.outputs:
        head["outputs"] = [_output(output) for output in request.outputs]
    parts[0] = msgspec.json.encode(head)
    return InferBody(body=b"".join(parts), json_length=len(parts[0]), raw=answer_raw)


def values_of(parameters: Message, where: str) -> dict[str, Parameter]:
    """Parameters as JSON has them. Raises :class:`RequestError` for one without a value."""
    values: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise RequestError("has no value", where=f"{where}.{name[:80]}", remedy="Set one of its fields")
        values[name] = getattr(parameter, choice)
    return values


def _limit(parameters: dict[str, Any], remaining_s: float | None) -> None:
    """Nobody waits for an answer behind the call's deadline, whatever ``timeout`` says."""
    asked = parameters.get("timeout", 0)
    left = None if remaining_s is None else max(1, round(remaining_s * 1e6))
    if left is None or left > MAX_TIMEOUT_US:
        return
    if type(asked) is int and 0 <= asked <= MAX_TIMEOUT_US:  # else the desk says why not
        parameters["timeout"] = min(asked or left, left)


def _output(output: Message) -> dict[str, Any]:
    where = f"output {output.name[:80]!r}"
    parameters = values_of(output.parameters, where)
    if "binary_data" in parameters:
        raise RequestError(
            "has 'binary_data', but all outputs go the same way", where=where, remedy=f"Set the request's {RAW_OUTPUT}"
        )
    return {"name": output.name, "parameters": parameters} if parameters else {"name": output.name}
