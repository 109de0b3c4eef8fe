"""Whether a bundle may take another's place, by how it answers part of that one's requests first: pure.

A trial has one or two phases, and the successor must hold out in each of them:

* ``shadow``: it answers copies of requests that were answered already. Its answers are compared and thrown away.
* ``canary``: it really answers a share of the requests.

A phase ends after so many answers of the successor, or after so long. Before and then it is held against the bundle
that serves, over the same time: errors and slowness as on probation (:mod:`device_agent.probation`), and of copies the
labels that both gave. One disagreement in twenty is allowed, or what quantization may have moved in both bundles where
their contracts allow more. Before the end of a phase only a disagreement that luck can't explain ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from device_agent.probation import Conduct, breach

Phase = Literal["shadow", "canary"]

MAX_DISAGREEMENT = 0.05  # of the rows, where nothing else is said
LEAST_DISAGREED = 5  # fewer are too few to judge by, unless none is allowed
LUCK = 0.001  # a result that is less likely than that isn't put down to luck


class TrialRules(msgspec.Struct, frozen=True, kw_only=True):
    """``shadow_share`` and ``canary_share`` of the requests; 0 leaves a phase out. ``requests``, ``lasts_s``: the end
    of each phase, whichever comes first. ``max_disagreement``: of the rows that were compared."""

    shadow_share: float = 0.0
    canary_share: float = 0.0
    requests: int = 200
    lasts_s: float = 60.0
    max_disagreement: float = MAX_DISAGREEMENT

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those that take place, in their order."""
        shares: tuple[tuple[Phase, float], ...] = (("shadow", self.shadow_share), ("canary", self.canary_share))
        return tuple(phase for phase, share in shares if share > 0)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a phase has shown so far. ``answers``: of the successor. ``compared`` and ``disagreed``: rows of copies.
    ``skipped``: copies that were due, and weren't made because somebody waited."""

    answers: int = 0
    compared: int = 0
    disagreed: int = 0
    skipped: int = 0

    def plus(self, *, answers: int = 0, compared: int = 0, disagreed: int = 0, skipped: int = 0) -> Seen:
        """With more of each."""
        return Seen(
            answers=self.answers + answers,
            compared=self.compared + compared,
            disagreed=self.disagreed + disagreed,
            skipped=self.skipped + skipped,
        )

    @property
    def disagreement(self) -> float | None:
        """Of the rows that were compared; None before there was one."""
        return self.disagreed / self.compared if self.compared else None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``over``: the phase has ended. ``reason``: why the successor must go, None while it may stay."""

    over: bool = False
    reason: str | None = None


def allowed_disagreement(asked: float | None, promised_agreements: Sequence[float]) -> float:
    """What the policy says; else what both contracts allow their own models to differ from those they were made of, and
    never less than :data:`MAX_DISAGREEMENT`."""
    if asked is not None:
        return asked
    return min(max(MAX_DISAGREEMENT, sum(1.0 - agreement for agreement in promised_agreements)), 1.0)


def judge(rules: TrialRules, seen: Seen, elapsed_s: float, now: Conduct, before: Conduct) -> Verdict:
    """How a phase stands. ``now``, ``before``: the successor's conduct and the other bundle's in this phase."""
    over = seen.answers >= rules.requests or elapsed_s >= rules.lasts_s
    reason = breach(now, before) or _disagrees(seen, rules.max_disagreement, over=over)
    return Verdict(over=over or reason is not None, reason=reason)


def compare(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> tuple[int, int]:
    """Rows that can be compared, and those of them whose labels differ; nothing where one of the two has no labels."""
    if not ours or not theirs or len(ours) != len(theirs):
        return 0, 0
    return len(ours), sum(one != other for one, other in zip(ours, theirs, strict=True))


def _disagrees(seen: Seen, limit: float, *, over: bool) -> str | None:
    share = seen.disagreement
    if share is None or share <= limit or (limit > 0 and seen.disagreed < LEAST_DISAGREED):
        return None
    if not over and chance_of(seen.disagreed, seen.compared, limit) >= LUCK:
        return None
    rows = f"{seen.disagreed} of {seen.compared} rows"
    return f"disagreement: {rows} got another label ({share:.1%}); allowed {limit:.1%}"


def chance_of(hits: int, tries: int, share: float) -> float:
    """How likely so many hits or more are, each with the probability ``share``: the binomial distribution's tail."""
    if hits <= 0:
        return 1.0
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    if hits > tries:
        return 0.0
    # From the likeliest count outwards, so that what vanishes is what doesn't matter.
    peak = min(max(hits, math.floor((tries + 1) * share)), tries)
    log_ways = math.lgamma(tries + 1) - math.lgamma(peak + 1) - math.lgamma(tries - peak + 1)
    at_peak = math.exp(log_ways + peak * math.log(share) + (tries - peak) * math.log1p(-share))
    total, odds = at_peak, share / (1.0 - share)
    term = at_peak
    for count in range(peak, tries):
        term *= (tries - count) / (count + 1) * odds
        total += term
        if term < total * 1e-12:
            break
    term = at_peak
    for count in range(peak, hits, -1):
        term *= count / (tries - count + 1) / odds
        total += term
        if term < total * 1e-12:
            break
    return min(total, 1.0)
