"""What was measured on the target, as manifest and contract carry it: the session it was run with, and the figures.

Either this machine is of the profile's class, or a device's own measurement was brought; else both are empty.
"""

from __future__ import annotations

from aios_edge import contract as c
from aios_edge.contract import Conditions, Observed
from aios_edge.manifest import SessionSpec
from aios_edge.session import pinned
from exporters.contest import Contest
from exporters.trials import Tried, conditions_of

_HERE = "candidate and fp32 in turn, by the exporter"
_THERE = "aios-edge bench"


def session_of(tried: Tried, contest: Contest) -> SessionSpec:
    """The bundle's session options, with the threads it was measured with where it was measured on the target: those
    of the profile, for which alone a measurement counts. Pure."""
    spec = tried.made.built.session
    measured = contest.on_target or tried.made.name in contest.targets
    return pinned(spec, contest.profile.threads) if measured else spec


def observed_of(tried: Tried, contest: Contest) -> dict[str, Observed]:
    """Latency and memory as they were measured on the target, by the names of their promises. Pure."""
    if contest.on_target:
        return _here(tried, contest)
    target = contest.targets.get(tried.made.name)
    if target is None:
        return {}
    when = Conditions(
        batch=target.batch,
        length=target.length,
        threads=target.threads,
        provider=target.provider,
        method=_THERE,
        host=target.measured_on.host,
    )
    return _observed(target.p95, target.rss_bytes, when)


def _here(tried: Tried, contest: Contest) -> dict[str, Observed]:
    batch, length, threads = conditions_of(contest.profile, contest.longest)
    timing = tried.measured.timing(batch, length, threads)
    if timing is None:
        return {}
    when = Conditions(
        batch=batch,
        length=length,
        threads=threads,
        provider=contest.profile.providers[0].name,
        method=_HERE,
        host=contest.host.host,
        samples=timing.samples,
    )
    return _observed(timing.p95, tried.measured.rss_bytes, when)


def _observed(p95_s: float, rss_bytes: int | None, when: Conditions) -> dict[str, Observed]:
    found = {c.LATENCY_P95: Observed(value=p95_s, unit="s", conditions=when)}
    if rss_bytes is not None:
        found[c.MEMORY] = Observed(value=float(rss_bytes), unit="byte", conditions=when)
    return found
