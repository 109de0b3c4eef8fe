"""What gRPC says where REST has a status of 400 or more. Pure."""

from __future__ import annotations

import msgspec

from device_agent.values import Reason

REASON = "aios-reason"  # as the parameter "reason" of a refused REST request
CHECK = "aios-check"  # which check refused a bundle
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own: a client that retries by policy waits so long; below 0 it never does
_NEVER = "-1"
_TEXT_CHARS = 600  # percent-encoded, a longer one might not pass for a header, and nothing would be told at all

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    415: "UNIMPLEMENTED",
    422: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
#: Of 503: a limit is reached. The others are a device that can't answer, in time or at all.
_EXHAUSTED = (Reason.QUEUE_FULL.value, Reason.BUDGET.value)


class GrpcRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """``code``: the name of a ``grpc.StatusCode``."""

    code: str
    text: str
    metadata: tuple[tuple[str, str], ...] = ()


class _Document(msgspec.Struct, frozen=True):
    error: str = ""
    parameters: dict[str, msgspec.Raw] = {}


def refusal(
    status: int, text: str, *, reason: str | None = None, check: str | None = None, retry_after_s: float | None = None
) -> GrpcRefusal:
    """A refusal in gRPC's words; ``status`` is what REST would have said."""
    code = "RESOURCE_EXHAUSTED" if status == 503 and reason in _EXHAUSTED else _CODES.get(status, "UNKNOWN")
    metadata = [(name, value) for name, value in ((REASON, reason), (CHECK, check)) if value is not None]
    if retry_after_s is not None:
        metadata.append((PUSHBACK, str(max(1, round(retry_after_s * 1000)))))
    elif status == 413:
        metadata.append((PUSHBACK, _NEVER))
    return GrpcRefusal(code=code, text=text[:_TEXT_CHARS], metadata=tuple(metadata))


def refused_reply(status: int, body: bytes, retry_after_s: float | None) -> GrpcRefusal:
    """The desk's document with ``error`` in gRPC's words."""
    document = msgspec.json.decode(body, type=_Document)
    told = {name: msgspec.json.decode(value) for name, value in document.parameters.items()}
    return refusal(
        status, document.error, reason=told.get("reason"), check=told.get("check"), retry_after_s=retry_after_s
    )
