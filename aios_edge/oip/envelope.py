"""The Open Inference Protocol's envelope: everything about a request or response except its numbers.

For the supervisor, which routes requests without decoding tensors: no numpy, and the data of every tensor stays a
:class:`msgspec.Raw`, a view into the body. A body is JSON, or JSON of ``json_length`` bytes (the header
``Inference-Header-Content-Length``) followed by binary tensors in declared order. Length 0 is a request without
JSON: the whole body is the data of the model's only input.
"""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Any, NoReturn

import msgspec

from aios_edge.errors import RequestError

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"

#: What the protocol allows as the value of a parameter.
Parameter = bool | int | float | str
Parameters = dict[str, Parameter]

LOCAL_ONLY = "local-only"
MAX_TIMEOUT_US = 2**53  # some 285 years; beyond it a double can't count microseconds

_OURS = ("priority", "timeout", "privacy")
_SLIP_CUTOFF = 0.76  # takes 'timeout_sec' for a slip, and leaves 'property' alone
_SLIP_CHARS = 24  # a longer name is none of ours mistyped, and would be slow to compare
_SLIP_NAMES = 64  # that are compared: who sends more has parameters of a system's, not typed ones


#: In place of JSON that wasn't sent (msgspec has no optional Raw).
ABSENT = msgspec.Raw(b"")


class TensorEnvelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of a request or response. ``data`` is :data:`ABSENT` when the data follow as binary."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters | None = None
    data: msgspec.Raw = ABSENT

    def has_json_data(self) -> bool:
        """Whether the JSON carries this tensor's data; null is none."""
        return sent(self.data)


class RequestedOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An output the client asks for, with its own ``binary_data``."""

    name: str
    parameters: Parameters | None = None


class _Request(msgspec.Struct, frozen=True):
    inputs: tuple[TensorEnvelope, ...]
    outputs: msgspec.Raw = ABSENT
    id: str | None = None
    parameters: Parameters | None = None


class _Response(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | msgspec.Struct
    outputs: msgspec.Raw


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor knows of a request.

    ``priority``: 1 highest, 0 default. ``timeout_s``: how long the client waits, None for ever. ``local_only``: the
    data must not leave this device. ``cost_hint_bytes``: size of the input data, an estimate of the work.
    ``outputs``: the JSON list of requested outputs, undecoded.
    """

    inputs: tuple[TensorEnvelope, ...]
    outputs: msgspec.Raw | None = None
    id: str | None = None
    parameters: Parameters = {}
    priority: int = 0
    timeout_s: float | None = None
    local_only: bool = False
    cost_hint_bytes: int = 0


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor in a model's metadata; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ServerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /v2``."""

    name: str
    version: str
    extensions: tuple[str, ...] = (
        "binary_tensor_data",
        "model_repository",
        "model_repository(unload_dependents)",
    )


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``GET /v2/models/{m}``.

    The last three are additions to the protocol, left out when empty: the labels in the order of the model's
    classes, and the tensors of the task's natural input and output.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    labels: tuple[str, ...] = ()
    natural_inputs: tuple[TensorMetadata, ...] = ()
    natural_outputs: tuple[TensorMetadata, ...] = ()


PLATFORM = "onnx_onnxv1"  # Triton's name for ONNX models
LIVE = b'{"live":true}'
READY = b'{"ready":true}'
NOT_READY = b'{"ready":false}'

_LONE_SURROGATE = re.compile(rb"(?<!\\)\\u[dD][89abAB][0-9a-fA-F]{2}[^\\]")
_NEAR = 12  # one half, and what a whole other half would need

_request_decoder = msgspec.json.Decoder(_Request)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_parameters_decoder = msgspec.json.Decoder(Parameters | None)
_encoder = msgspec.json.Encoder()


def sent(raw: msgspec.Raw) -> bool:
    """Whether there is anything but null."""
    return raw is not ABSENT and bytes(memoryview(raw)[:5]) not in (b"", b"null")


def error_body(text: str, parameters: dict[str, Any] | None = None) -> bytes:
    """The body of every 4xx and 5xx answer; ``parameters`` are those of an inference that was refused."""
    document: dict[str, Any] = {"error": text}
    if parameters is not None:
        document["parameters"] = parameters
    return _encoder.encode(document)


