"""What is written down where there are tenants: audits, who was nobody's, the bytes of the day, captured requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device_agent.audit import AuditLog
from device_agent.budget_book import BudgetBook
from device_agent.capture import Captures
from device_agent.strangers import Strangers
from device_agent.tenant_account import quota_book
from device_agent.tenants import Tenant


@dataclass(frozen=True, kw_only=True)
class TenantBooks:
    """Made before the doors open; nothing touches the disk before :meth:`open`."""

    audit: AuditLog
    strangers: Strangers
    quotas: BudgetBook
    captures: Captures

    @staticmethod
    def of(
        tenants: tuple[Tenant, ...], state_dir: Path, emit: Callable[..., None], tell_stranger: Callable[[str], None]
    ) -> TenantBooks:
        """Those of an agent. ``emit`` takes events, ``tell_stranger`` the address of each caller who is nobody's."""
        return TenantBooks(
            audit=AuditLog(state_dir, {tenant.id: tenant.audit_bytes for tenant in tenants}),
            strangers=Strangers(state_dir, tell_stranger),
            quotas=quota_book(tenants, time.monotonic),
            captures=Captures(tenants, emit),
        )

    def open(self, state_dir: Path) -> None:
        """Go on with what was written down before."""
        self.quotas.open(state_dir)

    async def close(self) -> None:
        """Write what waits."""
        await self.quotas.close()
        for book in (self.audit, self.strangers, self.captures):
            await asyncio.to_thread(book.close)
