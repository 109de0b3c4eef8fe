"""The budgets' file in ``state_dir``, so that a restart doesn't fill them.

The agent's clock begins anew with every boot of the machine. Within one boot, which the kernel names, times are
compared as they are; over a reboot by the wall clock, which never counts backwards here.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from device_agent.budget import Spending

NAME = "budgets.json"
SCHEMA = "1.0"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SavedBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent, and how much more may have been since, nobody knows when: until an agent that was killed starts
    again."""

    spendings: tuple[Spending, ...]
    ahead: float = 0.0


#: By endpoint and budget.
BudgetsByEndpoint = dict[str, dict[str, SavedBudget]]


class SavedBudgets(msgspec.Struct, frozen=True, kw_only=True):
    """``saved_at`` is the agent's clock, ``saved_unix_s`` the wall clock of the same moment."""

    schema: str = SCHEMA
    boot_id: str
    saved_at: float
    saved_unix_s: float
    endpoints: BudgetsByEndpoint


def restore(saved: SavedBudgets, *, boot_id: str, now: float, unix_s: float) -> BudgetsByEndpoint:
    """What is still gone, in times of this process' clock: pure."""
    if saved.boot_id and saved.boot_id == boot_id:
        later_s = 0.0
    else:
        later_s = now - saved.saved_at - max(unix_s - saved.saved_unix_s, 0.0)

    def moved(budget: SavedBudget) -> SavedBudget:
        spendings = (Spending(back_at=gone.back_at + later_s, amount=gone.amount) for gone in budget.spendings)
        return SavedBudget(spendings=tuple(gone for gone in spendings if gone.back_at > now), ahead=budget.ahead)

    return {
        endpoint: {name: moved(budget) for name, budget in budgets.items()}
        for endpoint, budgets in saved.endpoints.items()
    }


def read(path: Path) -> SavedBudgets | None:
    """The saved budgets, None where there are none. Raises :class:`OSError`, and :class:`ValueError` for nonsense."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(data, type=SavedBudgets)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def write(path: Path, saved: SavedBudgets) -> None:
    """Replace the file, whole or not at all; it is on the disk on return. Raises :class:`OSError`."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(msgspec.json.encode(saved))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def this_boot() -> str:
    """The kernel's name for this boot; empty where it gives none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
