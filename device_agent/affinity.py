"""Which CPUs a worker runs on: those of the profile's ``threads.cpu_affinity``, of several workers each its own part of
them; else whatever it was started on."""

from __future__ import annotations

import os
from collections.abc import Collection

from aios_edge.errors import ProfileError
from aios_edge.profile import DeviceProfile


def pin(profile: DeviceProfile, own: Collection[int] = ()) -> None:
    """Keep the calling thread, and all that it starts from now on, to the profile's CPUs, or to those of them that are
    its ``own`` (sched_setaffinity(2)).

    Called before the model is loaded, so that onnxruntime's threads inherit it; where the worker is a thread of the
    agent, the rest of the agent stays where it is. Raises :class:`ProfileError` for a CPU that isn't there, or that
    this process was denied (cpuset, taskset): the kernel would leave it out without a word.
    """
    wanted = set(profile.threads.cpu_affinity)
    if not wanted:
        return
    allowed = os.sched_getaffinity(0)
    if missing := wanted - allowed:
        raise ProfileError(
            f"pins workers to CPU {_listed(missing)}, and the agent may use {_listed(allowed)}",
            where=f"profile '{profile.name}': threads.cpu_affinity",
            remedy="Name CPUs that are there (lscpu --extended) and that the service's cpuset grants",
        )
    os.sched_setaffinity(0, wanted.intersection(own) or wanted)


def cpus() -> tuple[int, ...]:
    """The CPUs that the calling thread may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
