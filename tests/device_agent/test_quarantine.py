"""A model whose workers die again and again is left alone; one that serves in between, or was repaired, isn't."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import REPORT

from aios_edge.errors import RuntimeUnavailable, WorkerLost
from aios_edge.profile_files import load_profile
from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.model_instance import ModelInstance
from device_agent.policy_in_force import PolicyInForce
from device_agent.quarantine import Quarantine
from device_agent.router import Here, There, route
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import Cloud, Reason, Shed
from device_agent.worker_pool import WorkerSpec

POLICY = Policy(quarantine_crashes=3, quarantine_window_s=100.0, quarantine_pause_s=50.0)


class Step(msgspec.Struct, frozen=True):
    """What happens, so long after the step before."""

    after_s: float
    what: str


STEPS = st.lists(
    st.builds(Step, st.sampled_from((0.1, 1.0, 40.0, 101.0)), st.sampled_from(("crash", "crash", "serve"))), max_size=30
)


@given(STEPS)
def test_a_row_of_crashes_shuts_and_nothing_else_does(steps: list[Step]) -> None:
    now, state = 0.0, Quarantine()
    row: list[float] = []
    on_trial = False
    for step in steps:
        now += step.after_s
        if state.until is not None:  # nobody starts a worker before
            now = max(now, state.until)
            state, on_trial = state.tried(), True
        if step.what == "serve":
            state, row, on_trial = state.served(), [], False
        else:
            state = state.crashed(now, POLICY)
            row = [*(at for at in row if now - at < 100.0), now]
        assert (state.until is not None) == (step.what == "crash" and (on_trial or len(row) >= 3))
        assert state.until is None or state.until == now + 50.0
        on_trial = on_trial and state.until is None


def test_zero_crashes_is_never() -> None:
    state = Quarantine()
    for number in range(100):
        state = state.crashed(float(number), Policy(quarantine_crashes=0))
        assert state.until is None


def test_who_comes_goes_to_the_cloud_or_hears_when_to_come_back() -> None:
    here = Here(forecast=None, worker_ready=False, away=Reason.QUARANTINED, back_in_s=42.0)
    there = There(endpoint="c", expected_s=0.1, safe_s=0.2)
    for deadline_at in (None, 5.0):
        asked = {"now": 0.0, "deadline_at": deadline_at, "here": here}
        assert route(**asked, local_only=False, there=there) == Cloud(Reason.QUARANTINED, "c")  # type: ignore[arg-type]
        assert route(**asked, local_only=True, there=there) == Shed(Reason.QUARANTINED, 42.0)  # type: ignore[arg-type]


def test_what_the_machine_is_at_fault_for_quarantines_no_model(tiny_bundle: Any) -> None:
    async def main() -> None:
        policy = Policy(quarantine_crashes=2)
        around = Surroundings(
            rules=PolicyInForce(policy),
            cloud=CloudPool((), policy, lambda kind, **detail: None),
            emit=lambda kind, **detail: None,
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
        )
        spec = WorkerSpec(model="tiny", bundle_path=tiny_bundle.path, profile=load_profile("x86-gateway").name)
        instance = ModelInstance(spec, around, on_wake=lambda: None)
        instance.report = REPORT

        async def no_descriptors(check: str, **_: Any) -> Any:
            raise RuntimeUnavailable("can't be started (too many open files)")

        instance.worker.start = no_descriptors  # type: ignore[method-assign, assignment]
        for _ in range(3):
            instance.lead.plan = instance.plan.served()  # no pause: only the counting is asked for here
            assert await instance.restart() is not None
            assert instance.quarantine.until is None

        async def dies(check: str, **_: Any) -> Any:
            raise WorkerLost("was killed by SIGSEGV")

        instance.worker.start = dies  # type: ignore[method-assign, assignment]
        for _ in range(2):
            instance.lead.plan = instance.plan.served()
            assert await instance.restart() is not None
        assert instance.state == "quarantined" and "SIGSEGV" in str(instance.detail)

    asyncio.run(main())


def kill_idle(agent: Any, restarts: int) -> None:
    os.kill(agent.status()["models"]["tiny"]["worker_pid"], signal.SIGKILL)
    agent.until(
        lambda status: (
            status["models"]["tiny"]["restarts"] == restarts or status["models"]["tiny"]["state"] == "quarantined"
        )
    )


def test_a_real_model_is_quarantined_and_an_operator_brings_it_back(
    start_agent: Any, make_bundle: Any, tmp_path: Path
) -> None:
    other = make_bundle(tmp_path / "other", name="other").path
    more = f'[[bundle]]\npath = "{other}"\n[policy]\nquarantine_crashes = 3\nquarantine_pause_s = 600.0'
    agent = start_agent(more)
    for restarts in (1, 2, 3):
        kill_idle(agent, restarts)
    model = agent.status()["models"]["tiny"]
    assert model["state"] == "quarantined" and model["worker_pid"] is None
    assert "3 crashes" in model["detail"] and "SIGKILL" in model["detail"]
    (event,) = agent.events("quarantined")
    assert event["crashes"] == 3 and event["pause_s"] == 600.0
    code, document, headers = agent.infer()
    assert code == 503 and document["parameters"]["reason"] == "quarantined"
    assert 500 < int(headers["retry-after"]) <= 602
    assert agent.infer(model="other")[0] == 200, "the others serve"
    assert agent.status()["state"] == "degraded"
    agent.post("/v2/repository/models/tiny/load")
    assert agent.status()["models"]["tiny"]["state"] == "ready" and agent.infer()[0] == 200
    for restarts in (4, 5):  # it begins from nothing
        kill_idle(agent, restarts)
        assert agent.status()["models"]["tiny"]["state"] == "ready"
    assert agent.stop() == 0


def test_after_the_pause_there_is_one_try(start_agent: Any) -> None:
    agent = start_agent("[policy]\nquarantine_crashes = 2\nquarantine_pause_s = 0.3")
    for restarts in (1, 2):
        kill_idle(agent, restarts)
    agent.until(lambda status: status["models"]["tiny"]["state"] == "ready")
    assert len(agent.events("quarantined")) == 1
    kill_idle(agent, 3)  # the try failed
    agent.until(lambda status: len([event for event in status["events"] if event["kind"] == "quarantined"]) == 2)
    agent.until(lambda status: status["models"]["tiny"]["state"] == "ready")
    assert agent.infer()[0] == 200  # the try succeeded
    kill_idle(agent, 4)
    agent.until(lambda status: status["models"]["tiny"]["state"] == "ready")
    assert len(agent.events("quarantined")) == 2
    assert agent.stop() == 0


@pytest.mark.parametrize("kills", [4])
def test_a_model_that_serves_between_its_crashes_is_not_quarantined(start_agent: Any, kills: int) -> None:
    agent = start_agent("[policy]\nquarantine_crashes = 2")
    for restarts in range(1, kills + 1):
        assert agent.infer()[0] == 200
        kill_idle(agent, restarts)
    assert agent.infer()[0] == 200 and not agent.events("quarantined")
    assert agent.stop() == 0
