"""The methods of the service: each takes a message and the caller's desk, and answers with a message or a refusal."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

import msgspec

from aios_edge.errors import AiosEdgeError, RequestError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, ModelMetadata, ServerMetadata, parse_json_length
from aios_edge.oip.repository import Action
from device_agent.grpc_door.callers import Outcome, Visit
from device_agent.grpc_door.messages import METHODS, Message, ModelInferRequest
from device_agent.grpc_door.refusal import refusal, refused_reply
from device_agent.grpc_door.request import InferBody, infer_body, values_of
from device_agent.grpc_door.response import infer_response
from device_agent.http import Desk, Reply

log = logging.getLogger("device_agent.grpc")

_JSON_LENGTH = JSON_LENGTH_HEADER.lower().encode()

_changes: set[asyncio.Task[Reply]] = set()  # the loop itself holds its tasks only weakly


class Infer(msgspec.Struct, frozen=True, kw_only=True):
    """An inference as the desk takes it."""

    model: str
    version: str | None
    id: str
    made: InferBody


Asked = Infer | Message


class _Index(msgspec.Struct, frozen=True):
    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


def understood(visit: Visit, method: str, data: bytes | None, remaining_s: float | None) -> Asked:
    """What a message asks for; nothing of the message itself is kept. ``data`` None: none came.

    Raises :class:`RequestError`.
    """
    if data is None:
        raise RequestError("no message came", remedy=f"Send one of {method}'s")
    visit.receive(len(data))
    takes = ModelInferRequest if method == "ModelStreamInfer" else METHODS[method][0]
    try:
        message = takes.FromString(data)
    except Exception as error:  # DecodeError, of a class that differs between protobuf's implementations
        raise RequestError(f"the message is no {takes.DESCRIPTOR.name} ({error})") from error
    if takes is not ModelInferRequest:
        visit.model = getattr(message, "model_name", None) or getattr(message, "name", None)
        return message
    visit.model = message.model_name
    return Infer(
        model=message.model_name,
        version=message.model_version or None,
        id=message.id,
        made=infer_body(message, remaining_s),
    )


async def answered(visit: Visit, method: str, asked: Asked) -> Outcome:
    """Do what was asked. Raises :class:`AiosEdgeError` for what can't be done."""
    if isinstance(asked, Infer):
        return await infer(visit.desk, asked)
    if method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        return await _change(visit, method, asked)
    return Outcome(message=_told(visit.desk, method, asked).SerializeToString())


async def infer(desk: Desk, asked: Infer) -> Outcome:
    """One inference."""
    reply = await desk.infer(asked.model, asked.version, asked.made.body, asked.made.json_length)
    if reply.status != 200:
        refused = refused_reply(reply.status, reply.body, reply.retry_after_s)
        return Outcome(status=reply.status, refusal=refused, completion=reply.completion)
    length = parse_json_length(dict(reply.headers).get(_JSON_LENGTH))
    try:
        message = infer_response(reply.body, length, raw=asked.made.raw)
    except AiosEdgeError as error:
        # Its completion is kept: the inference was made, whatever became of the answer.
        failed = refusal(error.http_status, str(error))
        return Outcome(status=error.http_status, refusal=failed, completion=reply.completion)
    return Outcome(message=message.SerializeToString(), completion=reply.completion)


def failed(error: Exception, visit: Visit, what: str) -> Outcome:
    """What a request ends with that raised."""
    if isinstance(error, AiosEdgeError):
        after_s = visit.refused.retry_after_s if visit.refused is not None else None
        status = error.http_status
        return Outcome(status=status, refusal=refusal(status, str(error), retry_after_s=after_s))
    log.error("%s failed", what, exc_info=error)
    return Outcome(status=500, refusal=refusal(500, "an internal error; the agent's log has it"))


def _told(desk: Desk, method: str, asked: Message) -> Message:
    gives = METHODS[method][1]
    match method:
        case "ServerLive":
            return gives(live=True)
        case "ServerReady":
            return gives(ready=desk.ready())
        case "ModelReady":
            return gives(ready=desk.model_ready(asked.name, asked.version or None))
        case "ServerMetadata":
            server = msgspec.json.decode(desk.server_metadata(), type=ServerMetadata)
            return gives(name=server.name, version=server.version, extensions=server.extensions)
        case "ModelMetadata":
            model = msgspec.json.decode(desk.model_metadata(asked.name, asked.version or None), type=ModelMetadata)
            return _metadata(gives, model)
        case _:
            _one_repository(asked.repository_name)
            index = msgspec.json.decode(desk.repository_index(), type=tuple[_Index, ...])
            shown = [model for model in index if model.state == "READY" or not asked.ready]
            return gives(models=[msgspec.structs.asdict(model) for model in shown])


def _metadata(gives: Message, model: ModelMetadata) -> Message:
    tensors = {side: [msgspec.structs.asdict(t) for t in getattr(model, side)] for side in ("inputs", "outputs")}
    ours = ("labels", "natural_inputs", "natural_outputs")
    properties = {name: msgspec.json.encode(value).decode() for name in ours if (value := getattr(model, name))}
    return gives(name=model.name, versions=model.versions, platform=model.platform, properties=properties, **tensors)


async def _change(visit: Visit, method: str, asked: Message) -> Outcome:
    """Load or unload. Not cancelled when the client goes away: what was asked is done."""
    if not visit.may_change_repository:
        raise RequestError("only an admin may load and unload models", status=403)
    action: Action = "load" if method == "RepositoryModelLoad" else "unload"
    model = asked.model_name or asked.repository_name  # KServe's clients have it in the first field
    if asked.model_name:
        _one_repository(asked.repository_name)
    given = values_of(asked.parameters, "parameters")
    body = msgspec.json.encode({"parameters": dict.fromkeys(given)})  # by name; the values may be files
    task = asyncio.create_task(visit.desk.repository_change(model, action, body))
    _changes.add(task)
    task.add_done_callback(_changes.discard)
    reply = await asyncio.shield(task)
    if reply.status != 200:
        return Outcome(status=reply.status, refusal=refused_reply(reply.status, reply.body, None))
    done: Literal["isLoaded", "isUnloaded"] = "isLoaded" if action == "load" else "isUnloaded"
    return Outcome(message=METHODS[method][1](model_name=model, **{done: True}).SerializeToString())


def _one_repository(name: str) -> None:
    if name:
        raise RequestError(f"there is no repository {name[:80]!r}", status=404, remedy="Leave repository_name empty")
