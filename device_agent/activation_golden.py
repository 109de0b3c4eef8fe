"""The checks of an activation that compare with what was recorded: tensors, golden outputs, golden raw inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.golden import Golden
from aios_edge.manifest import Manifest, TensorSpec
from aios_edge.tasks import Task
from device_agent.runtime import Runtime
from device_agent.values import ActivationCheck

#: Sample index -> the device's outputs for it.
Outputs = Mapping[int, Mapping[str, NDArray[np.generic]]]


def check_tensors(manifest: Manifest, runtime: Runtime) -> ActivationCheck:
    """``load``: the session's inputs and outputs are those of the manifest."""
    for kind, declared, found in (
        ("inputs", manifest.inputs, runtime.inputs),
        ("outputs", manifest.outputs, runtime.outputs),
    ):
        if not _same(declared, found):
            detail = f"the model's {kind} are {_shown(found)}, the manifest says {_shown(declared)}"
            return ActivationCheck(name="load", passed=False, detail=detail)
    active = ", ".join(runtime.providers_active)
    return ActivationCheck(name="load", passed=True, detail=f"loaded on {active}; tensors as in the manifest")


def run_samples(runtime: Runtime, golden: Golden, indices: Iterable[int]) -> Outputs:
    """Each sample by itself, trimmed to its length: the way the outputs were recorded."""
    return {index: runtime.run(golden.sample(index)) for index in indices}


def check_outputs(bundle: Bundle, golden: Golden, outputs: Outputs, providers: Sequence[str]) -> ActivationCheck:
    """``golden``: finite, shaped as declared, within tolerance of the shipped model's outputs, same argmax."""
    spec = bundle.contract.golden
    provider = providers[0] if providers else "CPUExecutionProvider"
    # Nothing was recorded for a provider that the exporter didn't foresee: the tightest promise holds then.
    tolerance = spec.tolerance.get(provider, min(spec.tolerance.values()))
    declared = {tensor.name: tensor.shape for tensor in bundle.manifest.outputs}
    worst = 0.0
    same = 0
    for index, answer in outputs.items():
        for name, recorded in golden.shipped.items():
            expected = recorded[index : index + 1]
            found = answer.get(name)
            if found is None or found.shape != expected.shape or not _fits(found.shape, declared.get(name)):
                shape = None if found is None else found.shape
                return _golden(False, f"sample {index}: {name} has shape {shape}, recorded {expected.shape}")
            if not np.isfinite(found).all():
                return _golden(False, f"sample {index}: {name} is not finite")
            worst = max(worst, float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)))
        scores = bundle.manifest.postprocess.output
        same += int(np.argmax(answer[scores]) == np.argmax(golden.shipped[scores][index]))
    agreement = same / len(outputs)
    seen = f"{len(outputs)} samples on {provider}: largest difference {worst:.3g}, argmax agreement {agreement:.3f}"
    if worst > tolerance:
        return _golden(False, f"{seen}; the tolerance is {tolerance:g}", worst, tolerance)
    if agreement < spec.min_agreement:
        return _golden(False, f"{seen}; promised at least {spec.min_agreement:g}", agreement, spec.min_agreement)
    if fault := _fault_in_record(golden, max(spec.tolerance.values())):
        return _golden(False, fault)
    return _golden(True, seen, worst, tolerance)


def _fault_in_record(golden: Golden, tolerance: float) -> str | None:
    """What is wrong with the recorded outputs themselves. No tolerance is smaller than what quantization moved, so
    the fp32 model's outputs lie within the largest one of the shipped model's."""
    for name, shipped in golden.shipped.items():
        fp32 = golden.fp32.get(name)
        if fp32 is None or fp32.shape != shipped.shape:
            return f"the recorded {name} of the fp32 and the shipped model have different shapes"
        if not (np.isfinite(shipped).all() and np.isfinite(fp32).all()):
            return f"the recorded {name} is not finite"
        apart = float(np.abs(shipped.astype(np.float64) - fp32.astype(np.float64)).max(initial=0.0))
        if apart > tolerance * (1 + 1e-6):
            return f"the recorded {name} of the fp32 and the shipped model are {apart:.3g} apart, {tolerance:g} at most"
    return None


def check_raw(bundle: Bundle, golden: Golden, outputs: Outputs, task: Task) -> ActivationCheck:
    """``golden_raw``: the tokenizer gives the recorded ids, and the labels are those of the recorded outputs."""
    scores = bundle.manifest.postprocess.output
    same = 0
    for index, answer in outputs.items():
        encoded = task.encode([golden.raw[index]])
        for name, expected in golden.sample(index).items():
            found = encoded.get(name)
            if found is None or not np.array_equal(found, expected):
                return _raw(False, f"sample {index}: pre-processing gives another {name} than was recorded")
        label = task.decode({name: np.asarray(array) for name, array in answer.items()})[0].label
        same += int(label == bundle.manifest.labels[int(np.argmax(golden.shipped[scores][index]))])
    agreement = same / len(outputs)
    promised = bundle.contract.golden.min_agreement
    detail = f"{len(outputs)} samples: tensors as recorded, label agreement {agreement:.3f}"
    if agreement < promised:
        return _raw(False, f"{detail}; promised at least {promised:g}", agreement, promised)
    return _raw(True, detail, agreement, promised)


def _golden(passed: bool, detail: str, measured: float | None = None, promised: float | None = None) -> ActivationCheck:
    return ActivationCheck(name="golden", passed=passed, detail=detail, measured=measured, promised=promised)


def _raw(passed: bool, detail: str, measured: float | None = None, promised: float | None = None) -> ActivationCheck:
    return ActivationCheck(name="golden_raw", passed=passed, detail=detail, measured=measured, promised=promised)


def _fits(shape: tuple[int, ...], declared: tuple[int, ...] | None) -> bool:
    """Whether a shape is one that the manifest allows; -1 is free."""
    if declared is None or len(shape) != len(declared):
        return False
    return all(wanted in (-1, found) for found, wanted in zip(shape, declared, strict=True))


def _same(declared: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> bool:
    """Equal names, datatypes and shapes; a dimension that onnxruntime can't tell is whatever the manifest says."""
    actual = {spec.name: spec for spec in found}
    return set(actual) == {spec.name for spec in declared} and all(
        spec.datatype == actual[spec.name].datatype
        and len(spec.shape) == len(actual[spec.name].shape)
        and all(dim in (-1, said) for said, dim in zip(spec.shape, actual[spec.name].shape, strict=True))
        for spec in declared
    )


def _shown(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in specs)