def parse_json_length(header: str | bytes | None) -> int | None:
    """The value of ``Inference-Header-Content-Length``; None without the header. Raises :class:`RequestError`."""
    if header is None:
        return None
    text = header.decode("latin-1") if isinstance(header, bytes) else header
    if re.fullmatch(r"[0-9]{1,15}", text.strip(" \t")) is None:
        raise RequestError(
            f"{text[:40]!r} is not a length in bytes",
            where=JSON_LENGTH_HEADER,
            remedy="Send the number of bytes of the JSON part as a non-negative integer",
        )
    return int(text)


def split_body(body: bytes | memoryview, json_length: int | None) -> tuple[memoryview, memoryview]:
    """The JSON part and the binary tail, not copied. Raises :class:`RequestError` for an impossible length."""
    view = memoryview(body)
    if json_length is None:
        return view, view[:0]
    if not 0 <= json_length <= len(view):
        raise RequestError(
            f"{json_length} is not between 0 and the {len(view)} bytes of the body",
            where=JSON_LENGTH_HEADER,
            remedy="Send the number of bytes of the JSON part",
        )
    return view[:json_length], view[json_length:]


def parse_request(body: bytes | memoryview, json_length: int | None) -> Envelope:
    """Read the envelope. Raises :class:`RequestError` (400) saying what is wrong and where."""
    text, tail = split_body(body, json_length)
    if json_length == 0:
        return Envelope(inputs=(), cost_hint_bytes=len(tail))
    try:
        request = _request_decoder.decode(text)
    except Exception as error:
        refuse_json(text, error)
    cost_hint_bytes = len(tail)
    for tensor in request.inputs:
        cost_hint_bytes += len(memoryview(tensor.data))
    outputs = request.outputs if sent(request.outputs) else None
    if not (parameters := request.parameters):
        return Envelope(inputs=request.inputs, outputs=outputs, id=request.id, cost_hint_bytes=cost_hint_bytes)
    _refuse_slips(parameters)
    return Envelope(
        inputs=request.inputs,
        outputs=outputs,
        id=request.id,
        parameters=parameters,
        priority=_priority(parameters),
        timeout_s=_timeout_s(parameters),
        local_only=_local_only(parameters),
        cost_hint_bytes=cost_hint_bytes,
    )


def refuse_json(text: bytes | memoryview, error: Exception, where: str | None = None) -> NoReturn:
    """Raise the :class:`RequestError` for what decoding ``text`` raised; unknown errors pass unchanged."""
    if isinstance(error, RecursionError):
        raise RequestError("the JSON is nested too deeply", where=where) from None
    if isinstance(error, UnicodeDecodeError):
        raise RequestError("the JSON is not UTF-8", where=where, remedy="Send bytes as a binary tensor") from None
    if isinstance(error, msgspec.ValidationError):
        raise RequestError(str(error), where=where) from None
    if not isinstance(error, msgspec.DecodeError):
        raise error
    if not len(text):
        raise RequestError("the JSON is empty", where=where) from None
    found = re.search(r"\(byte (\d+)\)", str(error))
    # Of half a surrogate pair the parser says many things: it looks for the other half in what comes behind.
    at = int(found[1]) if found else len(text)
    if "surrogate" in str(error) or _LONE_SURROGATE.search(bytes(text[max(0, at - _NEAR) : at + _NEAR])):
        raise RequestError(
            "a text in the JSON is not valid Unicode: \\ud800 to \\udfff stand in pairs only",
            where=where,
            remedy="Send valid Unicode, or the bytes as a binary tensor",
        ) from None
    if found:
        start = int(found[1])
        # a sign is a valid start of a number, so the error may point behind it
        if re.match(rb"-?(NaN|nan|Inf|inf)", bytes(text[start : start + 4])):
            raise RequestError(
                f"NaN and Infinity are not JSON (byte {start})",
                where=where,
                remedy="Send the tensor as binary data, which carries them",
            ) from None
    raise RequestError(str(error), where=where) from None


