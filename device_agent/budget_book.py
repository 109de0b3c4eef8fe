"""The budgets of all cloud endpoints, or of all tenants, kept on disk.

What is spent is written down ahead: the file counts a hundredth of a day's worth more as spent than was. Of that, the
first half is spent without writing, then the file is written beside the requests; one that needs more than the file
knows of waits. So the disk is written to some two hundred times a day, and an agent that is killed loses a hundredth at
most, and never spends more than it was allowed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from aios_edge.telemetry import BudgetFigures
from device_agent import budget_file
from device_agent.budget import Budget
from device_agent.budget_file import BudgetsByEndpoint, SavedBudget, SavedBudgets

log = logging.getLogger("device_agent.cloud")

AHEAD = 0.01  # of a day's worth


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """``per_day`` at most. ``unit``: the least that is ever spent."""

    per_day: float
    unit: float = 1.0


class BudgetBook:
    """``budgets`` by endpoint (or tenant) and name; those without a limit are missing. ``file`` in the agent's folder.
    ``lenient``: where the file is damaged they begin anew."""

    def __init__(
        self,
        limits: Mapping[str, Mapping[str, Limit]],
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        *,
        file: str = budget_file.NAME,
        lenient: bool = False,
    ) -> None:
        by_key = {(endpoint, name): limit for endpoint, named in limits.items() for name, limit in named.items()}
        self.budgets = {key: Budget(per_day=limit.per_day) for key, limit in by_key.items()}
        self._units = {key: limit.unit for key, limit in by_key.items()}
        self._clock = clock
        self._wall = wall
        self._file = file
        self._lenient = lenient
        self._path: Path | None = None
        self._boot_id = budget_file.this_boot()
        self._strangers: BudgetsByEndpoint = {}  # of endpoints and limits that aren't configured now: they may be again
        self._ahead = dict.fromkeys(self.budgets, 0.0)  # what the file counts as spent and isn't yet
        self._aside = dict(self._ahead)
        self._granted = dict(self._ahead)  # the same when it was written
        self._saving: asyncio.Task[None] | None = None
        self._told = False

    def open(self, state_dir: Path) -> None:
        """Go on with what was saved there. A damaged file counts as all spent, for a day: money isn't guessed. A tenant
        isn't shut out for it."""
        if not self.budgets:
            return
        self._path = state_dir / self._file
        now = self._clock()
        try:
            saved = budget_file.read(self._path)
        except (OSError, ValueError) as error:
            if self._lenient:
                log.error("%s can't be read (%s): every day's bytes begin anew", self._path, error)
                return
            log.error(
                "%s can't be read (%s): every budget counts as spent for a day; delete the file to begin anew",
                self._path,
                error,
            )
            for key, budget in self.budgets.items():
                self.budgets[key] = budget.spend(budget.per_day, now)
            return
        if saved is None:
            return
        known = budget_file.restore(saved, boot_id=self._boot_id, now=now, unix_s=self._wall())
        for key, budget in self.budgets.items():
            before = known.get(key[0], {}).pop(key[1], SavedBudget(spendings=()))
            self.budgets[key] = Budget(per_day=budget.per_day, spendings=before.spendings).spend(before.ahead, now)
        self._strangers = known

    def resize(self, endpoint: str, limits: Mapping[str, Limit]) -> None:
        """Give an endpoint's budgets another size. What was spent of them stays spent."""
        for name, limit in limits.items():
            key = (endpoint, name)
            self.budgets[key] = msgspec.structs.replace(self.budgets[key], per_day=limit.per_day)

    def affords(self, endpoint: str, amounts: Mapping[str, float]) -> bool:
        """Whether all of that may be spent now."""
        now = self._clock()
        return all(
            self.budgets[key].affords(amount + self._aside[key], now)
            for name, amount in amounts.items()
            if (key := (endpoint, name)) in self.budgets
        )

    def take(self, endpoint: str, amounts: Mapping[str, float]) -> bool:
        """Spend all of it, or nothing and return False. It is on disk when :meth:`written` returns, and soon anyhow."""
        if not self.affords(endpoint, amounts):
            return False
        now = self._clock()
        for name, amount in amounts.items():
            key = (endpoint, name)
            if key in self.budgets:
                self.budgets[key] = self.budgets[key].spend(amount, now)
                self._ahead[key] -= amount
        self._save_in_time()
        return True

    async def spend(self, endpoint: str, amounts: Mapping[str, float]) -> bool:
        """:meth:`take`, and wait until the file knows of it. It is spent before this first waits."""
        if not self.take(endpoint, amounts):
            return False
        await self.written()
        return True

    async def written(self) -> None:
        """Wait until the file counts no less than was spent."""
        while (saving := self._save_in_time()) is not None and any(ahead < 0 for ahead in self._ahead.values()):
            await asyncio.shield(saving)  # who goes away doesn't keep the others from their turn

    def _save_in_time(self) -> asyncio.Task[None] | None:
        """Write the file where half of what it is ahead is spent; None where that can wait."""
        if self._path is None or all(ahead >= self._granted[key] / 2 for key, ahead in self._ahead.items()):
            return None
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._save(self._path), name="budgets")
        return self._saving

    def give_back(self, endpoint: str, name: str, unused: float, spent_at: float) -> None:
        """So much of what was spent at that time was not used; less than 0 where it wasn't enough."""
        key = (endpoint, name)
        if unused and key in self.budgets:
            self.budgets[key] = self.budgets[key].give_back(unused, spent_at, self._clock())
            self._ahead[key] += unused

    def wait_s(self, endpoint: str, name: str, amount: float) -> float:
        """How long until that much may be spent; 0 when it may, or without a limit; infinite when it never will."""
        key = (endpoint, name)
        return self.budgets[key].wait_s(amount, self._clock()) if key in self.budgets else 0.0

    def left(self, endpoint: str, name: str) -> float | None:
        """What may be spent now, None without a limit."""
        key = (endpoint, name)
        return max(self.budgets[key].left(self._clock()) - self._aside[key], 0.0) if key in self.budgets else None

    def set_aside(self, endpoint: str, name: str, amount: float) -> None:
        """Keep that much, for something that is probably not spent; less than 0 to let go of it. It isn't written."""
        if (endpoint, name) in self._aside:
            self._aside[endpoint, name] += amount

    def status(self, endpoint: str) -> dict[str, BudgetFigures]:
        """An endpoint's budgets for ``/status``."""
        now = self._clock()
        return {
            name: BudgetFigures(per_day=budget.per_day, left=budget.left(now))
            for (owner, name), budget in self.budgets.items()
            if owner == endpoint
        }

    async def close(self) -> None:
        """Write down what was spent, to the token."""
        if self._saving is not None:
            await asyncio.wait((self._saving,))
        if self._path is not None:
            self._write(self._path, self._as_saved(dict.fromkeys(self.budgets, 0.0)))

    async def _save(self, path: Path) -> None:
        now = self._clock()
        ahead = {key: self._room_ahead(key, now) for key in self.budgets}
        before = dict(self._ahead)
        await asyncio.to_thread(self._write, path, self._as_saved(ahead))
        for key, amount in ahead.items():
            # Spent while it was written: beyond what the file knows.
            self._ahead[key] = amount + self._ahead[key] - before[key]
        self._granted = ahead

    def _room_ahead(self, key: tuple[str, str], now: float) -> float:
        """In whole units: less would help nobody, and a kill would cost one."""
        budget, unit = self.budgets[key], self._units[key]
        return math.floor(min(budget.per_day * AHEAD, budget.left(now)) / unit) * unit

    def _as_saved(self, ahead: Mapping[tuple[str, str], float]) -> SavedBudgets:
        now = self._clock()
        endpoints = {endpoint: dict(budgets) for endpoint, budgets in self._strangers.items()}
        for (endpoint, name), budget in self.budgets.items():
            saved = SavedBudget(spendings=budget.spendings, ahead=ahead[endpoint, name])
            endpoints.setdefault(endpoint, {})[name] = saved
        return SavedBudgets(boot_id=self._boot_id, saved_at=now, saved_unix_s=self._wall(), endpoints=endpoints)

    def _write(self, path: Path, saved: SavedBudgets) -> None:
        try:
            budget_file.write(path, saved)
        except OSError as error:  # the budgets hold all the same, until the next start
            if not self._told:
                log.error("%s can't be written (%s): a restart would forget what was spent", path, error.strerror)
            self._told = True
        else:
            self._told = False
