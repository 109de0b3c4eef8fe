"""An onnxruntime of a GPU build, on a machine that may have its hardware: the real one, whose CPU plays accelerators.

It keeps the interface of the module and of ``InferenceSession`` that the agent uses. :func:`shadow` makes a folder that
puts it in the place of ``onnxruntime`` in worker processes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ENGINE = "TensorrtExecutionProvider_TRTKernel_graph_scripted_0_sm87.engine"
_SCRIPT = "SCRIPTED_ONNXRUNTIME"


class ScriptedOrt:
    """The module. ``raising`` and ``silent`` don't start, with an exception or without a word; ``refusing`` start and
    take no real model; ``takes`` says which operators go to whom (default: all to the first); ``untold``: it can't
    tell. TensorRT "builds" where its cache has no engine: it waits for a line in the file ``gate``, fails where that
    says so, and writes the engine. ``skew``: what such an engine is wrong by."""

    def __init__(
        self,
        real: Any,
        *,
        raising: tuple[str, ...] = (),
        silent: tuple[str, ...] = (),
        refusing: tuple[str, ...] = (),
        takes: dict[str, list[str]] | None = None,
        untold: bool = False,
        gate: str | None = None,
        skew: float = 0.0,
    ) -> None:
        self._real, self._raising, self._silent, self._refusing = real, raising, silent, refusing
        self._takes, self._untold, self._gate, self._skew = takes, untold, gate, skew
        self.asked: list[tuple[str, ...]] = []
        self.options: list[dict[str, str]] = []
        self.__version__ = real.__version__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, CPU]

    def InferenceSession(self, model: Any, options: Any, *, providers: Any, **others: Any) -> Any:
        assert others["enable_fallback"] == 0
        names = [name for name, _ in providers]
        real_model = isinstance(model, str)
        if real_model:
            self.asked.append(tuple(names))
            self.options.append(dict(providers[0][1]))
        for name in names:
            if name in self._raising:
                raise RuntimeError(f"{name}\nhas no library")
            if real_model and name in self._refusing:
                raise RuntimeError("an operator it doesn't know")
        for name, handed in providers:
            if real_model and name == TENSORRT:
                self._build(handed)
        active = [name for name in names if name not in self._silent]
        active += [] if CPU in active else [CPU]
        if real_model and not Path(model).is_file():  # tests of the chain alone have none
            return SimpleNamespace(get_providers=lambda: active, get_inputs=list, get_outputs=list)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")  # the CPU plays them all
        session = self._real.InferenceSession(model, options, providers=[CPU], **others)
        return ScriptedSession(session, active, self._takes, self._untold, self._skew if active[0] == TENSORRT else 0.0)

    def _build(self, options: dict[str, str]) -> None:
        if options.get("trt_engine_cache_enable") != "1":
            return
        engine = Path(options["trt_engine_cache_path"]) / ENGINE
        if engine.exists():
            return
        if self._gate is not None:
            while not (gate := Path(self._gate)).exists() or not gate.read_text().endswith("\n"):
                time.sleep(0.01)  # as long as TensorRT would build
            if gate.read_text().startswith("fail"):
                raise RuntimeError("TensorRT EP failed to create engine from network")
        engine.write_bytes(b"engine")


class ScriptedSession:
    """A real CPU session that says it runs elsewhere. ``skew`` is added to every float output: a wrong engine."""

    def __init__(self, real: Any, active: list[str], takes: Any, untold: bool, skew: float) -> None:
        self._real, self._active, self._takes, self._skew = real, active, takes or {active[0]: ["*"]}, skew
        if not untold:
            self.get_provider_graph_assignment_info = self._assigned

    def __getattr__(self, name: str) -> Any:
        if name == "get_provider_graph_assignment_info":
            raise AttributeError(name)
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return self._active

    def run(self, *arguments: Any, **others: Any) -> Any:
        return [value + self._skew if self._skew else value for value in self._real.run(*arguments, **others)]

    def run_with_ort_values(self, *arguments: Any, **others: Any) -> Any:
        return self._real.run_with_ort_values(*arguments, **others)

    def _assigned(self) -> list[Any]:
        parts = []
        for part in self._real.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                kinds = ((name, ops) for name, ops in self._takes.items() if name in self._active)
                name = next((name for name, ops in kinds if node.op_type in ops or "*" in ops), CPU)
                parts.append(SimpleNamespace(ep_name=name, get_nodes=lambda node=node: [node]))
        return parts


def shadow(folder: Path, **script: Any) -> dict[str, str]:
    """Environment variables with which a process finds the scripted module instead of onnxruntime."""
    package = folder / "onnxruntime"
    package.mkdir(parents=True)
    here = Path(__file__).parent
    lines = ("import sys", f"sys.path.append({str(here)!r})", "from scripted_onnxruntime import stand_in")
    (package / "__init__.py").write_text("\n".join((*lines, "stand_in(__file__)")))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, _SCRIPT: json.dumps(script)}


def stand_in(shadowing: str) -> None:
    """Put the scripted module in the place of the real one, which is imported from where it is installed."""
    sys.path.remove(str(Path(shadowing).parents[1]))
    del sys.modules["onnxruntime"]
    real = importlib.import_module("onnxruntime")
    script = json.loads(os.environ[_SCRIPT])
    sys.modules["onnxruntime"] = ScriptedOrt(real, **script)  # type: ignore[assignment]
