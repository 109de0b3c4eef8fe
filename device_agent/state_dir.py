"""The agent's own folder: made where it is missing, and held by one agent at a time.

Two agents on one folder would share an outbox and, as one device, contradict each other in the retained status.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from aios_edge.errors import ResourceError

LOCK = "agent.lock"


def hold(path: Path) -> IO[bytes]:
    """Make the folder and lock it; the lock goes with the returned file, at the latest with this process.

    Raises :class:`ResourceError` when it can't be made or another agent has it. The kernel keeps the lock, so a
    killed agent leaves nothing to clean up, and workers don't inherit it.
    """
    where = f"device.state_dir {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("ab")
    except OSError as error:
        raise ResourceError(
            f"can't be made ({error.strerror})", where=where, remedy="Choose a writable folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ResourceError(
            "is in use by another agent", where=where, remedy="Stop that agent, or give this one a folder of its own"
        ) from error
    return lock
