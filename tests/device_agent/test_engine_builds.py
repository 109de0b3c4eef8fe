"""TensorRT's engines, built beside a real agent that serves real clients. Scripted is the hardware alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from scripted_gpu import ASKED, active, bundle, hardware, model, with_tensorrt
from scripted_onnxruntime import CPU, CUDA, ENGINE, TENSORRT
from scripted_worker import REPORT

from aios_edge.broker import start_broker
from aios_edge.mqtt import MqttListener
from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.engine_builds import EngineBuilds
from device_agent.model_instance import ModelInstance
from device_agent.policy_in_force import PolicyInForce
from device_agent.settings import Policy
from device_agent.surroundings import Surroundings
from device_agent.values import EngineReport
from device_agent.worker_pool import WorkerSpec

__all__ = ["bundle", "hardware", "with_tensorrt"]  # fixtures

CLIENTS = 4


@contextmanager
def traffic(agent: Any) -> Iterator[Counter[int]]:
    """Clients that ask without a pause; yields how many answers of each status there were so far."""
    seen: Counter[int] = Counter()
    enough, failures = threading.Event(), []

    def ask() -> None:
        try:
            while not enough.is_set():
                seen[agent.infer()[0]] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def more_answers(agent: Any, seen: Counter[int]) -> None:
    known = sum(seen.values())
    agent.until(lambda _: sum(seen.values()) >= known + 20)


def test_cuda_serves_while_the_engine_is_built_and_no_request_is_lost_when_tensorrt_takes_over(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    gate = hardware()
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    with traffic(agent) as seen:
        agent.until(lambda status: (status["models"]["tiny"]["engine_build"] or {}).get("stage") == "engine")
        assert active(agent) == [CUDA, CPU]
        first, *_ = model(agent)["activation"]["provider_steps"]
        assert first["name"] == TENSORRT and "no engine of its for this model" in first["reason"]
        before = model(agent)["worker_pid"]
        more_answers(agent, seen)
        gate.write_text("go\n")
        agent.until(lambda status: status["models"]["tiny"]["activation"]["providers_active"][0] == TENSORRT)
        more_answers(agent, seen)
        agent.until(lambda status: status["models"]["tiny"]["probation"])
    assert set(seen) == {200}
    assert model(agent)["worker_pid"] != before and model(agent)["engine_build"] is None
    engine = model(agent)["activation"]["engine"]
    assert engine["state"] == "cached" and (Path(engine["folder"]) / ENGINE).is_file()
    assert agent.events("engine_building")[0]["model"] == "tiny"
    assert [event["size_bytes"] for event in agent.events("engine_built")] == [6]
    (swapped,) = agent.events("swapped")
    assert swapped["from"] == swapped["to"] == model(agent)["bundle_id"]
    assert agent.stop() == 0

    gate.unlink()  # who built now would wait for ever
    again = start_agent(again=agent)
    assert active(again)[0] == TENSORRT and model(again)["activation"]["engine"]["state"] == "cached"
    assert not again.events("engine_building")


def test_every_birth_tells_the_chain_and_the_events_how_the_engine_came_about(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    gate = hardware()
    with start_broker() as broker:
        listener = MqttListener(broker.url, "aios/v1/default/dev/#")
        agent = start_agent(f'[mqtt]\nurl = "{broker.url}"', profile=with_tensorrt(), bundle=bundle().path)
        told: list[str] = []
        births: list[Any] = []
        for message in listener.messages(20.0):
            body = json.loads(message.payload)
            if message.topic.endswith("/event"):
                told.append(body["kind"])
                if body["kind"] == "engine_building":
                    gate.write_text("go\n")
            steps = [step for one in body.get("bundles") or () for step in one["provider_steps"]]
            if message.topic.endswith("/status") and steps:
                births.append(body)
            if "swapped" in told and births[-1]["bundles"][0]["provider_steps"][0]["active"]:
                break
        listener.close()
        assert agent.stop() == 0
    first, last = births[0], births[-1]
    down, cuda, cpu = first["bundles"][0]["provider_steps"]
    assert (down["name"], down["active"], cuda["active"], cpu["name"]) == (TENSORRT, False, True, CPU)
    assert down["reason"] in first["bundles"][0]["providers_reason"] and first["providers_active"] == [CUDA, CPU]
    assert last["providers_active"][0] == TENSORRT and last["bundles"][0]["providers_reason"] is None
    assert [kind for kind in told if "engine" in kind or kind == "swapped"] == [
        "engine_building",
        "engine_built",
        "swapped",
    ]


def test_an_engine_that_cannot_be_built_is_an_event_and_cuda_serves_on(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware().write_text("fail\n")
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda _: agent.events("engine_failed"))
    (failed,) = agent.events("engine_failed")
    assert "doesn't take this model (TensorRT EP failed to create engine" in failed["reason"]
    assert active(agent) == [CUDA, CPU] and agent.infer()[0] == 200


def test_an_engine_whose_answers_are_wrong_never_serves_and_is_not_tried_again(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware(skew=0.5).write_text("go\n")
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda _: agent.events("engine_failed"))
    assert agent.events("engine_failed")[0]["reason"].startswith("golden: ")
    assert active(agent) == [CUDA, CPU] and not agent.events("swapped") and agent.infer()[0] == 200
    agent.stop()
    again = start_agent(again=agent)
    first, *_ = model(again)["activation"]["provider_steps"]
    assert "may not serve: golden: " in first["reason"] and "agent prebuild" in first["reason"]
    assert model(again)["activation"]["engine"]["state"] == "unfit" and not again.events("engine_building")


def test_an_engine_that_fails_clients_gives_its_place_back_and_is_not_tried_again(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware(poison=1).write_text("go\n")  # the token of words that no golden sample has
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda status: status["models"]["tiny"]["probation"])
    assert active(agent)[0] == TENSORRT
    while not agent.events("rolled_back"):
        assert agent.infer("zzz")[0] in (200, 500)
    assert agent.infer("zzz")[0] == 200 and active(agent) == [CUDA, CPU]
    assert "error rate" in agent.events("engine_failed")[0]["reason"]
    agent.stop()
    again = start_agent(again=agent)
    assert active(again) == [CUDA, CPU] and model(again)["activation"]["engine"]["state"] == "unfit"


def test_an_engine_that_kills_its_worker_keeps_no_model_from_serving(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware(crashing=True).write_text("go\n")
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda _: agent.events("engine_failed"))  # as it was to change over
    assert "SIGSEGV" in agent.events("engine_failed")[0]["reason"] and active(agent) == [CUDA, CPU]
    agent.stop()
    again = start_agent(again=agent)
    assert "SIGSEGV" in again.events("engine_failed")[0]["reason"]
    assert active(again) == [CUDA, CPU] and again.infer()[0] == 200


def swap_on_tensorrt(agent: Any, bundle: Any, place: Path) -> None:
    """Swap the bundle for one that needs another engine, and wait until that was built."""
    agent.until(lambda _: agent.events("swapped"))
    shapes = {**ASKED[TENSORRT], "trt_profile_max_shapes": "input_ids:16x64,attention_mask:16x64"}
    shutil.rmtree(place)
    bundle(place, options={TENSORRT: shapes}, version="2.0.0")
    urllib.request.urlopen(f"{agent.url}/v2/repository/models/tiny/load", b"", timeout=30).close()
    agent.until(lambda _: len(agent.events("engine_built")) == 2)


def test_after_a_swap_the_change_waits_until_the_bundle_has_kept_its_contract(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any, tmp_path: Path
) -> None:
    hardware().write_text("go\n")
    place = bundle(tmp_path / "bundle").path
    agent = start_agent("[policy]\nprobation_s = 3.0", profile=with_tensorrt(), bundle=place)
    swap_on_tensorrt(agent, bundle, place)
    agent.until(lambda status: status["models"]["tiny"]["activation"]["providers_active"][0] == TENSORRT)
    swaps = [event for event in agent.status()["events"] if event["kind"] == "swapped"]
    changes = [(event["detail"]["from_version"], event["detail"]["to_version"]) for event in swaps]
    assert changes == [("1.0.0", "1.0.0"), ("1.0.0", "2.0.0"), ("2.0.0", "2.0.0")]
    _, swapped, changed = (datetime.fromisoformat(event["ts"].replace("Z", "+00:00")) for event in swaps)
    assert (changed - swapped).total_seconds() >= 3.0


def test_a_restart_takes_no_engine_that_was_built_and_never_checked(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any, tmp_path: Path
) -> None:
    hardware().write_text("go\n")
    place = bundle(tmp_path / "bundle").path
    agent = start_agent(profile=with_tensorrt(), bundle=place)  # a minute of probation
    swap_on_tensorrt(agent, bundle, place)
    os.kill(model(agent)["worker_pid"], signal.SIGKILL)
    agent.until(lambda _: agent.events("worker_recovered"))
    assert active(agent) == [CUDA, CPU]


def test_a_restart_keeps_to_what_serves_while_the_engine_is_built(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    gate = hardware()
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda status: (status["models"]["tiny"]["engine_build"] or {}).get("stage") == "engine")
    os.kill(model(agent)["worker_pid"], signal.SIGKILL)
    agent.until(lambda _: agent.events("worker_recovered"))
    assert active(agent) == [CUDA, CPU] and model(agent)["engine_build"] is not None
    gate.write_text("go\n")
    agent.until(lambda status: status["models"]["tiny"]["activation"]["providers_active"][0] == TENSORRT)


def test_an_unload_ends_the_build(start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any) -> None:
    hardware()
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda status: (status["models"]["tiny"]["engine_build"] or {}).get("stage") == "engine")
    urllib.request.urlopen(f"{agent.url}/v2/repository/models/tiny/unload", b"", timeout=30).close()
    pid = agent.process.pid
    agent.until(lambda _: not Path(f"/proc/{pid}/task/{pid}/children").read_text(), limit_s=5.0)
    assert agent.status()["models"] == {} and not agent.events("engine_built")


def test_a_worker_that_comes_back_without_its_engine_says_so(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware().write_text("go\n")
    agent = start_agent(profile=with_tensorrt(), bundle=bundle().path)
    agent.until(lambda _: agent.events("swapped"))
    Path(model(agent)["activation"]["engine"]["folder"], ENGINE).unlink()
    os.kill(model(agent)["worker_pid"], signal.SIGKILL)
    agent.until(lambda _: agent.events("worker_recovered"))
    assert active(agent) == [CUDA, CPU] and model(agent)["activation"]["engine"]["state"] == "missing"
    assert not model(agent)["activation"]["provider_steps"][0]["active"] and agent.infer()[0] == 200


def test_a_strict_profile_waits_for_its_engine(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    gate = hardware()
    agent = start_agent(profile=with_tensorrt("strict_providers = true"), bundle=bundle().path, wait=False)
    gate.write_text("go\n")
    agent.url = ready_url(agent)
    assert active(agent)[0] == TENSORRT and model(agent)["activation"]["engine"]["state"] == "built"


def ready_url(agent: Any) -> str:
    end = time.monotonic() + 40
    while "ready on " not in agent.log() and time.monotonic() < end:
        time.sleep(0.02)
    url: str = agent.log().split("ready on ")[1].split()[0]
    return url


def test_shapes_that_nothing_bounds_are_told_as_nothing_to_build(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any
) -> None:
    hardware()
    options = {TENSORRT: {"trt_engine_cache_enable": True}}
    agent = start_agent(profile=with_tensorrt(), bundle=bundle(options=options).path)
    engine = model(agent)["activation"]["engine"]
    assert engine["state"] == "nothing" and "each new size of input_ids, attention_mask" in engine["reason"]
    assert active(agent) == [CUDA, CPU] and model(agent)["engine_build"] is None
    first, *_ = model(agent)["activation"]["provider_steps"]
    assert "trt_profile_min_shapes" in first["reason"]


class Hosted(SimpleNamespace):
    """Stands for a model's host; builds hold no more than a weak reference to it."""

    __hash__ = object.__hash__


