"""What a tenant has used of what was agreed, and what is counted of it. Its bytes of the day survive a restart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import msgspec

from device_agent.budget_book import BudgetBook, Limit
from device_agent.metrics import Metrics, Page
from device_agent.quota import Bucket
from device_agent.tenants import Tenant

BYTES = "bytes"
FILE = "quotas.json"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """More than was agreed. ``limit``: the setting that says so; ``retry_after_s`` None: it will never fit."""

    limit: str
    text: str
    retry_after_s: float | None

    @property
    def status(self) -> int:
        """429, or 413 for what no waiting helps."""
        return 413 if self.retry_after_s is None else 429


class TenantAccount:
    """One tenant. Times are seconds of a monotonic clock."""

    def __init__(self, tenant: Tenant, book: BudgetBook, now: float) -> None:
        self.tenant = tenant
        self.metrics = Metrics()
        self.refused: Counter[str] = Counter()
        self.received_bytes = 0
        self.in_flight = 0
        rate = tenant.requests_per_s
        burst = float(tenant.burst or max(1, math.ceil(rate or 0)))
        self._bucket = None if rate is None else Bucket.full(rate, burst, now)
        self._book = book

    def bytes_left(self) -> int | None:
        """Of this day's; None without a limit."""
        left = self._book.left(self.tenant.id, BYTES)
        return None if left is None else int(left)

    def enter(self, announced_bytes: int, now: float) -> Refusal | None:
        """A request that announces a body of that size; None lets it in."""
        if self._bucket is not None:
            wait_s = self._bucket.wait_s(now)
            if wait_s > 0:
                return self._refuse(
                    "requests_per_s", f"more than {self._bucket.rate_per_s:g} requests a second", wait_s
                )
            self._bucket = self._bucket.taken(now)
        return self._too_many_bytes(announced_bytes)

    def receive(self, size_bytes: int) -> Refusal | None:
        """A piece of a body has come; None takes it."""
        refusal = self._too_many_bytes(size_bytes)
        if refusal is None:
            self.received_bytes += size_bytes
            if size_bytes and self.tenant.bytes_per_day is not None:
                self._book.take(self.tenant.id, {BYTES: float(size_bytes)})
        return refusal

    async def written(self) -> None:
        """Wait until what was received would be known after a kill."""
        await self._book.written()

    def _too_many_bytes(self, size_bytes: int) -> Refusal | None:
        wait_s = self._book.wait_s(self.tenant.id, BYTES, size_bytes)
        if wait_s == 0:
            return None
        text = f"more than {self.tenant.bytes_per_day} bytes of requests in 24 hours"
        return self._refuse("bytes_per_day", text, None if math.isinf(wait_s) else wait_s)

    def _refuse(self, limit: str, text: str, retry_after_s: float | None) -> Refusal:
        self.refused[limit] += 1
        after = "send less" if retry_after_s is None else f"retry after {retry_after_s:.2f} s"
        return Refusal(limit=limit, text=f"{text} [{limit}]; {after}", retry_after_s=retry_after_s)


class Accounts:
    """All of them, and how many callers were nobody's."""

    def __init__(self, tenants: Iterable[Tenant], book: BudgetBook, now: float) -> None:
        self.of: Mapping[str, TenantAccount] = {tenant.id: TenantAccount(tenant, book, now) for tenant in tenants}
        self.strangers = 0


def quota_book(tenants: Iterable[Tenant], clock: Callable[[], float]) -> BudgetBook:
    """The tenants' bytes of the day; kept on disk once it is opened there."""
    limits = {
        tenant.id: {BYTES: Limit(per_day=tenant.bytes_per_day)}
        for tenant in tenants
        if tenant.bytes_per_day is not None
    }
    return BudgetBook(limits, clock, file=FILE, lenient=True)


def account_families(page: Page, accounts: Iterable[TenantAccount]) -> None:
    """What is counted of these tenants, in Prometheus text."""
    accounts = tuple(accounts)
    page.family(
        "aios_tenant_requests_total",
        "counter",
        "Inference requests that ended, by who asked, where they ran and why.",
        [
            ((account.tenant.id, model, route, reason, str(status)), count)
            for account in accounts
            for (model, route, reason, status), count in account.metrics.requests.items()
        ],
        ("tenant", "model", "route", "reason", "status"),
    )
    page.family(
        "aios_tenant_refused_total",
        "counter",
        "Requests beyond what was agreed, by the limit that refused them.",
        [((account.tenant.id, limit), count) for account in accounts for limit, count in account.refused.items()],
        ("tenant", "limit"),
    )
    page.family(
        "aios_tenant_received_bytes_total",
        "counter",
        "Bytes of request bodies.",
        [((account.tenant.id,), account.received_bytes) for account in accounts],
        ("tenant",),
    )
