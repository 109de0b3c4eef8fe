"""Who asks over MQTT: anybody who may publish there, or, where there are tenants, the one that agent.toml names.

The broker's own rules decide who may publish; the agent sees no key and no user. So all that comes this way is one
tenant's, with its models, limits, priority and audit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aios_edge.errors import AiosEdgeError
from aios_edge.oip.envelope import error_body
from device_agent.audit import AuditLog, AuditRecord, audit_record
from device_agent.desk import FrontDesk
from device_agent.http import Reply, retry_after
from device_agent.mqtt_door import Ask
from device_agent.mqtt_request import Asked
from device_agent.tenant_account import TenantAccount
from device_agent.tenant_desk import TenantDesk


def anybody(desk: FrontDesk) -> Ask:
    """Without tenants."""

    async def ask(asked: Asked) -> Reply:
        return await desk.infer(asked.model, None, asked.body, asked.json_length, within_s=asked.within_s)

    return ask


class TenantAsks:
    """In the name of one tenant."""

    def __init__(
        self, account: TenantAccount, desk: TenantDesk, audit: AuditLog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._account = account
        self._desk = desk
        self._audit = audit
        self._clock = clock

    async def __call__(self, asked: Asked) -> Reply:
        """Answer a request, within what was agreed; raises what the desk refuses."""
        status: int | None = None  # None: the agent stopped first
        reply = Reply()
        limit: str | None = None
        try:
            now, size = self._clock(), len(asked.body)
            refusal = self._account.enter(size, now) or self._account.receive(size)
            await self._account.written()
            if refusal is not None:
                limit, status = refusal.limit, refusal.status
                after = () if refusal.retry_after_s is None else (retry_after(refusal.retry_after_s),)
                return Reply(status=refusal.status, body=error_body(refusal.text), headers=after)
            reply = await self._desk.infer(asked.model, None, asked.body, asked.json_length, within_s=asked.within_s)
            status = reply.status
            if reply.completion is not None:
                self._account.metrics.record(reply.completion)
            return reply
        except AiosEdgeError as error:
            status = error.http_status
            raise
        except Exception:
            status = 500  # as the door will say
            raise
        finally:
            self._audit.write(self._record(asked, reply, status, limit))

    def _record(self, asked: Asked, reply: Reply, status: int | None, limit: str | None) -> AuditRecord:
        return audit_record(
            self._account.tenant.id,
            reply.completion,
            method="PUBLISH",
            path=asked.topic,
            model=asked.model,
            limit=limit,
            status=status,
            bytes_in=len(asked.body),
            bytes_out=len(reply.body),
        )