def test_a_bundle_that_comes_back_has_its_engine_built_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build was given up when another bundle took its place, and what its new worker says tells of no engine."""
    begun: list[str] = []

    async def build(spec: WorkerSpec, **_: Any) -> EngineReport:
        begun.append(str(spec.bundle_path))
        await asyncio.Event().wait()
        raise AssertionError

    async def change_over(*_: Any) -> None:
        raise AssertionError

    def host(name: str) -> Any:
        report = SimpleNamespace(engine=EngineReport(state="missing", folder=name))
        bundle = SimpleNamespace(bundle_id=name, manifest=SimpleNamespace(version="1"))
        spec = WorkerSpec(model="m", bundle_path=Path(name), profile="x")
        worker = SimpleNamespace(spec=spec)
        instance = SimpleNamespace(report=report, worker=worker, start_from=dict)
        return Hosted(name="m", bundle=bundle, instance=instance)

    async def main() -> None:
        monkeypatch.setattr("device_agent.engine_builds.build", build)
        around: Any = SimpleNamespace(emit=lambda kind, **detail: None, clock=time.monotonic)
        builds, good, bad = EngineBuilds(around, change_over), host("good"), host("bad")
        for each in (good, bad):
            builds.consider(each)
            await asyncio.sleep(0.01)
        good.instance.report = SimpleNamespace(engine=None)
        builds.consider(good)
        await asyncio.sleep(0.01)
        assert begun == ["good", "bad", "good"] and builds.get("m") is not None
        await builds.stop()

    asyncio.run(main())


def test_a_build_tells_how_far_it_is_again_and_again(
    hardware: Any, with_tensorrt: Any, bundle: Any, tmp_path: Path
) -> None:
    gate, made = hardware(), bundle()
    told: list[tuple[str, dict[str, Any]]] = []
    done = asyncio.Event()
    spec = WorkerSpec(model="tiny", bundle_path=made.path, profile=str(with_tensorrt()), state_dir=tmp_path / "state")

    def emit(kind: str, **detail: Any) -> None:
        told.append((kind, detail))
        if detail.get("stage") == "engine" and not gate.exists():
            gate.write_text("go\n")

    async def change_over(model: str, host: Any, engine: Any) -> None:
        assert (model, engine.state) == ("tiny", "built")
        done.set()

    async def build() -> None:
        report = SimpleNamespace(engine=EngineReport(state="missing", folder=str(tmp_path)))
        worker, changed = SimpleNamespace(spec=spec), {}
        instance = SimpleNamespace(report=report, worker=worker, start_from=changed.update)
        host: Any = Hosted(name="tiny", bundle=made, instance=instance)
        around: Any = SimpleNamespace(emit=emit, clock=time.monotonic)
        builds = EngineBuilds(around, change_over, told_every_s=0.01)
        builds.consider(host)
        await asyncio.wait_for(done.wait(), 60)
        assert changed == {"engines": "off"} and builds.get("tiny") is None
        await builds.stop()

    asyncio.run(build())
    stages = [detail["stage"] for kind, detail in told if kind == "engine_building"]
    assert stages[0] == "starts" and "engine" in stages and told[-1][0] == "engine_built"
    elapsed = [detail["elapsed_s"] for kind, detail in told if kind == "engine_building"]
    assert elapsed == sorted(elapsed)


def test_every_new_worker_says_on_which_providers_the_model_is_now() -> None:
    """Fresh ones between two batches and those that were loaded beside, as after a crash."""
    moved = msgspec.structs.replace(REPORT, providers_active=(CUDA, CPU), provider_reason="why")
    around = Surroundings(
        rules=PolicyInForce(Policy()),
        cloud=CloudPool((), Policy(), lambda kind, **detail: None),
        emit=lambda kind, **detail: None,
        energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
    )

    class Worker:
        spec = WorkerSpec(model="tiny", bundle_path=Path(), profile="x86-gateway")
        ready, report, tells_classes = True, moved, False

        async def stop(self) -> None:
            """As the real one."""

        async def start(self, check: str, *, timeout_s: float) -> Any:
            return moved

    async def change(beside: bool) -> Any:
        instance: Any = ModelInstance(Worker.spec, around, on_wake=lambda: None)
        instance.worker, instance.report, instance.state = Worker(), REPORT, "ready"
        if beside:
            assert instance.hand_over(instance.worker, Worker())
        else:
            assert await instance.start_fresh("waking", "is being loaded again")
        return instance.report

    for beside in (False, True):
        report = asyncio.run(change(beside))
        assert (report.providers_active, report.provider_reason) == ((CUDA, CPU), "why")
        assert report.latency_p95_s == REPORT.latency_p95_s


def raw_model(folder: Path, *, rows: int | str) -> None:
    import onnx
    from onnx import TensorProto, helper

    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 2])] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", *ends)
    folder.mkdir(parents=True)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(made, folder / "model.onnx")


def test_raw_models_change_over_too_where_their_shapes_are_fixed(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any, tmp_path: Path
) -> None:
    """In a thread of the agent: what builds is a process all the same."""
    gate = hardware()
    raw_model(tmp_path / "models/fixed/1", rows=1)
    raw_model(tmp_path / "models/free/1", rows="n")
    options = 'isolation = "thread"', {"trt_engine_cache_enable": "true"}
    agent = start_agent(
        f'[repository]\npath = "{tmp_path / "models"}"', profile=with_tensorrt(*options), bundle=bundle().path
    )
    agent.until(lambda _: len(agent.events("engine_building")) == 1)
    assert {name: one["engine_build"] is not None for name, one in agent.status()["models"].items()} == {
        "tiny": True,
        "fixed": True,  # waits for its turn
        "free": False,
    }
    gate.write_text("go\n")
    agent.until(lambda _: len(agent.events("swapped")) == 2)
    reports = {name: one["activation"] for name, one in agent.status()["models"].items()}
    assert {name: report["providers_active"][0] for name, report in reports.items()} == {
        "tiny": TENSORRT,
        "fixed": TENSORRT,
        "free": CUDA,
    }
    assert "each new size of x" in reports["free"]["provider_reason"]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, -2]}]}
    with urllib.request.urlopen(f"{agent.url}/v2/models/fixed/infer", json.dumps(body).encode(), timeout=30) as answer:
        assert json.loads(answer.read())["outputs"][0]["data"] == [-1.0, 2.0]
    assert agent.infer()[0] == 200
