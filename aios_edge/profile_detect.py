"""Which device profile fits a host best. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aios_edge.host import Host, matches
from aios_edge.profile import DeviceProfile


@dataclass(frozen=True, kw_only=True)
class Other:
    """A profile that wasn't chosen; ``lacking`` says what the host lacks, or why another was preferred."""

    name: str
    lacking: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The best profile for a host, or None; ``why``: what made it so; ``others``: nearest first."""

    name: str | None
    why: tuple[str, ...]
    others: tuple[Other, ...]


def detect(host: Host, profiles: Iterable[DeviceProfile]) -> Detection:
    """The matching profile with the highest ``match.rank``; a negative rank is never proposed.

    Equal ranks are decided by the number of CPU flags asked for, then by name, so the answer doesn't depend on the
    order of the profiles.
    """
    ranked = sorted(profiles, key=lambda p: (-p.match.rank, -len(p.cpu_flags), p.name))
    judged = [(profile, matches(profile, host)) for profile in ranked]
    best = next((profile for profile, match in judged if match.ok and profile.match.rank >= 0), None)
    others = []
    for profile, match in sorted(judged, key=lambda pair: (not pair[1].ok, len(pair[1].reasons) * (not pair[1].ok))):
        if profile is best:
            continue
        if not match.ok:
            lacking = match.reasons
        elif profile.match.rank < 0:
            lacking = ("is never proposed by itself: name it",)
        else:
            lacking = (f"matches too, but is less specific than {best.name if best else ''}",)
        others.append(Other(name=profile.name, lacking=lacking))
    if best is None:
        why: tuple[str, ...] = ("no shipped profile matches; the nearest are listed with what this host lacks",)
    else:
        why = matches(best, host).reasons
    return Detection(name=best.name if best else None, why=why, others=tuple(others))
