"""Who asks over MQTT: anybody who may publish there, or, where there are tenants, the one that agent.toml names.

The broker's own rules decide who may publish; the agent sees no key and no user. So all that comes this way is one
tenant's, with its models, limits, priority and audit: also what is no request, and what there is no room for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aios_edge.errors import AiosEdgeError
from aios_edge.oip.envelope import error_body
from device_agent.audit import AuditLog, audit_record
from device_agent.desk import FrontDesk
from device_agent.http import Reply, retry_after
from device_agent.mqtt_request import Asked, Came
from device_agent.tenant_account import Refusal, TenantAccount
from device_agent.tenant_desk import TenantDesk
from device_agent.values import Reason


class Anybody:
    """Without tenants."""

    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk

    async def ask(self, came: Came, read: Callable[[], Asked]) -> Reply:
        """Answer a request; raises what it is refused for."""
        asked = read()
        return await self._desk.infer(asked.model, None, asked.body, asked.json_length, within_s=asked.within_s)

    def shed(self, came: Came, reply: Reply) -> Reply:
        """Nothing more stands against it."""
        return reply


class TenantAsks:
    """In the name of one tenant."""

    def __init__(
        self, account: TenantAccount, desk: TenantDesk, audit: AuditLog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._account = account
        self._desk = desk
        self._audit = audit
        self._clock = clock

    async def ask(self, came: Came, read: Callable[[], Asked]) -> Reply:
        """Answer a request, within what was agreed."""
        status: int | None = None  # None: the agent stopped first
        reply = Reply()
        limit: str | None = None
        try:
            refusal = self._enter(came)
            await self._account.written()
            if refusal is not None:
                limit, status, reply = refusal.limit, refusal.status, _refused(refusal)
                return reply
            asked = read()
            reply = await self._desk.infer(asked.model, None, asked.body, asked.json_length, within_s=asked.within_s)
            status = reply.status
            if reply.completion is not None:
                self._account.metrics.record(reply.completion)
            return reply
        except AiosEdgeError as error:
            status = error.http_status
            reply = Reply(status=status, body=error_body(str(error)))
            return reply
        except Exception:
            status = 500  # as the door will say
            raise
        finally:
            self._write(came, reply, status, limit)

    def shed(self, came: Came, reply: Reply) -> Reply:
        """It came all the same: it counts, and is written down."""
        refusal = self._enter(came)
        if refusal is not None:
            reply = _refused(refusal)
        self._write(came, reply, reply.status, Reason.QUEUE_FULL.value if refusal is None else refusal.limit)
        return reply

    def _enter(self, came: Came) -> Refusal | None:
        return self._account.enter(came.size_bytes, self._clock()) or self._account.receive(came.size_bytes)

    def _write(self, came: Came, reply: Reply, status: int | None, limit: str | None) -> None:
        self._audit.write(
            audit_record(
                self._account.tenant.id,
                reply.completion,
                method="PUBLISH",
                path=came.topic,
                model=came.model,
                limit=limit,
                status=status,
                bytes_in=came.size_bytes,
                bytes_out=len(reply.body),
            )
        )


def _refused(refusal: Refusal) -> Reply:
    after = () if refusal.retry_after_s is None else (retry_after(refusal.retry_after_s),)
    return Reply(status=refusal.status, body=error_body(refusal.text), headers=after)
