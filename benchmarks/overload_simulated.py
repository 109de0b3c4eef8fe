"""The device's rows of overload.py under a virtual clock: what the rules make of a load, without a machine's noise.

    python benchmarks/overload_simulated.py [--seconds 60] [--factors 1,2,3,5,10] [--seeds 3] [--spread 0.04]

Beside each row stands what no queue can beat that doesn't look ahead: one that is preempted at will, pays nothing for
small batches, and takes exactly the capacity's share of time for each. Where that sheds more than the bound, nobody
keeps it.
"""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Sequence

import open_loop
from open_loop import Departure, Outcome
from overload_score import Capacity, Score, score
from simulated_device import Arrival, Device, Worker

DEADLINES = (2.0, 20.0)  # times the unloaded p95, as overload.py has them


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factors", default="1,2,3,5,10", help="offered, times the capacity")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, one behind the other")
    parser.add_argument("--spread", type=float, default=Worker().spread, help="of a batch's time, relative")
    options = parser.parse_args()
    worker = Worker(spread=options.spread)
    print(
        "| load | in time of admitted | given up / late | shed | more than the bound, worst window "
        "| unbeatable: more than the bound | than an ideal queue | goodput of capacity | unbeatable: goodput "
        "| rows of a batch |\n|---|" + "---:|" * 9
    )
    for bursts in (False, True):
        for factor in (float(each) for each in options.factors.split(",")):
            rows, best, sizes = [], [], []
            for seed in range(options.seeds):
                row, unbeatable, batches = run(worker, factor, options.seconds, bursts=bursts, seed=seed)
                rows, best, sizes = [*rows, row], [*best, unbeatable], [*sizes, *batches]
            print(_row(f"{'bursts' if bursts else 'Poisson'} {factor:g}x", rows, best, sizes), flush=True)


def run(
    worker: Worker, factor: float, seconds: float, *, bursts: bool = False, seed: int = 0
) -> tuple[Score, Score, list[int]]:
    """One row: the device's, that of an unbeatable queue, and the sizes of the batches."""
    capacity, p95_s = worker.capacity_per_s(), worker.unloaded_p95_s()
    deadlines_s = (DEADLINES[0] * p95_s, DEADLINES[1] * p95_s)
    plan = open_loop.schedule(factor * capacity, seconds, deadlines_s, bursts=bursts, seed=seed)
    device = Device(worker, seed)
    outcomes = device.run([Arrival(at_s=each.at_s, deadline_s=each.deadline_s) for each in plan])
    known = Capacity(before=capacity, after=capacity)
    best = score(unbeatable(plan, 1 / capacity), known, p95_s, seconds)
    return score(outcomes, known, p95_s, seconds), best, device.batches


def unbeatable(plan: Sequence[Departure], each_s: float) -> tuple[Outcome, ...]:
    """Earliest deadline first, preempted at will; whoever would be late, or make another late, is refused."""
    work: list[tuple[float, float]] = []  # deadline, and what is left to do
    now, found = 0.0, []
    for departure in plan:
        while work and work[0][1] <= departure.at_s - now:
            now += work.pop(0)[1]
        if work:
            work[0] = (work[0][0], work[0][1] - (departure.at_s - now))
        now = departure.at_s
        at = bisect.bisect(work, (now + departure.deadline_s, each_s))
        trial = [*work[:at], (now + departure.deadline_s, each_s), *work[at:]]
        end, kept = now, True
        for deadline_at, left_s in trial:
            end += left_s
            kept = kept and end <= deadline_at
        work = trial if kept else work
        found.append(Outcome(now, departure.deadline_s, now, now, 200 if kept else 503))
    return tuple(found)


def _row(name: str, rows: Sequence[Score], best: Sequence[Score], sizes: Sequence[int]) -> str:
    admitted, late = sum(row.admitted for row in rows), sum(row.late for row in rows)
    in_time, offered = sum(row.in_time for row in rows), sum(row.offered for row in rows)
    cells = [
        f"{in_time / admitted:.2%}",
        f"{admitted - in_time - late} / {late}",
        f"{sum(row.shed for row in rows) / offered:.1%}",
        f"{max(row.excess for row in rows):+.1%}",
        f"{max(row.excess for row in best):+.1%}",
        f"{max(row.excess_to_ideal for row in rows):+.1%}",
        f"{sum(row.capacity_share for row in rows) / len(rows):.1%}",
        f"{sum(row.capacity_share for row in best) / len(best):.1%}",
        f"{sum(sizes) / len(sizes):.2f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
