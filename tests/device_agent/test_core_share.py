"""Cores are shared between workers as the weights say: what the kernel really gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.core_share import MOST, STEP, TRIES, _take_in_group, niceness

#: Both on one core, until the first has had half a second of it.
SPIN = """
import os, sys, time
from device_agent.core_share import take
os.sched_setaffinity(0, {int(sys.argv[2])})
take(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + 1.5
while time.monotonic() < end:
    pass
print(time.process_time(), flush=True)
"""


@given(st.floats(0.01, 100.0), st.floats(1.0, 100.0))
def test_weights_become_nicenesses(weight: float, factor: float) -> None:
    nice = niceness(weight, weight * factor)
    assert nice == MOST or STEP ** (nice - 0.51) <= factor <= STEP ** (nice + 0.51)
    assert niceness(weight, weight) == 0


@pytest.mark.parametrize(
    ("refusals", "tries", "says"),
    [
        ([], 1, ""),
        ([BlockingIOError()] * 3, 4, ""),
        ([BlockingIOError()] * TRIES, TRIES, "always busy"),
        ([FileNotFoundError()], 1, ""),
        ([PermissionError(13, "Permission denied")], 1, "Permission denied"),
    ],
)
def test_the_group_is_asked_again_while_it_is_busy_and_a_refusal_is_told(
    capsys: pytest.CaptureFixture[str], refusals: list[OSError], tries: int, says: str
) -> None:
    left, pauses, asked = iter(refusals), list[float](), 0

    def write() -> None:
        nonlocal asked
        asked += 1
        if (refusal := next(left, None)) is not None:
            raise refusal

    _take_in_group(write, pauses.append)
    told = capsys.readouterr().err
    assert asked == tries and (says in told if says else told == "")


def test_two_busy_workers_on_one_core_get_what_their_weights_say() -> None:
    core = min(os.sched_getaffinity(0))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SPIN, str(niceness(weight, 4.0)), str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for weight in (4.0, 1.0)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    heavy, light = (float(worker.communicate()[0]) for worker in workers)
    assert heavy / light == pytest.approx(4.0, rel=0.5), "1.0 where only the tasks' niceness is set"


def test_an_agents_workers_have_it(start_agent: object, make_bundle: object) -> None:
    other = make_bundle(name="other").path  # type: ignore[operator]
    agent = start_agent(f'weight = 4.0\n[[bundle]]\npath = "{other}"\n')  # type: ignore[operator]
    pids = {name: model["worker_pid"] for name, model in agent.status()["models"].items()}
    nices = {name: os.getpriority(os.PRIO_PROCESS, pid) for name, pid in pids.items()}
    assert nices["other"] - nices["tiny"] == niceness(1.0, 4.0)
