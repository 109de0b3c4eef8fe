"""What each side loads, seen in a fresh interpreter: rules that import-linter can't see through lazy imports."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys

import pytest

WORKSHOP = ("torch", "transformers", "optimum", "neural_compressor", "exporters", "onnx")


def loaded_by(code: str) -> set[str]:
    """Top-level modules loaded after running the code in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["device_agent.worker", "device_agent.agent", "device_agent.activation"])
def test_the_agent_never_loads_the_workshop(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(WORKSHOP)


def test_the_supervisor_loads_neither_numpy_nor_onnxruntime() -> None:
    assert loaded_by("import device_agent.agent, device_agent.http, device_agent.reporter").isdisjoint(
        {"numpy", "onnxruntime", "tokenizers", "grpc", "google"}
    )


def test_the_core_loads_neither_side() -> None:
    names = "profile_files bundle.read oip.envelope oip.tensors tasks client telemetry mqtt cli.main"
    code = "\n".join(f"import aios_edge.{name}" for name in names.split())
    assert loaded_by(code).isdisjoint({*WORKSHOP, "device_agent", "onnxruntime"})


@pytest.mark.parametrize("package", ["aios_edge", "exporters", "device_agent"])
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
