"""Every door of an agent as something that a request goes into and an answer, or a refusal, comes out of.

A door keeps its connection from one request to the next.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from mqtt_asker import BASE, Asker, user
from raw_http import Door, Wire, post
from request_forms import BINARY, HTTP_WAYS, JSON, RAW, TYPED, Case

JSON_LENGTH = "Inference-Header-Content-Length"
#: As docs/agent.md has it.
CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 413: "RESOURCE_EXHAUSTED", 422: "FAILED_PRECONDITION"}


@dataclass(frozen=True, kw_only=True)
class Told:
    """``status``: as HTTP has it, None where the door can't tell it; ``error``: None of an answer, whose ``values`` are
    those of its first output."""

    status: int | None
    error: str | None = None
    values: tuple[Any, ...] = ()


class RequestDoor(Protocol):
    """``ways``: which of the four it knows."""

    ways: tuple[str, ...]

    def carries(self, case: Case) -> bool:
        """Whether such a request can come this way at all."""

    def ask(self, case: Case, way: str) -> Told:
        """Send it, and wait for what is said."""

    def close(self) -> None: ...


def of_document(status: int | None, document: Any) -> Told:
    if "error" in document:
        return Told(status=status, error=document["error"])
    return Told(status=status, values=tuple(document["outputs"][0]["data"]))


class HttpDoor:
    """TCP, TLS or the Unix socket. ``chunked``: a body of unknown length, which goes the longer way inside."""

    ways = HTTP_WAYS

    def __init__(self, door: Door, *, chunked: bool = False) -> None:
        self._door = door
        self._chunked = chunked
        self._wire: Wire | None = None

    def carries(self, case: Case) -> bool:
        return True

    def ask(self, case: Case, way: str) -> Told:
        body, length = case.in_binary() if way == BINARY else (case.document(), None)
        version = "" if case.version is None else f"/versions/{quote(case.version, safe='')}"
        path = f"/v2/models/{quote(case.model, safe='')}{version}/infer"
        headers = () if length is None else (f"{JSON_LENGTH}: {length}",)
        self._wire = wire = self._wire or self._door.connect()
        wire.say(_chunked(path, body, *headers) if self._chunked else post(path, body, *headers))
        heard = wire.hear()
        assert heard is not None, "hung up without a word"
        assert heard.closes == ("max_body_bytes" in heard.document.get("error", "")), heard
        if heard.closes:
            self.close()
        return of_document(heard.status, heard.document)

    def close(self) -> None:
        if self._wire is not None:
            self._wire.sock.close()
            self._wire = None


def _chunked(path: str, body: bytes, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", *headers, "Transfer-Encoding: chunked", "", "")
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return "\r\n".join(lines).encode("latin-1") + chunk + b"0\r\n\r\n"


class MqttDoor:
    """A broker's client. Over 3.1.1 there are no properties: neither binary tensors, nor a status."""

    def __init__(self, url: str, version: str) -> None:
        self.five = version == "5"
        self.ways = HTTP_WAYS if self.five else (JSON,)
        self._asker = Asker(url, "answers", f"{BASE}/infer/+/result", version=version)

    def carries(self, case: Case) -> bool:
        if case.version is not None:  # whichever is served
            return False
        return self.five or len(case.model) < 1000  # a result topic may be too long for a broker

    def ask(self, case: Case, way: str) -> Told:
        body, length = case.in_binary() if way == BINARY else (case.document(), None)
        properties: dict[str, Any] = {"ResponseTopic": "answers"} if self.five else {}
        if length is not None:
            properties["UserProperty"] = (JSON_LENGTH, length)
        self._asker.ask(body, topic=f"{BASE}/infer/{quote(case.model, safe='')}", **properties)
        answer = self._asker.next()
        return of_document(int(user(answer)["status"]) if self.five else None, json.loads(answer.payload))

    def close(self) -> None:
        self._asker.close()


class GrpcDoor:
    """A channel, each request a call of its own."""

    ways = (TYPED, RAW)

    def __init__(self, target: str, key: str | None = None) -> None:
        import grpc
        from grpc_clients import LIMIT_S

        self._limit_s = LIMIT_S
        self._channel = grpc.insecure_channel(target, (("grpc.max_send_message_length", -1),))
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        self._error = grpc.RpcError
        self._ask = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def carries(self, case: Case) -> bool:
        return True

    def ask(self, case: Case, way: str) -> Told:
        try:
            answer = self._ask(case.message(raw=way == RAW), timeout=self._limit_s, metadata=self._metadata)
        except self._error as error:
            code = error.code().name
            return Told(status=next((each for each, name in CODES.items() if name == code), 500), error=error.details())
        return Told(status=200, values=_values(answer, "ModelInferResponse"))

    def close(self) -> None:
        self._channel.close()


class GrpcStreamDoor:
    """All requests in one call, which no refusal may end: there is a text, and no status."""

    ways = (TYPED, RAW)

    def __init__(self, target: str) -> None:
        import queue

        import grpc
        from grpc_clients import LIMIT_S

        self._channel = grpc.insecure_channel(target)
        self._sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        ask = self._channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        self._answers = ask(iter(self._sent.get, None), timeout=10 * LIMIT_S)

    def carries(self, case: Case) -> bool:
        return case.status != 413 or "larger" not in case.says  # such a message ends the call

    def ask(self, case: Case, way: str) -> Told:
        from device_agent.grpc_door.messages import ModelStreamInferResponse

        self._sent.put(case.message(raw=way == RAW))
        answer = ModelStreamInferResponse.FromString(next(self._answers))
        if answer.error_message:
            return Told(status=None, error=answer.error_message)
        return Told(status=200, values=_values(answer.infer_response.SerializeToString(), "ModelInferResponse"))

    def close(self) -> None:
        self._sent.put(None)
        self._channel.close()


def _values(data: bytes, kind: str) -> tuple[Any, ...]:
    from device_agent.grpc_door import messages

    answer = getattr(messages, kind).FromString(data)
    if answer.raw_output_contents:
        return (int.from_bytes(answer.raw_output_contents[0], "little"),)
    return tuple(answer.outputs[0].contents.int64_contents)
