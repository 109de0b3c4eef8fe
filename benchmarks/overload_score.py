"""What an overloaded run is worth: pure, from the outcomes of ``open_loop.py``.

Admitted is who was answered, and who was refused only after half of what an unloaded request takes: that one waited and
was given up. Shed is who was not answered with 200.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from open_loop import Outcome

from device_agent.trace import Line, Traced

WINDOW_S = 10.0
STEP_S = 0.5
PROMISED = 0.95  # of the capacity: what must be served before anything may be shed
GRACE_S = 0.05  # no answer may be later than its deadline by more
AT_ONCE = 0.5  # of the unloaded p95: a refusal that takes longer is of a request that waited


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Requests a second of a closed loop right before the row, by which its load was made, and right after it."""

    before: float
    after: float

    @property
    def mean(self) -> float:
        """What the row is judged by."""
        return (self.before + self.after) / 2


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Shares and counts of one row; see the module's docstring. ``excess`` is how much more was shed than the bound
    allows in the worst window, as a share of what was offered in it, and ``excess_to_ideal`` the same beside
    :func:`ideal_sheds`; none where these are 0 or less."""

    offered: int
    admitted: int
    in_time: int
    late: int  # answered after their deadline; the rest of the admitted was given up
    shed: int
    failed: int
    promised: int  # answered as predicted to be in time, margin included
    promised_late: int  # of these, after their deadline
    capacity_share: float  # answered in time, of what the capacity would have been in that time
    ideal_share: float  # answered in time, of what an ideal queue of all the capacity answers
    excess: float
    excess_to_ideal: float
    overdue: int  # answered or refused later than GRACE_S after the deadline
    worst_overdue_s: float
    p99_overdue_s: float  # of answers, 0 where they are in time

    @property
    def kept(self) -> float:
        """Answered in time of the admitted."""
        return self.in_time / self.admitted if self.admitted else 1.0


def score(outcomes: Sequence[Outcome], capacity: Capacity, unloaded_p95_s: float, seconds: float) -> Score:
    """Judge one row."""
    in_time = sum(outcome.in_time for outcome in outcomes)
    shed = [outcome.status != 200 for outcome in outcomes]
    overdue = [outcome.overdue_s for outcome in outcomes]
    sure = [outcome for outcome in outcomes if outcome.reason in ("idle", "in_time") and outcome.status == 200]
    answered = sorted(max(outcome.overdue_s, 0.0) for outcome in outcomes if outcome.status == 200)
    promised = ideal_sheds(outcomes, PROMISED * capacity.mean)
    windows = list(_windows(outcomes, seconds))
    length_s = min(WINDOW_S, seconds)
    return Score(
        offered=len(outcomes),
        admitted=sum(admitted(outcome, unloaded_p95_s) for outcome in outcomes),
        in_time=in_time,
        late=sum(outcome.status == 200 and not outcome.in_time for outcome in outcomes),
        shed=sum(shed),
        failed=sum(outcome.status not in (200, 503, 504) or not outcome.sound for outcome in outcomes),
        promised=len(sure),
        promised_late=sum(not outcome.in_time for outcome in sure),
        capacity_share=in_time / (capacity.mean * seconds),
        ideal_share=in_time / max(len(outcomes) - sum(ideal_sheds(outcomes, capacity.mean)), 1),
        excess=max(
            (sum(shed[a:b]) - max(0.0, b - a - PROMISED * capacity.mean * length_s)) / (b - a) for a, b in windows
        ),
        excess_to_ideal=max((sum(shed[a:b]) - sum(promised[a:b])) / (b - a) for a, b in windows),
        overdue=sum(each > GRACE_S for each in overdue),
        worst_overdue_s=max(overdue),
        p99_overdue_s=answered[len(answered) * 99 // 100] if answered else 0.0,
    )


def admitted(outcome: Outcome, unloaded_p95_s: float) -> bool:
    """Whether it was let in, whatever became of it then."""
    return outcome.status in (200, 504) or outcome.done_s - outcome.sent_s > AT_ONCE * unloaded_p95_s


def ideal_sheds(outcomes: Sequence[Outcome], rate_per_s: float) -> list[bool]:
    """Whom a single server would refuse that takes one after the other, exactly ``1 / rate_per_s`` each, and knows at
    arrival whether it will be in time. Bursts and tight deadlines cost it something as well."""
    found, free_s = [], 0.0
    for outcome in outcomes:
        end_s = max(free_s, outcome.at_s) + 1 / rate_per_s
        refused = end_s > outcome.at_s + outcome.deadline_s
        if not refused:
            free_s = end_s
        found.append(refused)
    return found


def cloud_misses(lines: Iterable[Line], lost_at: float, back_at: float) -> int:
    """Requests that were under way or arrived while the cloud failed, and missed because of it: by the agent's trace,
    those that it sent there and that had no answer by their deadline, from wherever. From outside they look like those
    that the device itself gave up."""
    return sum(
        line.decided.route == "cloud"
        and line.outcome.reason != "cloud_unavailable"  # found in doubt before it was sent
        and line.at < back_at
        and line.at + line.latency_s >= lost_at
        and line.deadline_at is not None
        and (line.status != 200 or line.at + line.latency_s > line.deadline_at)
        for line in lines
        if isinstance(line, Traced)
    )


def _windows(outcomes: Sequence[Outcome], seconds: float) -> Sequence[tuple[int, int]]:
    """From and to which outcome each window reaches; empty ones are left out."""
    at = [outcome.at_s for outcome in outcomes]
    found, begin_s, length_s = [], 0.0, min(WINDOW_S, seconds)
    a = b = 0
    while begin_s + length_s <= seconds + 1e-9:
        while a < len(at) and at[a] < begin_s:
            a += 1
        while b < len(at) and at[b] < begin_s + length_s:
            b += 1
        if b > a:
            found.append((a, b))
        begin_s += STEP_S
    return found
