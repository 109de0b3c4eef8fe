"""An encoder's graph from outside: names, free axes and opset, from optimum where it knows the model type.

optimum-onnx carries a configuration for each architecture, kept up to date with transformers. Nothing else of it is
used: its export only warns where answers differ, and validates in a process whose death counts as a pass. The tracing
is torch's either way, and parity is checked here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.graph import MAX_OPSET

OPSET = 17
OUTPUT = "logits"
_TASK = "text-classification"
_BATCH, _LENGTH = "batch_size", "sequence_length"  # optimum's names


@dataclass(frozen=True)
class Signature:
    """``inputs`` and ``outputs``: name -> {axis: its name}, all others are fixed. ``origin``: who says so."""

    inputs: Mapping[str, Mapping[int, str]]
    outputs: Mapping[str, Mapping[int, str]]
    opset: int
    origin: str

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """All of them, as torch's exporter takes them."""
        return {name: dict(axes) for name, axes in (*self.inputs.items(), *self.outputs.items())}


def signature_of(config: Any, inputs: tuple[str, ...]) -> Signature:
    """The signature of a model with this transformers configuration for the inputs that a device feeds.

    optimum's where it has one for the model type that knows these inputs; else two free axes for each.
    """
    return _from_optimum(config, inputs) or Signature(
        inputs={name: {0: _BATCH, 1: _LENGTH} for name in inputs},
        outputs={OUTPUT: {0: _BATCH}},
        opset=OPSET,
        origin="torch",
    )


def versions() -> dict[str, str]:
    """Versions of what a signature may come from; none where it isn't installed."""
    installed = {}
    for name in ("optimum", "optimum-onnx"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _from_optimum(config: Any, inputs: tuple[str, ...]) -> Signature | None:
    try:
        importlib.import_module("optimum.exporters.onnx.model_configs")  # registers the configurations
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return None
    try:
        construct = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=config.model_type, task=_TASK, library_name="transformers"
        )
    except (KeyError, ValueError):  # an unknown type, or one that isn't known for this task
        return None
    found = construct(config)
    known, outputs = dict(found.inputs), dict(found.outputs)
    if not set(inputs) <= set(known) or list(outputs) != [OUTPUT]:
        return None
    return Signature(
        inputs={name: known[name] for name in inputs},
        outputs=outputs,
        opset=min(int(found.DEFAULT_ONNX_OPSET), MAX_OPSET),
        origin="optimum",
    )