def encode_response(
    *,
    model_name: str,
    model_version: str,
    outputs: bytes,
    binary: bytes = b"",
    id: str | None = None,
    parameters: dict[str, Any] | msgspec.Struct | None = None,
) -> tuple[bytes, int | None]:
    """Compose a response from the worker's JSON list of outputs and the binary tensors behind it.

    Returns the body and the length of its JSON part, None when all of it is JSON. Parameters may be null.
    """
    head = _Response(
        model_name=model_name,
        model_version=model_version,
        id=id,
        parameters={} if parameters is None else parameters,
        outputs=msgspec.Raw(outputs),
    )
    text = _encoder.encode(head)
    return (b"".join((text, binary)), len(text)) if binary else (text, None)


def rewrite_request(
    body: bytes, json_length: int | None, *, updates: Parameters | None = None, removals: tuple[str, ...] = ()
) -> tuple[bytes, int | None]:
    """The same request with other parameters, tensors untouched; for forwarding it to another server.

    A request without JSON (length 0) has no parameters and comes back as it is.
    """
    if json_length == 0:
        return body, json_length
    text, tail = split_body(body, json_length)
    try:
        head: dict[str, Any] = dict(_object_decoder.decode(text))
        parameters: dict[str, Any] = dict(_parameters_decoder.decode(head.pop("parameters", b"null")) or {})
    except Exception as error:
        refuse_json(text, error)
    parameters = {name: value for name, value in parameters.items() if name not in removals} | (updates or {})
    if parameters:
        head["parameters"] = parameters
    return _joined(head, tail, json_length is not None)


def rewrite_response(
    body: bytes,
    json_length: int | None,
    *,
    model_name: str,
    model_version: str,
    id: str | None,
    parameters: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """Another server's response under our model's name and the client's id, tensors untouched.

    ``parameters`` are laid over its own, ``defaults`` under them: what a server of another make doesn't tell.
    Raises :class:`RequestError` when the body isn't an inference response; the caller knows whose it was.
    """
    text, tail = split_body(body, json_length)
    try:
        head: dict[str, Any] = dict(_object_decoder.decode(text))
        theirs = msgspec.json.decode(head.get("parameters", b"null"), type=dict[str, Any] | None) or {}
    except Exception as error:
        refuse_json(text, error)
    if not bytes(head.get("outputs", b"")).startswith(b"["):
        raise RequestError("the response has no list 'outputs'")
    head.pop("id", None)
    head |= {"model_name": model_name, "model_version": model_version} | ({} if id is None else {"id": id})
    head["parameters"] = (defaults or {}) | theirs | parameters
    return _joined(head, tail, json_length is not None)


def _joined(head: dict[str, Any], tail: bytes | memoryview, is_binary: bool) -> tuple[bytes, int | None]:
    text = _encoder.encode(head)
    return (b"".join((text, tail)), len(text)) if is_binary else (text, None)


def _refuse_slips(parameters: Parameters) -> None:
    """Clients send parameters of their own, but a deadline or a wish for privacy that is nearly named would be lost."""
    unknown = (name for name in parameters if name not in _OURS and len(name) <= _SLIP_CHARS)
    for name in itertools.islice(unknown, _SLIP_NAMES):
        typed = name.lower()
        begun = [ours for ours in _OURS if typed.startswith(ours)]
        near = begun or difflib.get_close_matches(typed, _OURS, n=1, cutoff=_SLIP_CUTOFF)
        if near:
            raise RequestError("is unknown", where=f"parameters.{name}", remedy=f"Did you mean '{near[0]}'?")


def _priority(parameters: Parameters) -> int:
    value = parameters.get("priority", 0)
    if type(value) is not int or not 0 <= value < 2**32:
        raise RequestError(
            f"{value!r} is not a priority", where="parameters.priority", remedy="1 is highest, 0 default"
        )
    return value


def _timeout_s(parameters: Parameters) -> float | None:
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise RequestError(
            f"{value!r} is not a time in microseconds",
            where="parameters.timeout",
            remedy="Send a non-negative integer; 0 is no timeout",
        )
    return value / 1e6 if value else None


def _local_only(parameters: Parameters) -> bool:
    # A misspelt wish for privacy must not end in the cloud, so anything unknown is refused.
    value = parameters.get("privacy")
    if value not in (None, LOCAL_ONLY):
        raise RequestError(
            f"{value!r} is unknown", where="parameters.privacy", remedy=f"The only value is {LOCAL_ONLY!r}"
        )
    return value is not None
