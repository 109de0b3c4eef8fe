"""The folder that bundles and report go to: one export at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aios_edge.errors import ResourceError, UsageError


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold ``out``, made where it isn't there (and removed again where nothing was put into it).

    Raises :class:`UsageError` where it is no directory, :class:`ResourceError` where another export holds it: there is
    one report, and that of the later one would deny the bundles of the earlier.
    """
    if out.exists() and not out.is_dir():
        raise UsageError("is not a directory", where=str(out), remedy="Choose another place with --out")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        remedy = "Choose another place with --out"
        raise ResourceError(f"can't be made or read ({error.strerror})", where=str(out), remedy=remedy) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when its holder dies
        except BlockingIOError as error:
            remedy = "Wait until it has ended, or choose another place with --out; --cache may be the same"
            raise ResourceError("another export writes there", where=str(out), remedy=remedy) from error
        except OSError:  # some network file systems have no locks for directories
            pass
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):
                out.rmdir()
