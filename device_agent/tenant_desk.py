"""The desk as one tenant finds it: its own models, metrics and status, and nothing that tells of another's.

A model it may not use answers exactly as one that doesn't exist. What others may have caused (queues, memory, power,
the cloud, events) is told to an admin only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from aios_edge.oip.envelope import JSON_LENGTH_HEADER, parse_request
from aios_edge.oip.repository import Action
from aios_edge.version import __version__
from device_agent.capture import Captured, Captures
from device_agent.deployment import Deployment
from device_agent.desk import FrontDesk
from device_agent.http import Reply
from device_agent.metrics import Page
from device_agent.model_host import ModelHost
from device_agent.model_views import repository_index
from device_agent.status import STATUS_SCHEMA
from device_agent.tenant_account import Accounts, TenantAccount, account_families
from device_agent.tenant_books import TenantBooks
from device_agent.tenants import Tenant


def capture_families(page: Page, captures: Captures, tenants: Iterable[str]) -> None:
    """What was kept of these tenants' requests, in Prometheus text."""
    counts = [(name, count) for name in tenants if (count := captures.counts(name)) is not None]
    for name, text, index in (
        ("aios_tenant_captured_total", "Requests that were kept with their answers.", 0),
        ("aios_tenant_capture_lost_total", "Those that should have been: the disk refused or was slow.", 1),
    ):
        page.family(name, "counter", text, [((tenant,), count[index]) for tenant, count in counts], ("tenant",))


class TenantModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of its models. Why one isn't ready may tell of others' requests, and of paths: an admin's to see."""

    version: str
    state: str


class TenantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /status`` of a tenant. ``totals`` and ``in_flight`` are its own; ``state`` is of the models it sees."""

    schema: str = STATUS_SCHEMA
    tenant: str
    agent_version: str
    state: str  # starting, ready, degraded, draining
    models: dict[str, TenantModelStatus]
    totals: dict[str, int]
    in_flight: int
    requests_per_s: float | None
    bytes_per_day: int | None
    bytes_left: int | None
    priority_ceiling: int | None


class TenantDesks:
    """All tenants, what they used, and the desk of each. The doors share them: a limit is a tenant's, not a door's."""

    def __init__(
        self,
        tenants: tuple[Tenant, ...],
        front: FrontDesk,
        deployment: Deployment,
        books: TenantBooks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tenants = tenants
        self.books = books
        self.accounts = Accounts(tenants, books.quotas, clock())
        self.of: Mapping[str, TenantDesk] = {
            name: TenantDesk(account, self.accounts, front, deployment, books.captures)
            for name, account in self.accounts.of.items()
        }


class TenantDesk:
    """Stands between :class:`device_agent.http.HttpApp` and the :class:`FrontDesk` for one tenant."""

    def __init__(
        self,
        account: TenantAccount,
        accounts: Accounts,
        front: FrontDesk,
        deployment: Deployment,
        captures: Captures,
    ) -> None:
        self._account = account
        self._accounts = accounts
        self._tenant = account.tenant
        self._front = front
        self._deployment = deployment
        self._captures = captures

    def server_metadata(self) -> bytes:
        """``GET /v2``."""
        return self._front.server_metadata()

    def ready(self) -> bool:
        """``GET /v2/health/ready``: the same for everybody."""
        return self._front.ready()

    def model_metadata(self, model: str, version: str | None) -> bytes:
        """``GET /v2/models/{m}``."""
        self._must_see(model)
        return self._front.model_metadata(model, version)

    def model_ready(self, model: str, version: str | None) -> bool:
        """``GET /v2/models/{m}/ready``."""
        self._must_see(model)
        return self._front.model_ready(model, version)

    def repository_index(self) -> bytes:
        """``POST /v2/repository/index``: its own models; only an admin is told why one isn't ready."""
        if self._tenant.admin:
            return self._front.repository_index()
        index = repository_index(self._deployment)
        return msgspec.json.encode([{**model, "reason": ""} for model in index if self._tenant.sees(model["name"])])

    async def repository_change(self, model: str, action: Action, body: bytes) -> Reply:
        """``POST /v2/repository/models/{m}/load`` and ``unload``; the door lets only an admin in."""
        return await self._front.repository_change(model, action, body)

    async def infer(
        self, model: str, version: str | None, body: bytes, json_length: int | None, within_s: float | None = None
    ) -> Reply:
        """Answer one inference request in this tenant's name."""
        self._must_see(model)
        self._account.in_flight += 1
        try:
            reply = await self._front.infer(model, version, body, json_length, tenant=self._tenant, within_s=within_s)
        finally:
            self._account.in_flight -= 1
        if reply.status == 200 and (wish := self._captures.wants(self._tenant.id)) is not None:
            self._capture(wish, model, body, json_length, reply)
        return reply

    def _capture(self, wish: Tenant, model: str, body: bytes, json_length: int | None, reply: Reply) -> None:
        """Keep a request with its answer, unless it is private and nobody said that such are kept as well."""
        host = self._deployment.hosts.get(model)
        private = host is None or host.never_leaves or parse_request(body, json_length).local_only
        if private and not wish.capture_local_only:
            return
        done, answered = reply.completion, dict(reply.headers).get(JSON_LENGTH_HEADER.lower().encode())
        captured = Captured(
            model=model,
            request_id=done.request_id if done else None,
            client_id=done.client_id if done else None,
            route=done.route if done else None,
            reason=done.reason if done else None,
            request=body,
            request_json_length=json_length,
            answer=reply.body,
            answer_json_length=None if answered is None else int(answered),
        )
        self._captures.keep(self._tenant.id, captured)

    def metrics(self) -> bytes:
        """``GET /metrics``: its own requests; an admin's page is the whole one, with what is counted by tenant."""
        page = Page()
        if self._tenant.admin:
            account_families(page, self._accounts.of.values())
            capture_families(page, self._captures, self._accounts.of)
            strangers: list[tuple[tuple[str, ...], float]] = [((), self._accounts.strangers)]
            page.family("aios_unauthorized_total", "counter", "Requests without a known key.", strangers, ())
            return self._front.metrics() + page.text()
        self._account.metrics.requests_on(page)
        ready: list[tuple[tuple[str, ...], float]] = [
            ((name,), int(host.serves)) for name, host in self._hosts().items()
        ]
        page.family("aios_model_ready", "gauge", "1 while it serves.", ready, ("model",))
        account_families(page, (self._account,))
        capture_families(page, self._captures, (self._tenant.id,))
        return page.text()

    def status(self) -> bytes:
        """``GET /status``: what concerns it; an admin's document is the whole one."""
        if self._tenant.admin:
            return self._front.status()
        hosts = self._hosts()
        return msgspec.json.encode(
            TenantStatus(
                tenant=self._tenant.id,
                agent_version=__version__,
                state=self._state(hosts),
                models={
                    name: TenantModelStatus(
                        version=host.bundle.manifest.version, state="ready" if host.serves else host.state
                    )
                    for name, host in hosts.items()
                },
                totals=self._account.metrics.totals(),
                in_flight=self._account.in_flight,
                requests_per_s=self._tenant.requests_per_s,
                bytes_per_day=self._tenant.bytes_per_day,
                bytes_left=self._account.bytes_left(),
                priority_ceiling=self._tenant.priority_ceiling,
            )
        )

    def _hosts(self) -> Mapping[str, ModelHost]:
        return {name: host for name, host in self._deployment.hosts.items() if self._tenant.sees(name)}

    def _state(self, hosts: Mapping[str, ModelHost]) -> str:
        if self._front.draining:
            return "draining"
        if any(host.state == "loading" for host in hosts.values()):
            return "starting"
        refused = any(self._tenant.sees(bundle.model) for bundle in self._deployment.refused)
        well = bool(hosts) and all(host.serves for host in hosts.values())
        return "ready" if well and not refused else "degraded"

    def _must_see(self, model: str) -> None:
        if not (self._tenant.sees(model) and self._deployment.knows(model)):
            raise self._deployment.no_model(model, self._hosts())
