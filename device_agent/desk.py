"""Answers what comes through the doors: from bytes to :class:`InferenceRequest` and from :class:`Answer` to bytes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from aios_edge.errors import PromiseBroken, RequestError
from aios_edge.oip.envelope import (
    JSON_LENGTH_HEADER,
    Envelope,
    ServerMetadata,
    encode_response,
    error_body,
    parse_request,
)
from aios_edge.oip.repository import Action, change_body, check_change
from aios_edge.version import __version__
from device_agent.admission import Load, admit
from device_agent.answer import Answer, shed_answer
from device_agent.deployment import Deployment
from device_agent.fairness import has_room, shares
from device_agent.http import Reply, Unheard, internal_error, retry_after
from device_agent.metadata import model_metadata
from device_agent.metrics import Metrics
from device_agent.model_host import ModelHost
from device_agent.model_views import repository_index
from device_agent.policy_in_force import PolicyInForce
from device_agent.raw_model import is_raw
from device_agent.status import AgentStatus
from device_agent.tenants import Tenant
from device_agent.values import Completion, InferenceRequest, Shed

log = logging.getLogger("device_agent")


class FrontDesk:
    """What :class:`device_agent.http.HttpApp` asks; ``draining`` is set by the agent when it stops. ``weights`` are the
    tenants'."""

    def __init__(
        self,
        deployment: Deployment,
        rules: PolicyInForce,
        metrics: Metrics,
        agent_status: Callable[[], AgentStatus],
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self.in_flight_bytes = 0
        self.in_flight = 0
        self._parts = shares(weights or {})
        self._held_bytes: Counter[str] = Counter()  # of in_flight_bytes, by tenant
        self._deployment = deployment
        self._rules = rules
        self._metrics = metrics
        self._agent_status = agent_status
        self._clock = clock
        self._numbers = itertools.count(1)

    def server_metadata(self) -> bytes:
        """``GET /v2``."""
        return msgspec.json.encode(ServerMetadata(name="aios-edge", version=__version__))

    def ready(self) -> bool:
        """Whether the activations of the start are over, any model serves, and the agent isn't stopping."""
        return not self.draining and self._deployment.ready

    def model_metadata(self, model: str, version: str | None) -> bytes:
        """``GET /v2/models/{m}``."""
        manifest = self._deployment.host(model, version).bundle.manifest
        if not manifest.outputs:  # a raw model's tensors are its session's
            raise RequestError("is still loading: its tensors aren't known yet", status=503, where=manifest.name)
        return msgspec.json.encode(model_metadata(manifest))

    def model_ready(self, model: str, version: str | None) -> bool:
        """``GET /v2/models/{m}/ready``."""
        return self._deployment.serves(model, version) and not self.draining

    def repository_index(self) -> bytes:
        """``POST /v2/repository/index``, in Triton's words; bundles that may not serve are in it, with the reason."""
        return msgspec.json.encode(repository_index(self._deployment))

    async def repository_change(self, model: str, action: Action, body: bytes) -> Reply:
        """``POST /v2/repository/models/{m}/load`` and ``unload``. A bundle that may not serve is a 422 that names the
        check; raises the rest."""
        check_change(action, body)
        try:
            await (self._deployment.load(model) if action == "load" else self._deployment.unload(model))
        except PromiseBroken as error:
            return Reply(status=422, body=error_body(str(error), {"check": error.promise}))
        return Reply(body=change_body(action, model))

    def metrics(self) -> bytes:
        """``GET /metrics``."""
        return self._metrics.render(self._agent_status())

    def status(self) -> bytes:
        """``GET /status``."""
        return msgspec.json.encode(self._agent_status())

    def submit(
        self,
        model: str,
        version: str | None,
        body: bytes,
        json_length: int | None,
        on_reply: Callable[[Reply], None],
        tenant: Tenant | None = None,
        within_s: float | None = None,
    ) -> Callable[[], None]:
        """Take in one inference request; ``on_reply`` is called once, maybe before this returns. What is returned is
        called when the client goes away. ``within_s``: how long the answer is worth something, whatever the request
        says. Raises :class:`RequestError` for what can't be understood."""
        arrived_at = self._clock()
        host = self._deployment.answering(model, version)
        envelope = parse_request(body, json_length)
        request = self._request(host, envelope, body, json_length, arrived_at, tenant, within_s)
        load = Load(
            draining=self.draining,
            in_flight_bytes=self.in_flight_bytes,
            in_flight_limit_bytes=self._rules.policy.in_flight_bytes,
            crowded=self._crowded(request.tenant, len(body)),
        )
        admission = admit(request, arrived_at, load)
        if isinstance(admission, Shed):
            on_reply(self._reply(host, request, shed_answer(admission)))
            return _stay
        self._hold(request.tenant, len(body), 1)

        def over() -> None:
            self._hold(request.tenant, -len(body), -1)

        def answered(answer: Answer) -> None:
            over()
            try:
                reply = self._reply(host, request, answer)
            except Exception:  # whoever asked is to hear something
                log.exception("the answer to a request for %s could not be put together", model)
                reply = internal_error()
            on_reply(reply)

        def leave() -> None:
            if not ticket.answered:
                over()
                host.leave(ticket)

        try:
            ticket = host.submit(request, answered)
        except BaseException:
            over()
            raise
        return leave

    def _hold(self, tenant: str, size_bytes: int, count: int) -> None:
        self.in_flight_bytes += size_bytes
        self.in_flight += count
        if self._parts:
            self._held_bytes[tenant] += size_bytes

    def _crowded(self, tenant: str, size_bytes: int) -> bool:
        limit = self._rules.policy.in_flight_bytes
        return bool(self._parts) and not has_room(tenant, self._held_bytes, self._parts, limit, size_bytes)

    async def infer(
        self,
        model: str,
        version: str | None,
        body: bytes,
        json_length: int | None,
        tenant: Tenant | None = None,
        within_s: float | None = None,
    ) -> Reply:
        """:meth:`submit`, awaited; cancelling it is going away. Raises :class:`Unheard` where the reply was there."""
        replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def reply(found: Reply) -> None:
            if not replied.done():
                replied.set_result(found)

        leave = self.submit(model, version, body, json_length, reply, tenant, within_s)
        try:
            return await replied
        except asyncio.CancelledError:
            if replied.done() and not replied.cancelled():
                raise Unheard(replied.result()) from None
            raise
        finally:
            leave()

    def _request(
        self,
        host: ModelHost,
        envelope: Envelope,
        body: bytes,
        json_length: int | None,
        arrived_at: float,
        tenant: Tenant | None,
        within_s: float | None,
    ) -> InferenceRequest:
        timeout_s = envelope.timeout_s if envelope.timeout_s is not None else self._rules.policy.default_deadline_s
        if within_s is not None:
            timeout_s = within_s if timeout_s is None else min(timeout_s, within_s)
        natural, max_rows = False, self._rules.policy.max_rows
        for tensor in envelope.inputs:
            natural = natural or tensor.name not in host.tensors
            # The first dimension of a raw model's tensor may be anything: the samples of a sound, say.
            if tensor.shape and tensor.shape[0] > max_rows and not is_raw(host.bundle.manifest):
                raise RequestError(
                    f"has {tensor.shape[0]} rows, at most {max_rows} are taken at once",
                    status=413,
                    where=f"input {tensor.name[:80]!r}",
                    remedy="Send smaller batches, or raise policy.max_rows",
                )
        priority = envelope.priority if tenant is None else tenant.priority(envelope.priority)
        return InferenceRequest(
            request_id=next(self._numbers),
            model=host.name,
            body=body,
            json_length=json_length,
            client_id=envelope.id,
            priority=priority,
            deadline_at=None if timeout_s is None else arrived_at + timeout_s,
            local_only=envelope.local_only,
            arrived_at=arrived_at,
            cost_hint_bytes=envelope.cost_hint_bytes,
            natural=natural,
            tenant="" if tenant is None else tenant.id,
            lowered=priority != envelope.priority,
        )

    def _reply(self, host: ModelHost, request: InferenceRequest, answer: Answer) -> Reply:
        now = self._clock()
        energy_j = answer.energy.energy_j if answer.energy else None
        completion = Completion(
            model=host.name,
            route=answer.route,
            reason=answer.reason.value,
            status=answer.status,
            latency_s=now - request.arrived_at,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            batch_size=answer.batch_size,
            late=None if request.deadline_at is None else now > request.deadline_at,
            energy_j=energy_j,
            request_id=request.request_id,
            client_id=request.client_id,
        )
        if answer.error is not None:
            headers = () if answer.retry_after_s is None else (retry_after(answer.retry_after_s),)
            # No route took it, and the reason is what a program decides by.
            shed = {"route": None, "reason": answer.reason.value, **request.changed_parameters}
            error = error_body(answer.error, shed if answer.route == "shed" else None)
            after_s = answer.retry_after_s
            return Reply(
                status=answer.status, body=error, headers=headers, completion=completion, retry_after_s=after_s
            )
        if answer.remote_body is not None:
            body, json_length = answer.remote_body, answer.remote_json_length
        else:
            parameters = _parameters(answer, completion.reason)
            if request.lowered:
                parameters |= request.changed_parameters
            body, json_length = encode_response(
                model_name=host.name,
                model_version=host.bundle.manifest.version,
                outputs=answer.outputs,
                binary=answer.binary,
                id=request.client_id,
                parameters=parameters,
            )
        if json_length is None:
            return Reply(body=body, completion=completion)
        return Reply(
            body=body,
            content_type="application/octet-stream",
            headers=((JSON_LENGTH_HEADER.lower().encode(), str(json_length).encode()),),
            completion=completion,
        )


def _stay() -> None:
    """There is nothing to leave."""


def _parameters(answer: Answer, reason: str) -> dict[str, Any]:
    """What happened, beside a local answer. A cloud answer carries its own, with route and reason laid over."""
    return {
        "route": answer.route,
        "reason": reason,
        "queue_us": _us(answer.queue_s),
        "compute_us": _us(answer.compute_s),
        "batch_size": answer.batch_size,
        "energy_j": answer.energy.energy_j if answer.energy else None,
        "energy_method": answer.energy.method if answer.energy else None,
    }


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)
