"""``aios-edge agent prebuild``: engines built ahead of the agent. Scripted is the hardware alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripted_gpu import active, bundle, hardware, with_tensorrt
from scripted_onnxruntime import CPU, CUDA, ENGINE, TENSORRT

__all__ = ["bundle", "hardware", "with_tensorrt"]  # fixtures


def checked(config: Path) -> Any:
    """What ``agent check`` finds of the one bundle."""
    command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "check", "--config", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)["activations"][0]


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
    assert checked(config)["providers_active"] == [CUDA, CPU] and not (tmp_path / "state").exists()
    code, document, errors = prebuild(config)
    (made,) = document["models"]
    assert code == 0 and (made["model"], made["engine"]["state"]) == ("tiny", "built"), errors
    assert Path(made["engine"]["folder"], ENGINE).is_file()
    assert checked(config)["providers_active"][0] == TENSORRT
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
