"""More models than fit: the least recently used is unloaded, its memory returns, and a request brings it back."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.model_instance import ModelInstance
from device_agent.policy_in_force import PolicyInForce
from device_agent.residency import Resident, to_unload
from device_agent.router import Here, There, route
from device_agent.scheduler import Forecast
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import Cloud, Local, Reason, Shed
from device_agent.worker_memory import proportional_bytes
from device_agent.worker_pool import WorkerSpec

MB = 1_000_000
NAMES = ("a", "b", "c", "d", "e")

RESIDENTS = st.lists(
    st.builds(
        Resident,
        model=st.sampled_from(NAMES),
        held_bytes=st.integers(0, 100),
        used_at=st.floats(0, 100) | st.just(float("inf")),
        stays=st.booleans(),
    ),
    unique_by=lambda each: each.model,
)


@given(residents=RESIDENTS, budget=st.integers(1, 300), asking=st.none() | st.sampled_from(NAMES))
def test_who_was_used_least_recently_goes_until_the_rest_fits(
    residents: list[Resident], budget: int, asking: str | None
) -> None:
    leaving = to_unload(residents, budget, asking=asking)
    of = {each.model: each for each in residents}
    kept = [each for each in residents if each.model not in leaving]
    movable = [each for each in kept if not each.stays and each.model != asking]
    assert not any(of[model].stays or model == asking for model in leaving)
    assert all(of[model].used_at <= each.used_at for model in leaving for each in movable), "in the order of their use"
    held = sum(each.held_bytes for each in kept)
    if asking is None:
        assert held <= budget or len(movable) <= 1
    else:
        assert held <= budget or not movable
    if leaving:  # and no more than needed
        assert held + of[leaving[-1]].held_bytes > budget


def test_who_can_wait_for_the_load_waits_and_the_others_go_to_the_cloud_or_hear_when() -> None:
    here = Here(forecast=Forecast(expected_at=1.0, safe_at=1.5, idle=False), worker_ready=False, away=Reason.LOADING)
    there = There(endpoint="c", expected_s=0.1, safe_s=0.2)

    def decide(deadline_at: float | None, cloud: There | None) -> Any:
        return route(now=0.0, deadline_at=deadline_at, local_only=False, here=here, there=cloud)

    assert decide(None, there) == decide(2.0, there) == decide(None, None) == Local(Reason.LOADING)
    assert decide(0.5, there) == Cloud(Reason.LOADING, "c")
    assert decide(0.5, None) == Shed(Reason.LOADING, 1.0)


def test_what_a_process_holds_alone_is_less_than_all_it_shows() -> None:
    held = proportional_bytes(os.getpid())
    assert held is not None and held > 0
    assert proportional_bytes(2**22 + 1) is None


@pytest.fixture(scope="module")
def three(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("three")
    return [make_bundle(root / name, name=name).path for name in ("tiny", "second", "third")]


def tree_bytes(agent: Any) -> int:
    """What the agent and its workers hold together."""
    pids = [agent.process.pid, *(model["worker_pid"] for model in agent.status()["models"].values())]
    return sum(proportional_bytes(pid) or 0 for pid in pids if pid is not None)


def states(agent: Any) -> dict[str, str]:
    return {name: model["state"] for name, model in agent.status()["models"].items()}


def budget_for(agent: Any, models: float) -> int:
    """Bytes that so many of its workers take."""
    held = [proportional_bytes(model["worker_pid"]) or 0 for model in agent.status()["models"].values()]
    return int(models * sum(held) / len(held))


@pytest.fixture(scope="module")
def one_worker_bytes(start_agent: Any, three: list[Path]) -> int:
    """What each of three workers takes on this machine."""
    more = "\n".join(f'[[bundle]]\npath = "{path}"' for path in three[1:])
    agent = start_agent(more, bundle=three[0])
    held = budget_for(agent, 1)
    assert agent.stop() == 0
    return held


def start_three(start_agent: Any, three: list[Path], budget: int, *, pinned: str = "") -> Any:
    more = f"pinned = {str(pinned == 'tiny').lower()}\n"
    for path in three[1:]:
        more += f'[[bundle]]\npath = "{path}"\npinned = {str(pinned == path.name).lower()}\n'
    return start_agent(f"{more}[policy]\nmemory_budget_bytes = {budget}", bundle=three[0])


def test_the_least_recently_used_model_goes_and_a_request_brings_it_back(
    start_agent: Any, three: list[Path], one_worker_bytes: int
) -> None:
    agent = start_three(start_agent, three, int(2.6 * one_worker_bytes))
    assert states(agent) == {"tiny": "resting", "second": "ready", "third": "ready"}
    assert agent.status()["state"] == "ready"
    assert agent.status()["models"]["tiny"]["worker_pid"] is None
    before = tree_bytes(agent)
    code, document, _ = agent.infer()
    assert code == 200 and document["parameters"]["reason"] == "loading"
    assert states(agent) == {"tiny": "ready", "second": "resting", "third": "ready"}
    assert agent.infer(model="third")[0] == 200
    assert agent.infer(model="second")[0] == 200
    assert states(agent) == {"tiny": "resting", "second": "ready", "third": "ready"}
    assert tree_bytes(agent) < before + 0.5 * one_worker_bytes, "as many as before are in memory"
    assert [event["model"] for event in agent.events("unloaded")] == ["tiny", "second", "tiny"]
    assert [event["model"] for event in agent.events("loaded")] == ["tiny", "second"]
    assert all(event["freed_bytes"] > 0 for event in agent.events("unloaded"))
    agent.post("/v2/repository/models/tiny/load")
    assert states(agent)["tiny"] == "ready"
    assert agent.stop() == 0


def test_a_pinned_model_stays(start_agent: Any, three: list[Path], one_worker_bytes: int) -> None:
    agent = start_three(start_agent, three, int(2.6 * one_worker_bytes), pinned="tiny")
    pid = agent.status()["models"]["tiny"]["worker_pid"]
    for _ in range(2):
        for model in ("second", "third"):
            assert agent.infer(model=model)[0] == 200
    assert agent.status()["models"]["tiny"]["worker_pid"] == pid
    assert "tiny" not in {event["model"] for event in agent.events("unloaded")}
    assert agent.stop() == 0


def test_a_request_that_can_not_wait_for_the_load_is_told_when_to_come_back(
    start_agent: Any, three: list[Path], one_worker_bytes: int
) -> None:
    agent = start_three(start_agent, three, int(2.6 * one_worker_bytes))
    code, document, headers = agent.infer(timeout=20_000)
    assert code == 503 and document["parameters"]["reason"] == "loading" and int(headers["retry-after"]) >= 1
    agent.until(lambda _: states(agent)["tiny"] == "ready")
    assert agent.infer(timeout=5_000_000)[0] == 200, "it was loaded for those that come back"
    assert agent.stop() == 0


def test_models_that_do_not_fit_together_take_turns_and_nobody_is_lost(
    start_agent: Any, three: list[Path], one_worker_bytes: int
) -> None:
    agent = start_three(start_agent, three, int(1.6 * one_worker_bytes))
    codes: list[int] = []
    enough = threading.Event()

    def ask(model: str) -> None:
        while not enough.is_set():
            codes.append(agent.infer(model=model)[0])

    with ThreadPoolExecutor(3) as pool:
        for model in ("tiny", "second", "third"):
            pool.submit(ask, model)
        agent.until(lambda _: {event["model"] for event in agent.events("loaded")} >= {"tiny", "second", "third"}, 60)
        enough.set()
    assert set(codes) == {200}
    assert sum(state == "ready" for state in states(agent).values()) <= 2
    assert agent.stop() == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a raw model whose weights take 40 MB."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("repository") / "large" / "1"
    folder.mkdir(parents=True)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 1000), ("y", 10_000))
    ]
    weights = numpy_helper.from_array(np.ones((1000, 10_000), dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights])
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    return folder.parents[1]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_an_unload_returns_the_memory(start_agent: Any, large: Path, tmp_path: Path, isolation: str) -> None:
    profile = tmp_path / "profile.toml"
    text = (Path(__file__).parents[2] / "profiles" / "x86-gateway.toml").read_text()
    profile.write_text(text.replace("\nname", f'\nisolation = "{isolation}"\nname', 1))
    agent = start_agent(f'[repository]\npath = "{large}"', profile=profile)
    assert agent.infer()[0] == 200
    loaded = tree_bytes(agent)
    agent.post("/v2/repository/models/large/unload")
    assert loaded - tree_bytes(agent) > 36 * MB
    agent.post("/v2/repository/models/large/load")
    assert tree_bytes(agent) > loaded - 20 * MB
    assert agent.stop() == 0


def test_a_model_that_dies_instead_of_making_room_is_no_model_that_rests(tiny_bundle: Any) -> None:
    async def main() -> None:
        rules = Policy(quarantine_crashes=1)
        around = Surroundings(
            rules=PolicyInForce(rules),
            cloud=CloudPool((), rules, lambda kind, **detail: None),
            emit=lambda kind, **detail: None,
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
        )
        spec = WorkerSpec(model="tiny", bundle_path=tiny_bundle.path, profile="x86-gateway")
        instance = ModelInstance(spec, around, on_wake=lambda: None)
        instance.open()
        leaving = asyncio.ensure_future(instance.resting.leave())
        await asyncio.sleep(0)
        assert instance.chore(1) is None and instance.chore(0) is not None
        instance.lost(instance.lead, "was killed by SIGKILL", in_flight=0, queued=0)
        assert instance.state == "quarantined" and instance.chore(0) is None
        await asyncio.wait_for(leaving, 1.0)

    asyncio.run(main())
