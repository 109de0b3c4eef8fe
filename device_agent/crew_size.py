"""How many workers a model has, and which cores each of them has for itself: pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

#: Providers that compute on the cores; every other one has a device of its own, of which there is one.
ON_CORES = frozenset(("CPUExecutionProvider", "XnnpackExecutionProvider", "DnnlExecutionProvider"))

Workers = int | Literal["auto"]
MOST = 64  # a number above that is a slip of the pen


def crew_size(asked: Workers, *, threads: int, cores: int, providers: Sequence[str]) -> int:
    """``asked``, or as many as have ``threads`` cores each; one where the model may run on a GPU or its like, which is
    one."""
    if asked != "auto":
        return asked
    if not ON_CORES.issuperset(providers):
        return 1
    return max(cores // max(threads, 1), 1)


def own_cpus(cpus: Sequence[int], number: int, workers: int, threads: int) -> tuple[int, ...]:
    """Those of ``cpus``, one beside the other, that are for the worker of that number alone; all of them where there
    aren't ``threads`` for each."""
    if workers == 1 or len(cpus) // workers < threads:
        return tuple(cpus)
    return tuple(cpus[number * len(cpus) // workers : (number + 1) * len(cpus) // workers])
