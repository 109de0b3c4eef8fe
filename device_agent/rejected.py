"""Bundles that gave their place back, or never got it: kept out of the next start, ``<state_dir>/rejected.json``.

What lies at an entry's path is activated at the start. After a way back, or a trial that failed or wasn't over, that is
the very bundle which had to go. So as long as it lies there the copy of the one that served is started instead; until
somebody loads it by hand, or puts something else there.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from aios_edge.bundle.read import Bundle
from device_agent.kept_bundles import open_kept

log = logging.getLogger("device_agent")

NAME = "rejected.json"


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """``bundle_id`` isn't started by itself, ``kept_id`` is in its stead; ``ts`` says since when."""

    bundle_id: str
    version: str
    kept_id: str
    reason: str
    ts: str


class RejectedBundles:
    """``by_model``: those of now. Methods that change it write the file: not for the event loop."""

    def __init__(self, state_dir: Path) -> None:
        self.by_model: dict[str, Rejected] = {}
        self._state_dir = state_dir

    def open(self) -> None:
        """Go on with what was written before."""
        path = self._state_dir / NAME
        try:
            self.by_model = msgspec.json.decode(path.read_bytes(), type=dict[str, Rejected])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.error("%s can't be read (%s): every bundle starts from its path", path, error)

    def remember(self, model: str, rejected: Rejected) -> None:
        """From now on."""
        self.by_model[model] = rejected
        self._write()

    def forget(self, model: str) -> None:
        """Whatever lies at its path may start."""
        if self.by_model.pop(model, None) is not None:
            self._write()

    def instead_of(self, bundle: Bundle) -> Bundle:
        """What starts for a bundle that lies at its entry's path: mostly itself."""
        name = bundle.manifest.name
        rejected = self.by_model.get(name)
        if rejected is None:
            return bundle
        if rejected.bundle_id != bundle.bundle_id:
            self.forget(name)
            return bundle
        kept = open_kept(self._state_dir, rejected.kept_id)
        if kept is None:
            log.error("%s: there is no copy of what served before %s, which is started", name, rejected.version)
            self.forget(name)
            return bundle
        return kept

    def _write(self) -> None:
        path = self._state_dir / NAME
        fresh = path.with_suffix(".new")
        try:
            with fresh.open("wb") as file:
                file.write(msgspec.json.encode(self.by_model))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            log.error("%s can't be written (%s): the next start forgets which bundle had to go", path, error.strerror)
