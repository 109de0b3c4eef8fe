"""Who calls, and what is kept of a call: with tenants as at the HTTP door, limits and audit included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import unquote

import msgspec

from aios_edge.errors import RequestError
from device_agent.audit import AuditLog, audit_record
from device_agent.desk import FrontDesk
from device_agent.grpc_door.refusal import GrpcRefusal
from device_agent.http import Desk
from device_agent.tenant_account import Refusal, TenantAccount
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.tenants import identify
from device_agent.values import Completion

#: Who only looks changes nothing, and may look every second: what is a GET over HTTP has no line in the audit.
_LOOKS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")

Record = Callable[[Completion], None]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request ends with: the bytes of a message, or a refusal. ``status``: what REST would have said."""

    status: int = 200
    message: bytes = b""
    refusal: GrpcRefusal | None = None
    completion: Completion | None = None


class Visit:
    """One request of one caller. Made when a call comes, told what came in, and :meth:`end` when it is over."""

    def __init__(self, desk: Desk, record: Record, path: str) -> None:
        self.desk = desk
        self.path = path
        self.model: str | None = None
        self.refused: Refusal | None = None
        self.may_change_repository = True
        self.unheard: Completion | None = None  # of an answer that was there when the client had gone
        self._record = record

    def enter(self) -> None:
        """Ask to come in, before anything of it is read. Raises :class:`RequestError` for more than was agreed."""

    def receive(self, size_bytes: int) -> None:
        """A message has come. Raises :class:`RequestError` for more than was agreed."""

    def again(self) -> Visit:
        """Another request of the same caller."""
        return Visit(self.desk, self._record, self.path)

    def end(self, outcome: Outcome | None) -> None:
        """It is over; None: the client went away first."""
        if (done := self._done(outcome)) is not None:
            self._record(done)

    def _done(self, outcome: Outcome | None) -> Completion | None:
        return self.unheard if outcome is None else outcome.completion


class TenantVisit(Visit):
    """A tenant's."""

    def __init__(
        self, desk: Desk, account: TenantAccount, audit: AuditLog, record: Record, path: str, clock: Callable[[], float]
    ) -> None:
        super().__init__(desk, record, path)
        self.may_change_repository = account.tenant.admin
        self._account = account
        self._audit = audit
        self._clock = clock
        self._bytes_in = 0

    def enter(self) -> None:
        """Take one of its requests."""
        self._unless(self._account.enter(0, self._clock()))

    def receive(self, size_bytes: int) -> None:
        """Take of its bytes."""
        self._bytes_in += size_bytes
        self._unless(self._account.receive(size_bytes))

    def again(self) -> Visit:
        """Another request of this tenant's."""
        return TenantVisit(self.desk, self._account, self._audit, self._record, self.path, self._clock)

    def end(self, outcome: Outcome | None) -> None:
        """Count it, and write down what asked for more than a look."""
        done = self._done(outcome)
        if done is not None:
            self._account.metrics.record(done)
        super().end(outcome)
        if self.path.rpartition("/")[2] in _LOOKS:
            return
        self._audit.write(
            audit_record(
                self._account.tenant.id,
                done,
                method="POST",  # as HTTP/2 has it
                path=self.path,
                model=self.model,
                limit=self.refused.limit if self.refused else None,
                status=outcome.status if outcome is not None else None,
                bytes_in=self._bytes_in,
                bytes_out=len(outcome.message) if outcome is not None else 0,
            )
        )

    def _unless(self, refused: Refusal | None) -> None:
        if refused is not None:
            self.refused = refused
            raise RequestError(refused.text, status=refused.status)


class Callers:
    """Tells callers apart; ``tenants`` None: everybody may ask everything."""

    def __init__(
        self,
        front: FrontDesk,
        tenants: TenantDesks | None,
        books: TenantBooks,
        record: Record,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.anybody = front
        self._tenants = tenants
        self._books = books
        self._record = record
        self._clock = clock

    def visit(self, metadata: Iterable[tuple[str, str | bytes]], path: str) -> Visit | None:
        """A request of whoever sent that metadata; None: it is nobody's here."""
        if self._tenants is None:
            return Visit(self.anybody, self._record, path)
        keys = [_bytes(value) for name, value in metadata if name == "authorization"]
        tenant = identify(self._tenants.tenants, keys, None)
        if tenant is None:
            self._tenants.accounts.strangers += 1
            return None
        account, desk = self._tenants.accounts.of[tenant.id], self._tenants.of[tenant.id]
        return TenantVisit(desk, account, self._books.audit, self._record, path, self._clock)

    def sent_away(self, peer: str, path: str, *, key_sent: bool) -> None:
        """Write down one that was nobody's; ``peer`` as grpcio has it: ``ipv4:127.0.0.1:50000``."""
        address = unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]") or peer
        self._books.strangers.came(address, "POST", path, key_sent=key_sent)

    def stranger(self, path: str) -> Visit:
        """A request for what everybody may ask."""
        return Visit(self.anybody, self._record, path)

    @staticmethod
    def sent_a_key(metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """Whether there was one at all."""
        return any(name == "authorization" for name, _ in metadata)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
