"""TensorRT's engines, built beside a real agent that serves real clients. Scripted is the hardware alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_onnxruntime import CPU, CUDA, ENGINE, TENSORRT, shadow

from aios_edge.broker import start_broker
from aios_edge.contract import GoldenSpec
from aios_edge.mqtt import MqttListener
from aios_edge.profile_files import _folder

SHAPES = {
    "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
    "trt_profile_opt_shapes": "input_ids:1x32,attention_mask:1x32",
    "trt_profile_max_shapes": "input_ids:32x64,attention_mask:32x64",
}
ASKED = {TENSORRT: {**SHAPES, "trt_engine_cache_enable": True, "trt_timing_cache_enable": True}}
CLIENTS = 4


@pytest.fixture(scope="module")
def with_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A profile of this machine that asks for TensorRT and CUDA first."""

    def make(more: str = "") -> Path:
        text = (_folder() / "x86-gateway.toml").read_text().replace('name = "x86-gateway"', 'name = "gpu"', 1)
        chain = "".join(f'[[providers]]\nname = "{name}"\n' for name in (TENSORRT, CUDA))
        path = tmp_path_factory.mktemp("profile") / "gpu.toml"
        path.write_text(text.replace("[[providers]]", f"{more}\n{chain}[[providers]]", 1), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="module")
def bundle(make_bundle: Any) -> Callable[..., Any]:
    def make(target: Path | None = None, *, options: Any = ASKED, **manifest: Any) -> Any:
        golden = GoldenSpec(count=72, min_agreement=0.98, tolerance=dict.fromkeys((CPU, CUDA, TENSORRT), 1e-3))
        return make_bundle(target, profile="gpu", provider_options=options, contract={"golden": golden}, **manifest)

    return make


@pytest.fixture
def hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Processes of this test find such a machine; the gate is where TensorRT waits for a line to be written."""

    def make(**script: Any) -> Path:
        gate = tmp_path / "gate"
        for name, value in shadow(tmp_path / "hardware", gate=str(gate), **script).items():
            monkeypatch.setenv(name, value)
        return gate

    return make


def model(agent: Any) -> Any:
    return agent.status()["models"]["tiny"]


def active(agent: Any) -> list[str]:
    names: list[str] = model(agent)["activation"]["providers_active"]
    return names


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
        assert first["name"] == TENSORRT and "until its engine for this model was built" in first["reason"]
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
    assert model_names(agent) == []
    assert agent.stop() == 0 and "its engine is built" not in agent.log()


def model_names(agent: Any) -> list[str]:
    return list(agent.status()["models"])


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


def prebuild(config: Path, *more: str) -> tuple[int, Any, str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "prebuild", "--config", str(config), "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def test_engines_are_built_ahead_and_then_taken_at_once(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any, agent_toml: Any, tmp_path: Path
) -> None:
    hardware().write_text("go\n")
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml(profile=with_tensorrt(), bundle=bundle().path))
    code, document, errors = prebuild(config)
    (made,) = document["models"]
    assert code == 0 and (made["model"], made["engine"]["state"]) == ("tiny", "built"), errors
    assert Path(made["engine"]["folder"], ENGINE).is_file()
    code, document, _ = prebuild(config, "--model", "tiny")
    assert code == 0 and document["models"][0]["engine"]["state"] == "cached"
    code, document, errors = prebuild(config, "--model", "tony")
    assert code == 2 and document is None and "no model 'tony'" in errors and "tiny" in errors

    (tmp_path / "gate").unlink()
    agent = start_agent(again=SimpleNamespace(config=config))
    assert active(agent)[0] == TENSORRT and not agent.events("engine_building")
    code, document, errors = prebuild(config)
    assert code == 1 and document is None and "in use by another agent" in errors


def test_what_cannot_be_built_ahead_is_said_plainly(
    hardware: Any, with_tensorrt: Any, bundle: Any, agent_toml: Any, tmp_path: Path
) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml())
    code, document, _ = prebuild(config)
    engine = document["models"][0]["engine"]
    assert code == 0 and engine["state"] == "nothing"
    assert engine["reason"] == f"profile 'x86-gateway' doesn't ask for {TENSORRT}"
    config.write_text(agent_toml(profile=with_tensorrt(), bundle=bundle().path))
    code, document, _ = prebuild(config)  # on the onnxruntime of this environment
    engine = document["models"][0]["engine"]
    assert code == 0 and engine["state"] == "nothing"
    assert engine["reason"].startswith(("is not in this onnxruntime", "doesn't start: "))
    hardware().write_text("fail\n")
    code, document, errors = prebuild(config)
    engine = document["models"][0]["engine"]
    assert code == 1 and engine["state"] == "failed" and "failed to create engine" in errors


def test_an_engine_built_ahead_whose_answers_are_wrong_does_not_keep_the_model_from_serving(
    start_agent: Any, hardware: Any, with_tensorrt: Any, bundle: Any, agent_toml: Any, tmp_path: Path
) -> None:
    hardware(skew=0.5).write_text("go\n")
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml(profile=with_tensorrt(), bundle=bundle().path))
    assert prebuild(config)[1]["models"][0]["engine"]["state"] == "built"
    agent = start_agent(again=SimpleNamespace(config=config))
    assert agent.events("engine_failed")[0]["reason"].startswith("golden: ")
    assert active(agent) == [CUDA, CPU] and agent.infer()[0] == 200
    agent.stop()
    assert prebuild(config)[1]["models"][0]["engine"]["state"] == "built"  # again: it was unfit
