"""The real onnxruntime-gpu on a machine without a GPU: everything falls to the CPU, with the reasons, and serves."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_onnxruntime import CPU, CUDA, TENSORRT

from aios_edge.errors import RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from aios_edge.profile_files import _folder, load_profile
from device_agent.gpu import Gpu, find_gpu


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(
        not installed("onnxruntime-gpu"),
        reason="onnxruntime-gpu lies where onnxruntime does: make test-long runs this in an environment of its own",
    ),
    pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU: nothing falls to the CPU here"),
]

ASKED = {
    TENSORRT: {
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_max_shapes": "input_ids:32x64,attention_mask:32x64",
        "trt_engine_cache_enable": True,
    }
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Jetson Orin Nano's chain with all its options, on a profile that this machine can keep."""
    x86 = (_folder() / "x86-gateway.toml").read_text()
    jetson = (_folder() / "jetson-orin-nano.toml").read_text()
    chain = jetson[jetson.index("[[providers]]") : jetson.index("[threads]")]
    own = x86[x86.index("[[providers]]") : x86.index("[", x86.index("[[providers]]") + 13)]
    path = tmp_path_factory.mktemp("profile") / "gpu.toml"
    path.write_text(x86.replace('name = "x86-gateway"', 'name = "gpu"', 1).replace(own, chain), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(make_bundle: Any) -> Path:
    path: Path = make_bundle(profile="gpu", provider_options=ASKED).path
    return path


def fell(steps: Any) -> None:
    """Both NVIDIA providers are there, don't start, and say what they miss; every node runs on the CPU."""
    assert [step["name"] for step in steps] == [TENSORRT, CUDA, CPU]
    for step, library in zip(steps, ("tensorrt", "cuda"), strict=False):
        assert step["active"] is False and step["nodes"] is None
        assert step["reason"].startswith("doesn't start: ") and "no NVIDIA driver" in step["reason"], library
        assert ".so" in step["reason"].partition(";")[0], "the loader's word for what is missing"
    assert steps[0]["options"]["trt_layer_norm_fp32_fallback"] == "1"
    assert steps[1]["options"]["cudnn_conv_algo_search"] == "HEURISTIC"
    cpu = steps[2]
    assert cpu["active"] is True and cpu["reason"] is None
    assert cpu["nodes"] == sum(cpu["operators"].values()) > 4 or cpu["nodes_reason"]


def test_the_build_has_the_providers_that_do_not_start() -> None:
    from device_agent.runtime import accelerators

    steps = accelerators()
    assert {step.name for step in steps} >= {TENSORRT, CUDA}
    assert all(not step.active and step.reason for step in steps)


def test_a_strict_profile_refuses_with_the_reason(tiny_bundle: Any, profile: Path) -> None:
    import msgspec

    from device_agent.runtime import Runtime

    strict = msgspec.structs.replace(load_profile(profile), strict_providers=True)
    with pytest.raises(RuntimeUnavailable, match=rf"'gpu' is strict and {TENSORRT} doesn't start: .*\.so"):
        Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), strict)


def test_an_agent_serves_on_the_cpu_and_says_why(start_agent: Any, profile: Path, bundle: Path) -> None:
    agent = start_agent(profile=profile, bundle=bundle)
    status, document, _ = agent.infer("a good film")
    assert status == 200 and document["outputs"][0]["data"] == ["positive"]
    model = agent.status()["models"]["tiny"]
    report = model["activation"]
    assert report["providers_active"] == [CPU] and model["engine_build"] is None
    fell(report["provider_steps"])
    assert report["engine"]["state"] == "nothing" and report["engine"]["reason"].startswith("doesn't start: ")
    assert TENSORRT in report["provider_reason"] and CUDA in report["provider_reason"]
    assert not agent.events("engine_building") and not agent.events("engine_failed")
    lines = command("agent", "status", "--url", agent.url).stdout
    assert "provider Tensorrt: not active, it doesn't start: " in lines and "provider CPU: active" in lines


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_there_is_nothing_to_build_ahead_here(profile: Path, bundle: Path, agent_toml: Any, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml(profile=profile, bundle=bundle))
    done = command("agent", "prebuild", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny 1.0.0: nothing to build here: doesn't start: ")
    checked = command("agent", "check", "--config", str(config), "--json")
    assert checked.returncode == 0, checked.stderr
    fell(json.loads(checked.stdout)["activations"][0]["provider_steps"])


def test_doctor_names_what_is_missing() -> None:
    told = json.loads(command("doctor", "--json").stdout)["checks"]
    gaps = [check["detail"] for check in told if check["name"] == "onnxruntime" and check["state"] == "gap"]
    assert [gap.split()[1] for gap in gaps] == ["Tensorrt", "CUDA"]
    assert all("doesn't start: " in gap and ".so" in gap for gap in gaps)
