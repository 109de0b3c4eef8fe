"""A typed client of an agent, on the standard library: HTTP over TCP, TLS or a Unix socket.

>>> client = Client("http://127.0.0.1:8080")
>>> [answer.label for answer in client.classify("sentiment", ["what a film"])]
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from aios_edge.errors import RemoteError, UsageError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, LOCAL_ONLY, ModelMetadata, Parameters, ServerMetadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aios_edge.oip.datatypes import Tensor
    from aios_edge.oip.tensors import DecodedResponse

RawInput = str | tuple[str, str]
T = TypeVar("T")


class HttpError(RemoteError):
    """The server answered with an error: ``status``, and ``text`` as it said it."""

    def __init__(self, status: int, text: str, *, where: str, remedy: str | None = None) -> None:
        super().__init__(f"HTTP {status}: {text}", where=where, remedy=remedy)
        self.status = status
        self.text = text


class Overloaded(HttpError):
    """503, 504 or 429 with Retry-After: the request was shed, given up at its deadline, or more than was agreed, but
    not broken; it may be sent again after ``retry_after_s``."""

    def __init__(self, text: str, *, where: str, retry_after_s: float, status: int = 503) -> None:
        super().__init__(status, text, where=where, remedy=f"Try again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a request; None where the server doesn't say or didn't measure.

    ``route``: ``local`` or ``cloud``; ``reason``: why. ``latency_s``: as seen here. ``energy_j``: per inference.
    """

    route: str | None
    reason: str | None
    latency_s: float
    queue_s: float | None
    compute_s: float | None
    batch_size: int | None
    energy_j: float | None
    energy_method: str | None


