"""Another server's response as an answer of ours: pure."""

from __future__ import annotations

import msgspec

from aios_edge.oip.envelope import JSON_LENGTH_HEADER, parse_json_length, rewrite_response, split_body
from device_agent.answer import Answer
from device_agent.cloud_fit import ModelShape
from device_agent.http1 import Response
from device_agent.values import InferenceRequest, Reason

PASSED_ON = (400, 422)  # the request itself is at fault: the client hears it, the endpoint is fine
#: Too large for that endpoint, or more than was agreed with it: it is fine, and somebody else may take the request.
NOT_THERE = (413, 429)
_LONGEST_PAUSE_S = 60.0
#: Parameters of every answer of ours that a server of another make doesn't give.
_UNTOLD = dict.fromkeys(("queue_us", "compute_us", "batch_size", "energy_j", "energy_method"))


def cloud_answer(response: Response, reason: Reason, ours: ModelShape, request: InferenceRequest) -> Answer:
    """A response (200 or :data:`PASSED_ON`) under our model's name; raises :class:`RequestError` for nonsense."""
    if response.status != 200:
        return Answer(status=response.status, route="error", reason=reason, error=_error_of(response.body))
    body, json_length = rewrite_response(
        response.body,
        parse_json_length(response.headers.get(JSON_LENGTH_HEADER.lower())),
        model_name=ours.name,
        model_version=ours.version,
        id=request.client_id,
        defaults=_UNTOLD,
        parameters={"route": "cloud", "reason": reason.value, **request.changed_parameters},
    )
    return Answer(status=200, route="cloud", reason=reason, remote_body=body, remote_json_length=json_length)


class _Versioned(msgspec.Struct, frozen=True):
    model_version: str | None = None


def answered_version(response: Response) -> str | None:
    """Which version of the model there gave an answer that :func:`cloud_answer` took; None where it doesn't say."""
    json_length = parse_json_length(response.headers.get(JSON_LENGTH_HEADER.lower()))
    try:
        return msgspec.json.decode(split_body(response.body, json_length)[0], type=_Versioned).model_version
    except msgspec.ValidationError:  # no text
        return None


def pause_s(response: Response) -> float:
    """How long an endpoint wants to be left alone: of a 429 what ``Retry-After`` says in seconds, at most a minute."""
    if response.status != 429:
        return 0.0
    said = response.headers.get("retry-after", "")
    return min(float(said), _LONGEST_PAUSE_S) if said.isascii() and said.isdigit() else 1.0


def _error_of(body: bytes) -> str:
    try:
        return f"the cloud says: {msgspec.json.decode(body)['error']}"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return "the cloud refused the request"
