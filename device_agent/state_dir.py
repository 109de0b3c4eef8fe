"""The agent's own folder: made where it is missing, and held by one agent at a time.

Two agents on one folder would share an outbox and, as one device, contradict each other in the retained status.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from aios_edge.errors import ResourceError

LOCK = "agent.lock"


def hold(path: Path) -> IO[bytes]:
    """Make the folder and lock it; the lock goes with the returned file, at the latest with this process.

    Raises :class:`ResourceError` when it can't be made or another agent has it. The kernel keeps the lock, so a
    killed agent leaves nothing to clean up, and workers don't inherit it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("ab")
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ResourceError(
            "is in use by another agent",
            where=_where(path),
            remedy="Stop that agent, or give this one a folder of its own",
        ) from error
    with contextlib.suppress(OSError):  # a full disk: then nobody finds this agent by its folder
        lock.truncate(0)
        lock.write(b"%d\n" % os.getpid())
        lock.flush()
    return lock


def holder(path: Path) -> int | None:
    """The process id of the agent that has the folder; None where none has. Raises :class:`ResourceError` where that
    can't be told: the lock mustn't be read, or who has it could write nothing into it."""
    try:
        with (path / LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read(20))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ResourceError(
            f"whether an agent runs here can't be told ({error.strerror})", where=str(path), remedy="Ask as its user"
        ) from error
    except ValueError:
        raise ResourceError(
            "an agent runs here that could not write its process id",
            where=str(path / LOCK),
            remedy="See whether its disk is full; a SIGHUP to it does the same",
        ) from None
    return None


def try_out(path: Path) -> None:
    """Whether :func:`hold` could make the folder and write in it; leaves everything as it was.

    Raises :class:`ResourceError` when not. An agent that has the folder is no reason, and isn't disturbed.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        path.mkdir(exist_ok=True)  # refuses what is there and no folder
        with tempfile.TemporaryFile(dir=path):  # has no name in the folder
            pass
        if (path / LOCK).exists():
            (path / LOCK).open("ab").close()
    except OSError as error:
        raise _unusable(path, error) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # an agent has begun to use it
                folder.rmdir()


def _unusable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"can't be made ({error.strerror})", where=_where(path), remedy="Choose a writable folder")


def _where(path: Path) -> str:
    return f"device.state_dir {path}"