class Answer(Route, frozen=True, kw_only=True):
    """The class of one text. ``probabilities`` are in the order of the model's labels."""

    label: str
    score: float
    probabilities: tuple[float, ...]


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of a response by name, as arrays: BYTES as objects, BF16 as float32. ``parameters`` as they came."""

    outputs: dict[str, Any]
    parameters: dict[str, Any]
    model_name: str
    model_version: str | None
    latency_s: float


class Client:
    """One kept-alive connection to one agent, opened when first used. Not for use by several threads at once.

    ``url``: ``http://host:port``, ``https://host:port`` or ``unix:///path``. ``timeout_s`` bounds every wait on the
    socket; ``bearer`` is the key of a tenant, ``ca`` a file of certificates to trust instead of the system's. Every
    method raises :class:`RemoteError` when the server can't be reached or answers nonsense, :class:`HttpError` when it
    answers with an error, :class:`Overloaded` when it sheds.
    """

    def __init__(
        self, url: str, timeout_s: float = 30.0, bearer: str | None = None, ca: str | os.PathLike[str] | None = None
    ) -> None:
        self.url = url
        self._connection = _connection(url, timeout_s, ca)
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}

    def live(self) -> bool:
        """Whether the server runs; False also when it can't be reached."""
        return self._healthy("/v2/health/live")

    def ready(self) -> bool:
        """Whether the agent has activated its models and any of them serves; False also when it can't be reached."""
        return self._healthy("/v2/health/ready")

    def model_ready(self, model: str) -> bool:
        """Whether the model is loaded and its contract holds; False also when the server can't be reached."""
        return self._healthy(f"{_model_path(model)}/ready")

    def server_metadata(self) -> ServerMetadata:
        """Name, version and extensions of the server."""
        return self._get("/v2", ServerMetadata)

    def model_metadata(self, model: str) -> ModelMetadata:
        """Tensors and labels of a model."""
        return self._get(_model_path(model), ModelMetadata)

    def status(self) -> dict[str, Any]:
        """The agent's status document."""
        return self._get("/status", dict[str, Any])

    def classify(
        self,
        model: str,
        texts: Sequence[RawInput],
        deadline_s: float | None = None,
        priority: int = 0,
        local_only: bool = False,
    ) -> tuple[Answer, ...]:
        """Classify texts (or pairs of texts) in one request; one answer per text, in order."""
        import numpy as np

        if not texts:
            return ()
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if len({len(pair) for pair in pairs}) != 1:
            raise UsageError("texts and pairs of texts can't be mixed in one request")
        columns = [
            np.array([text.encode() for text in column], dtype=np.object_) for column in zip(*pairs, strict=True)
        ]
        inputs = dict(zip(("text", "text_pair"), columns, strict=False))
        response, latency_s = self._infer(model, inputs, True, None, _parameters(deadline_s, priority, local_only))
        try:
            labels = [label.decode() for label in response.outputs["label"].array.ravel().tolist()]
            scores = response.outputs["score"].array.ravel().tolist()
            rows = response.outputs["probabilities"].array.reshape(len(labels), -1).tolist()
            if not len(texts) == len(labels) == len(scores):
                raise ValueError(f"{len(labels)} answers to {len(texts)} texts")
        except (KeyError, ValueError, AttributeError) as error:
            raise RemoteError(f"the answer is no classification ({error})", where=self.url) from error
        route = _route(response.parameters, latency_s)
        return tuple(
            Answer(label=label, score=score, probabilities=tuple(row), **route)
            for label, score, row in zip(labels, scores, rows, strict=True)
        )

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any] | Tensor],
        binary: bool = True,
        *,
        outputs: Sequence[str] | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
        local_only: bool = False,
    ) -> InferResult:
        """Run a model on tensors. An array's datatype follows from its dtype; BF16 is a ``Tensor("BF16", bits)``.

        ``binary`` False sends and asks for JSON. Raises :class:`RequestError` for arrays that can't be sent.
        """
        from aios_edge.oip.datatypes import widen_bf16

        parameters = _parameters(deadline_s, priority, local_only)
        response, latency_s = self._infer(model, inputs, binary, outputs, parameters)
        return InferResult(
            outputs={
                name: widen_bf16(tensor.array) if tensor.datatype == "BF16" else tensor.array
                for name, tensor in response.outputs.items()
            },
            parameters=response.parameters,
            model_name=response.model_name,
            model_version=response.model_version,
            latency_s=latency_s,
        )

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any] | Tensor],
        binary: bool,
        outputs: Sequence[str] | None,
        parameters: Parameters,
    ) -> tuple[DecodedResponse, float]:
        from aios_edge.oip.tensors import decode_response, encode_request

        body, json_length = encode_request(inputs, binary=binary, outputs=outputs, parameters=parameters)
        headers = {"Content-Type": "application/json"}
        if json_length is not None:
            headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(json_length)}
        started_at = time.perf_counter()
        answer, content = self._ask("POST", f"{_model_path(model)}/infer", body, headers)
        latency_s = time.perf_counter() - started_at
        length = answer.getheader(JSON_LENGTH_HEADER)
        if length is not None and not length.isdecimal():
            raise RemoteError(f"{JSON_LENGTH_HEADER} is {length[:40]!r}", where=self.url)
        return decode_response(content, None if length is None else int(length)), latency_s

    def _healthy(self, path: str) -> bool:
        try:
            self._ask("GET", path)
        except RemoteError:
            return False
        return True

    def _get(self, path: str, kind: type[T]) -> T:
        _, content = self._ask("GET", path)
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RemoteError(f"the answer to {path} is not what was expected ({error})", where=self.url) from error

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self._connection
        while True:
            # A server may close an idle connection at any time, and it shows only when it is used again: one that
            # was kept alive gets a second chance, a fresh one doesn't. Inference has no side effects to repeat.
            kept_alive = connection.sock is not None
            try:
                answer, content = self._exchange(method, path, body, {**self._headers, **(headers or {})})
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                connection.close()
                if not kept_alive:
                    raise self._unreachable(error) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise self._unreachable(error) from error
            except BaseException:  # Ctrl-C in the middle: the rest of that answer must not meet the next request
                connection.close()
                raise
            else:
                if answer.status != 200:
                    raise self._refused(answer, content)
                return answer, content

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self._connection
        try:
            connection.request(method, path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None:  # it never stood
                raise
            # A server that refuses a body may stop reading it, and has said why before.
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer, content
        answer = connection.getresponse()
        return answer, answer.read()

    def _unreachable(self, error: Exception) -> RemoteError:
        if isinstance(error, TimeoutError):
            return RemoteError("no answer in time", where=self.url, remedy="Ask for less at once or raise timeout_s")
        text = str(error) or type(error).__name__
        return RemoteError(f"can't be reached ({text})", where=self.url, remedy="Check that the agent runs there")

    def _refused(self, answer: http.client.HTTPResponse, content: bytes) -> HttpError:
        try:
            text = str(msgspec.json.decode(content, type=dict[str, Any])["error"])
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
            text = content[:200].decode("utf-8", "replace") or answer.reason
        retry_after_s = _seconds(answer.getheader("Retry-After"))
        if answer.status in (429, 503, 504) and retry_after_s is not None:
            return Overloaded(text, where=self.url, retry_after_s=retry_after_s, status=answer.status)
        return HttpError(answer.status, text, where=self.url)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self.sock = sock


def _connection(url: str, timeout_s: float, ca: str | os.PathLike[str] | None) -> http.client.HTTPConnection:
    remedy = "Use http://host:port, https://host:port or unix:///path"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"is no URL ({error})", where=url, remedy=remedy) from error
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return _UnixConnection(parts.path, timeout_s)
    if parts.scheme == "https" and parts.hostname and parts.path in ("", "/"):
        return http.client.HTTPSConnection(parts.hostname, port, timeout=timeout_s, context=_trusting(ca))
    if parts.scheme == "http" and parts.hostname and parts.path in ("", "/"):
        return http.client.HTTPConnection(parts.hostname, port, timeout=timeout_s)
    raise UsageError("is not the URL of an agent", where=url, remedy=remedy)


def _trusting(ca: str | os.PathLike[str] | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"is no file of certificates ({error})", where=str(ca), remedy="Give a PEM file") from error


def _model_path(model: str) -> str:
    """``name`` or ``name:version``."""
    name, _, version = model.partition(":")
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _parameters(deadline_s: float | None, priority: int, local_only: bool) -> Parameters:
    parameters: Parameters = {}
    if deadline_s is not None:
        parameters["timeout"] = max(1, round(deadline_s * 1e6))  # 0 would mean no deadline at all
    if priority:
        parameters["priority"] = priority
    if local_only:
        parameters["privacy"] = LOCAL_ONLY
    return parameters


def _route(parameters: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
    def number(name: str, scale: float = 1.0) -> float | None:
        value = parameters.get(name)
        return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value * scale

    def text(name: str) -> str | None:
        value = parameters.get(name)
        return value if isinstance(value, str) else None

    batch_size = number("batch_size")
    return {
        "route": text("route"),
        "reason": text("reason"),
        "latency_s": latency_s,
        "queue_s": number("queue_us", 1e-6),
        "compute_s": number("compute_us", 1e-6),
        "batch_size": None if batch_size is None else int(batch_size),
        "energy_j": number("energy_j"),
        "energy_method": text("energy_method"),
    }


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None
