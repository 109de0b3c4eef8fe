"""SIGHUP: reads the configuration again and puts the policy in it in force, whole or not at all.

The file is read in a thread. What it says is compared with what is in force: a difference in anything that can't change
while the agent runs refuses all of it, by name, so that what runs is always what one file said. The change itself is
one step of the event loop, between two decisions. What became of it is an event, a line in the log, in ``/status``, and
in ``reload.json`` in the agent's folder, where ``aios-edge agent reload`` reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from aios_edge.errors import AiosEdgeError, SettingsError
from device_agent.cloud import CloudPool
from device_agent.policy_in_force import PolicyInForce
from device_agent.settings import Settings, load_settings
from device_agent.settings_change import Difference, differences
from device_agent.status import Reloaded

log = logging.getLogger("device_agent")

NAME = "reload.json"


class ReloadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``reload.json``: whose it is (``pid``, and the file ``config`` that it reads), how often it was asked to read it
    again, and what became of the last time."""

    pid: int
    config: str | None
    count: int = 0
    last: Reloaded | None = None


class Reload:
    """``settings`` are those in force; ``check`` raises :class:`SettingsError` for those that this device can't keep.
    ``on_changed`` hears of those that came into force. Belongs to the event loop's thread."""

    def __init__(
        self,
        config: Path | None,
        settings: Settings,
        rules: PolicyInForce,
        cloud: CloudPool,
        emit: Callable[..., None],
        check: Callable[[Settings], None],
        on_changed: Callable[[Settings], None] = lambda settings: None,
    ) -> None:
        self.settings = settings
        self.last: Reloaded | None = None
        self._config = None if config is None else config.absolute()
        self._rules = rules
        self._cloud = cloud
        self._emit = emit
        self._check = check
        self._on_changed = on_changed
        self._count = 0
        self._path = settings.device.state_dir / NAME
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._begun = False

    def begin(self) -> None:
        """From here on signals are heard, and whoever sends one may look for what became of it."""
        self._begun = True
        self._write()

    def ask(self) -> None:
        """Read the file again. Who asks while it is read is heard afterwards: the file may be another one by then."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="reload")

    async def stop(self) -> None:
        """No more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._begun:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    async def _run(self) -> None:
        while self._again:
            self._again = False
            self.last = await self._reload()
            self._count += 1
            self._write()

    async def _reload(self) -> Reloaded:
        try:
            if self._config is None:
                raise SettingsError("this agent wasn't started from a file", remedy="Use aios-edge agent run --config")
            settings = await asyncio.to_thread(load_settings, self._config)
            self._check(settings)
            found = differences(self.settings, settings)
            _refuse_fixed(found, str(self._config))
        except AiosEdgeError as error:
            return self._refused(str(error))
        except Exception as error:  # whatever a file brings about, the agent lives on by the old one
            log.exception("the configuration could not be read again")
            return self._refused(f"{type(error).__name__}: {error}")
        if not found:
            log.info("the configuration was read again: nothing changed")
            return self._reloaded("unchanged")
        before = self._rules.digest
        self.settings = settings
        self._cloud.follow(settings.policy, settings.cloud)
        self._rules.replace(settings.policy)
        self._on_changed(settings)
        changed = tuple(map(str, found))
        policy = before if before == self._rules.digest else f"{before} -> {self._rules.digest}"
        log.info("the configuration was read again: %s (policy %s)", "; ".join(changed), policy)
        self._emit("policy_changed", digest=self._rules.digest, before=before, changed="; ".join(changed))
        return self._reloaded("changed", changed=changed)

    def _refused(self, error: str) -> Reloaded:
        log.error("the configuration was not taken over, the one in force stays: %s", error)
        self._emit("policy_refused", digest=self._rules.digest, error=error)
        return self._reloaded("refused", error=error)

    def _reloaded(
        self,
        outcome: Literal["changed", "unchanged", "refused"],
        *,
        changed: tuple[str, ...] = (),
        error: str | None = None,
    ) -> Reloaded:
        return Reloaded(outcome=outcome, digest=self._rules.digest, changed=changed, error=error)

    def _write(self) -> None:
        config = None if self._config is None else str(self._config)
        record = ReloadRecord(pid=os.getpid(), config=config, count=self._count, last=self.last)
        part = self._path.with_suffix(".part")
        try:
            part.write_bytes(msgspec.json.encode(record))
            part.replace(self._path)
        except OSError as error:  # the reload holds all the same; who asked for it has to look at /status
            log.warning("%s can't be written (%s)", self._path, error.strerror or error)


def read_record(state_dir: Path) -> ReloadRecord | None:
    """What the agent of that folder wrote last; None where there is none."""
    try:
        return msgspec.json.decode((state_dir / NAME).read_bytes(), type=ReloadRecord)
    except (OSError, msgspec.DecodeError):
        return None


def _refuse_fixed(found: tuple[Difference, ...], where: str) -> None:
    fixed = [str(one) for one in found if not one.live]
    if fixed:
        raise SettingsError(
            f"can't change while the agent runs: {'; '.join(fixed)}",
            where=where,
            remedy="Restart the agent, or take that back; nothing of the file is in force",
        )
