"""A chain of providers on every kind of machine: what each was asked for, what became of it, and why."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest
from scripted_onnxruntime import CPU, CUDA, TENSORRT, ScriptedOrt, shadow

from aios_edge.cli.agent import chain_lines
from aios_edge.errors import RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from aios_edge.profile import DeviceProfile, Provider
from device_agent import runtime as module
from device_agent.gpu import Gpu, NoGpu, find_gpu
from device_agent.runtime import Runtime

tells = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason=f"onnxruntime {onnxruntime.__version__} doesn't tell which node runs where",
)


def profile(*providers: str, strict: bool = False) -> DeviceProfile:
    return DeviceProfile(
        schema="1.0",
        name="here",
        title="",
        arch="any",
        providers=tuple(Provider(name=name, options={"device_id": 0} if name == CUDA else {}) for name in providers),
        precision_preference=("fp32",),
        quantization="none",
        strict_providers=strict,
    )


def gpu_build(monkeypatch: pytest.MonkeyPatch, **script: Any) -> ScriptedOrt:
    made = ScriptedOrt(onnxruntime, **script)
    monkeypatch.setattr(module, "_onnxruntime", lambda: made)
    return made


def opened(tiny_bundle: Any, *providers: str, strict: bool = False) -> Runtime:
    return Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), profile(*providers, strict=strict))


def test_every_node_is_told_with_the_provider_that_runs_it(tiny_bundle: Any) -> None:
    """On the installed onnxruntime."""
    (step,) = opened(tiny_bundle, CPU).steps
    assert (step.name, step.active, step.reason, step.options) == (CPU, True, None, {})
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        assert step.nodes is None and step.nodes_reason is not None and "doesn't tell" in step.nodes_reason
        return
    assert step.nodes == sum(step.operators.values()) > 4 and step.nodes_reason is None
    assert step.operators["ReduceSum"] == 2 and step.operators["Gather"] == 1


@tells
def test_nodes_that_an_accelerator_leaves_are_told_by_operator(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any
) -> None:
    gpu_build(monkeypatch, takes={TENSORRT: ["Gather", "Mul"], CUDA: ["ReduceSum"]})
    tensorrt, cuda, cpu = opened(tiny_bundle, TENSORRT, CUDA).steps
    assert (tensorrt.operators, cuda.operators) == ({"Gather": 1, "Mul": 1}, {"ReduceSum": 2})
    assert cpu.name == CPU and cpu.active and cpu.nodes == sum(cpu.operators.values()) > 0
    assert cuda.options == {"device_id": "0"}


def test_an_onnxruntime_that_cannot_tell_says_so(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any) -> None:
    gpu_build(monkeypatch, untold=True)
    got = opened(tiny_bundle, CUDA, CPU)
    assert [step.nodes for step in got.steps] == [None, None]
    assert got.steps[0].nodes_reason == "this onnxruntime doesn't tell which node runs where"


@pytest.mark.parametrize("dead", [TENSORRT, CUDA])
def test_of_a_session_that_fails_the_provider_is_named_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any, dead: str
) -> None:
    made = gpu_build(monkeypatch, raising=(dead,))
    got = opened(tiny_bundle, TENSORRT, CUDA, CPU)
    left = tuple(name for name in (TENSORRT, CUDA, CPU) if name != dead)
    assert made.asked == [(TENSORRT, CUDA, CPU), left] and got.providers_active == left
    (down,) = [step for step in got.steps if not step.active]
    assert down.name == dead and down.reason is not None and down.reason.startswith("doesn't start: ")
    assert down.nodes is None and down.nodes_reason == "it is not active"
    assert got.provider_reason == f"{dead} {down.reason}"


def test_a_model_that_a_provider_does_not_take_goes_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any
) -> None:
    made = gpu_build(monkeypatch, refusing=(TENSORRT,))
    got = opened(tiny_bundle, TENSORRT, CUDA, CPU)
    assert got.provider_reason == f"{TENSORRT} doesn't take this model (an operator it doesn't know)"
    assert got.providers_active == (CUDA, CPU) and made.asked[-1] == (CUDA, CPU)


def test_a_provider_that_silently_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any) -> None:
    gpu_build(monkeypatch, silent=(CUDA,))
    got = opened(tiny_bundle, CUDA, CPU)
    assert got.providers_active == (CPU,)
    assert got.provider_reason is not None and got.provider_reason.startswith(f"{CUDA} doesn't start: ")


@pytest.mark.parametrize("how", ["raising", "silent", "refusing"])
def test_a_strict_profile_refuses_instead_of_falling(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any, how: str
) -> None:
    script: dict[str, Any] = {how: (TENSORRT,)}
    gpu_build(monkeypatch, **script)
    says = "doesn't take" if how == "refusing" else "doesn't start"
    with pytest.raises(RuntimeUnavailable, match=f"'here' is strict and {TENSORRT} {says}"):
        opened(tiny_bundle, TENSORRT, CUDA, CPU, strict=True)


def test_a_strict_profiles_only_accelerator_is_named_when_it_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any
) -> None:
    gpu_build(monkeypatch, raising=(CUDA,))
    with pytest.raises(RuntimeUnavailable, match=f"is strict and {CUDA} doesn't start"):
        opened(tiny_bundle, CUDA, CPU, strict=True)
    gpu_build(monkeypatch, refusing=(CUDA,))
    with pytest.raises(RuntimeUnavailable, match=r"can't load the model \(an operator"):
        opened(tiny_bundle, CUDA, CPU, strict=True)


@tells
def test_a_strict_profile_is_not_satisfied_by_a_provider_without_work(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any
) -> None:
    gpu_build(monkeypatch, takes={TENSORRT: [], CUDA: ["*"]})
    with pytest.raises(RuntimeUnavailable, match=f"{TENSORRT} takes no node of this model"):
        opened(tiny_bundle, TENSORRT, CUDA, strict=True)
    assert opened(tiny_bundle, TENSORRT, CUDA).steps[0].nodes == 0


def test_a_strict_session_must_not_list_the_cpu(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any) -> None:
    made = gpu_build(monkeypatch)
    got = opened(tiny_bundle, CUDA, CPU, strict=True)
    assert made.asked == [(CUDA,)]
    assert got.provider_reason is None and got.providers_active == (CUDA, CPU)


def test_the_loaders_words_are_the_reason(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any, tmp_path: Path) -> None:
    made = gpu_build(monkeypatch, silent=(CUDA,))
    library = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    library.parent.mkdir()
    library.write_bytes(b"no library at all, but longer than the head of one " * 4)
    monkeypatch.setattr(made, "__file__", str(tmp_path / "__init__.py"), raising=False)
    reason = opened(tiny_bundle, CUDA, CPU).steps[0].reason
    assert reason is not None and str(library) in reason


class Driver:
    """libcuda.so.1 of a machine with one GPU. ``fails``: the call that doesn't work."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 100 if name == self._fails else self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> int:
        if name == "cuDeviceGet":
            arguments[0]._obj.value = 5
            return 0 if arguments[1] == 0 else 101
        if name == "cuDeviceGetName":
            arguments[0].value = b"Orin"
        if name == "cuDeviceGetAttribute":
            assert arguments[2].value == 5
            arguments[0]._obj.value = {75: 8, 76: 7}[arguments[1]]
        return 0


