"""Memory: how much a process held at most, and what it looks like when there is none left.

The kernel's ``ru_maxrss`` is no peak of ours: over ``exec`` it keeps what the process was before, so a child of a large
process starts with its parent's figure, and this process with that of the shell or test run that started it. ``VmHWM``
begins anew with every program.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aios_edge.errors import ResourceError

#: How numpy, torch, onnxruntime, the C++ library and the kernel say it; they share no type.
_SAID = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "unable to allocate",
    "can't start new thread",
    "memoryerror",
)
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate|buffer of size)\s+([\d.]+)\s*([KMGT]iB)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_LESS = {
    "finetune": "Lower batch_size or max_length in [finetune], or train less of the model (method last-n or head)",
    "distill": "Lower batch_size in [distill], or max_length in [finetune]",
    "search": "Lower batch_size in [distill], or max_length in [finetune], or set trials = 0 in [search]",
    "importance": "Lower max_length in [finetune], or take a source model whose layers are narrower",
    "evaluate": "Lower threads in [finetune]; each of them answers a row of its own",
}
_ELSE = "Close other programs, or export on a machine with more memory"
_AGAIN = "then run the same command again: finished stages are kept"


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The largest resident set of this process since it started, in bytes (``VmHWM``; without /proc ``ru_maxrss``)."""
    try:
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ran_out(error: BaseException) -> bool:
    """Whether ``error``, or one that it was made of, says that there was no memory left."""
    return any(
        isinstance(link, MemoryError)
        or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
        or says_ran_out(str(link))
        for link in _chain(error)
    )


def says_ran_out(text: str) -> bool:
    """The same of a message, such as the last line of another process."""
    return any(said in text.lower() for said in _SAID)


def out_of_memory(error: BaseException, stage: str | None = None) -> ResourceError:
    """The error to raise: the stage (None between stages), what was asked for on top of what was there, and what makes
    it need less."""
    asked = next(filter(None, (_asked_bytes(str(link)) for link in _chain(error))), None)
    wanted = f"it asked for {_mb(asked)} more, and" if asked else "it"
    what = f"out of memory; {wanted} had held {_mb(peak_rss_bytes())} at most"
    return ResourceError(what, where=f"stage {stage}" if stage else "export", remedy=remedy(stage))


def remedy(stage: str | None) -> str:
    """What makes a stage need less memory."""
    return f"{_LESS.get(stage or '', _ELSE)}, {_AGAIN}"


@contextmanager
def running_out_said() -> Iterator[None]:
    """Running out of memory between stages becomes :class:`ResourceError`; other errors go on as they are."""
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if not ran_out(error):
            raise
        raise out_of_memory(error) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _asked_bytes(text: str) -> int | None:
    found = _ASKED.search(text)
    return int(float(found[1].rstrip(".")) * _UNITS[(found[2] or "")[:1].upper()]) if found else None


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
