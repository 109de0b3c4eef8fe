"""``aios-edge agent reload``: asks the agent that runs from a file to read it again, and waits for what it says."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from aios_edge.errors import ResourceError, UsageError
from device_agent import state_dir
from device_agent.reload import NAME, ReloadRecord, read_record
from device_agent.settings import load_settings
from device_agent.status import Reloaded

_LOOK_S = 0.02


def ask_to_reload(config: Path, *, wait_s: float) -> Reloaded:
    """Raises :class:`SettingsError` for a file that is wrong by itself, which the agent isn't bothered with;
    :class:`UsageError` when the agent of its ``state_dir`` was started from another file, and :class:`ResourceError`
    when none runs or that can't be told, it mustn't be asked, doesn't listen, or says nothing for ``wait_s``."""
    folder = load_settings(config).device.state_dir
    before = _record(folder)
    if before.config != str(config.absolute()):
        raise UsageError(
            f"the agent of {folder} was started from {before.config or 'no file'}",
            where=str(config),
            remedy="Name the file that it runs from",
        )
    try:
        os.kill(before.pid, signal.SIGHUP)
    except OSError as error:
        raise ResourceError(
            f"the agent can't be asked ({error.strerror})", where=f"process {before.pid}", remedy="Ask as its user"
        ) from error
    ends_at = time.monotonic() + wait_s
    while time.monotonic() < ends_at:
        now = read_record(folder)
        if now is not None and now.pid == before.pid and now.count > before.count and now.last is not None:
            return now.last
        time.sleep(_LOOK_S)
    raise ResourceError(f"the agent said nothing within {wait_s:g} s", where=str(folder), remedy="Look at its log")


def _record(folder: Path) -> ReloadRecord:
    pid, record = state_dir.holder(folder), read_record(folder)
    if pid is None:
        raise ResourceError("no agent runs here", where=str(folder), remedy="Start it with aios-edge agent run")
    if record is None or record.pid != pid:  # a number that a killed agent left may be another process' by now
        raise ResourceError(
            f"the agent of process {pid} doesn't say that it listens to SIGHUP",
            where=str(folder / NAME),
            remedy="Ask again when it has started; see whether its disk is full. In another program it never does",
        )
    return record