def test_the_driver_says_which_gpu_it_is() -> None:
    assert find_gpu(0, Driver()) == Gpu(name="Orin", compute_capability="8.7")
    assert find_gpu(1, Driver()) == NoGpu(reason="the NVIDIA driver has no GPU 1 for us: cuDeviceGet answers 101")
    assert "cuInit answers 100" in find_gpu(0, Driver("cuInit")).reason  # type: ignore[union-attr]


def test_without_a_driver_the_loader_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert find_gpu() == NoGpu(reason="no NVIDIA driver: libcuda.so.1: cannot open shared object file")


def test_doctor_tells_of_every_accelerator_of_the_build_whether_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aios_edge.cli.main", "doctor", "--json"]
    environment = os.environ | shadow(tmp_path, silent=[CUDA])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    told = {check["detail"]: check for check in json.loads(done.stdout)["checks"] if check["name"] == "onnxruntime"}
    assert told["its Tensorrt starts here"]["state"] == "ok"
    (cuda,) = [check for detail, check in told.items() if detail.startswith("its CUDA doesn't start: ")]
    assert cuda["state"] == "gap" and "nothing to do" in cuda["remedy"]


@tells
def test_a_person_is_told_of_the_chain_and_of_what_fell_down_it(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Any
) -> None:
    gpu_build(monkeypatch, raising=(TENSORRT,), takes={CUDA: ["Gather", "ReduceSum"]})
    lines = list(chain_lines(msgspec.to_builtins(opened(tiny_bundle, TENSORRT, CUDA, CPU).steps)))
    assert lines[0].startswith("provider Tensorrt: not active, it doesn't start: ")
    assert lines[1] == "provider CUDA: active, runs 3 nodes (2 ReduceSum, 1 Gather)"
    assert lines[2].startswith("provider CPU: active, runs ") and "1 Div" in lines[2]
    gpu_build(monkeypatch, untold=True)
    (line, _) = chain_lines(msgspec.to_builtins(opened(tiny_bundle, CUDA, CPU).steps))
    assert line == "provider CUDA: active; this onnxruntime doesn't tell which node runs where"


def test_a_scripted_module_is_what_the_agent_uses_of_the_real_one() -> None:
    """The scripted session answers what a real one does, so a test of it says something about a real one."""
    from device_agent.tiny_model import identity

    real = onnxruntime.InferenceSession(identity(), providers=[CPU])
    scripted = ScriptedOrt(onnxruntime).InferenceSession(
        identity(), onnxruntime.SessionOptions(), providers=[(CUDA, {}), (CPU, {})], enable_fallback=0
    )
    assert [node.name for node in scripted.get_inputs()] == [node.name for node in real.get_inputs()]
    assert scripted.get_providers() == [CUDA, CPU]
