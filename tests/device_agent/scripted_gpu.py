"""A machine with TensorRT for tests: the profile that asks for it, a bundle for it, and scripted hardware.

The fixtures are imported by the files that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scripted_onnxruntime import CPU, CUDA, TENSORRT, shadow

from aios_edge.contract import GoldenSpec
from aios_edge.profile_files import _folder

SHAPES = {
    "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
    "trt_profile_opt_shapes": "input_ids:1x32,attention_mask:1x32",
    "trt_profile_max_shapes": "input_ids:32x64,attention_mask:32x64",
}
ASKED = {TENSORRT: {**SHAPES, "trt_engine_cache_enable": True, "trt_timing_cache_enable": True}}


@pytest.fixture(scope="module")
def with_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A profile of this machine that asks for TensorRT and CUDA first."""

    def make(more: str = "", options: Mapping[str, str] | None = None) -> Path:
        text = (_folder() / "x86-gateway.toml").read_text().replace('name = "x86-gateway"', 'name = "gpu"', 1)
        asked = "".join(f"{name} = {value}\n" for name, value in (options or {}).items())
        chain = f'[[providers]]\nname = "{TENSORRT}"\n[providers.options]\n{asked}[[providers]]\nname = "{CUDA}"\n'
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
