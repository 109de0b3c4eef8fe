"""The door where agent.toml has tenants: who is this, may they come in now, and what is written down of it.

An ASGI application around :class:`device_agent.http.HttpApp`. Whoever has no key gets to know whether the agent lives
and is ready, and nothing else: any other path, also one that doesn't exist, is a 401. A key goes no further than this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

from aios_edge.errors import RequestError
from aios_edge.oip.envelope import error_body
from device_agent.audit import AuditRecord, audit_record
from device_agent.desk import FrontDesk
from device_agent.http import HttpApp, Receive, Reply, Scope, Send, path_parts, respond, retry_after
from device_agent.http_protocol import PEER_UID
from device_agent.strangers import address_of
from device_agent.tenant_account import Refusal, TenantAccount
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.tenants import identify
from device_agent.values import Completion

_OPEN = (["v2", "health", "live"], ["v2", "health", "ready"])

Record = Callable[[Completion], None]


class TenantDoor:
    """The ASGI callable. ``record`` is told of every inference that ended, as :class:`HttpApp`'s is."""

    def __init__(
        self,
        desks: TenantDesks,
        front: FrontDesk,
        books: TenantBooks,
        *,
        max_body_bytes: int,
        record: Record,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desks = desks
        self._books = books
        self._max_body_bytes = max_body_bytes
        self._record = record
        self._clock = clock
        self._open = HttpApp(front, max_body_bytes=max_body_bytes, record=record)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        parts = path_parts(scope)
        if parts in _OPEN:
            await self._open(scope, receive, send)
            return
        authorization = [value for name, value in scope["headers"] if name == b"authorization"]
        uid = scope["state"].get(PEER_UID)
        tenant = identify(self._desks.tenants, authorization, uid)
        if tenant is None:
            self._desks.accounts.strangers += 1
            client, sent = scope.get("client"), bool(authorization)
            address = address_of(client, uid)
            self._books.strangers.came(address, scope["method"], scope["path"], key_sent=sent)
            await respond(scope, send, _unauthorized(sent=bool(authorization)))
            return
        visit = _Visit(self._desks.accounts.of[tenant.id], receive, send, self._clock)
        try:
            await self._visit(visit, scope, parts)
        finally:
            if scope["method"] not in ("GET", "HEAD"):  # who only looks changes nothing, and may look every second
                self._books.audit.write(visit.record(scope, parts))

    async def _visit(self, visit: _Visit, scope: Scope, parts: list[str]) -> None:
        tenant = visit.account.tenant
        if visit.refused_at_the_door(scope):
            assert visit.refusal is not None
            await respond(scope, visit.send, Reply(status=visit.refusal.status, body=error_body(visit.refusal.text)))
            return
        if parts[:3] == ["v2", "repository", "models"] and not tenant.admin:
            text = "only an admin may load and unload models"
            await respond(scope, visit.send, Reply(status=403, body=error_body(text)))
            return

        def record(completion: Completion) -> None:
            visit.completion = completion
            visit.account.metrics.record(completion)
            self._record(completion)

        app = HttpApp(self._desks.of[tenant.id], max_body_bytes=self._max_body_bytes, record=record)
        await app(scope, visit.receive, visit.send)


class _Visit:
    """One request of a tenant: what comes in is charged, what goes out is noted."""

    def __init__(self, account: TenantAccount, receive: Receive, send: Send, clock: Callable[[], float]) -> None:
        self.account = account
        self.refusal: Refusal | None = None
        self.completion: Completion | None = None
        self._receive = receive
        self._send = send
        self._clock = clock
        self._status: int | None = None  # None: the client went away
        self._bytes_in = 0
        self._bytes_out = 0

    def refused_at_the_door(self, scope: Scope) -> bool:
        """Whether it is too much already, before a byte of its body was read."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        self.refusal = self.account.enter(int(announced) if announced.isdigit() else 0, self._clock())
        return self.refusal is not None

    async def receive(self) -> MutableMapping[str, Any]:
        """The next piece; raises :class:`RequestError` when it is one too many."""
        message = await self._receive()
        size_bytes = len(message.get("body", b""))
        self._bytes_in += size_bytes
        self.refusal = self.account.receive(size_bytes)
        await self.account.written()
        if self.refusal is not None:
            raise RequestError(self.refusal.text, status=self.refusal.status)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self.refusal is not None and self.refusal.retry_after_s is not None:
                message = {**message, "headers": [*message["headers"], retry_after(self.refusal.retry_after_s)]}
        self._bytes_out += len(message.get("body", b""))
        await self._send(message)

    def record(self, scope: Scope, parts: list[str]) -> AuditRecord:
        """What is written down of it."""
        return audit_record(
            self.account.tenant.id,
            self.completion,
            method=scope["method"],
            path=scope["path"],
            model=parts[2] if parts[:2] == ["v2", "models"] and len(parts) > 2 else None,
            limit=self.refusal.limit if self.refusal else None,
            status=self._status,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
        )


def _unauthorized(*, sent: bool) -> Reply:
    challenge = b'Bearer realm="aios-edge"' + (b', error="invalid_token"' if sent else b"")
    text = "this key is nobody's here" if sent else "a key is needed"
    body = error_body(f"{text}. Send the header Authorization: Bearer KEY")
    return Reply(status=401, body=body, headers=((b"www-authenticate", challenge),))
