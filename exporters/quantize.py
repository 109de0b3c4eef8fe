"""The candidates: which ones a profile asks for, and how each is made. One entry in ``BUILDERS`` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import ProfileError
from aios_edge.manifest import VARIANTS, Precision, SessionSpec
from aios_edge.profile import DeviceProfile
from exporters import convert, equalize, graph, ort, steps, tables
from exporters.encode import Sample

CALIBRATION_SAMPLES = 128
_DYNAMIC_OPERATORS = ("MatMul", "Attention")
_LEVELS = {True: 64, False: 127}  # of an s8 weight, with and without reduce_range, as onnxruntime has them
_OFFLINE = SessionSpec(graph_optimization_level="basic")
_AT_LOAD = SessionSpec(graph_optimization_level="all", disabled_optimizers=(ort.SKIP_FUSION,))


@dataclass(frozen=True)
class Plan:
    """A candidate to build. ``name`` tells variants of one precision apart: ``dynamic-s8-r7`` has 7-bit weights
    (``reduce_range``), ``dynamic-s8-e4`` 4 bits for the embeddings of words that training didn't see
    (``rare_rows_in_4_bits``)."""

    name: str
    precision: Precision
    reduce_range: bool = False
    rare_rows_in_4_bits: bool = False


@dataclass(frozen=True)
class Shown:
    """What the training rows show: samples to calibrate with, and how often each value of an input occurs in all of
    them (counts by value)."""

    calibration: Sequence[Sample]
    counts: Mapping[str, NDArray[np.intp]]


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """``candidate.json`` beside ``model.onnx``: the session options it must be run with, the operators it has."""

    session: SessionSpec
    operators: dict[str, int]


def plans_for(profile: DeviceProfile) -> tuple[Plan, ...]:
    """The candidates of a profile in its order of preference; raises :class:`ProfileError` for an unknown one."""
    plans = []
    for wanted in profile.precision_preference:
        precision = VARIANTS.get(wanted, cast(Precision, wanted))
        if precision not in BUILDERS:
            remedy = f"Known are: {', '.join((*get_args(Precision), *VARIANTS))}"
            raise ProfileError(f"unknown precision '{wanted}'", where=f"profile {profile.name}", remedy=remedy)
        narrow = precision == "dynamic-s8" and profile.reduce_range
        name, rare = f"{wanted}-r7" if narrow else wanted, wanted == "dynamic-s8-e4"
        plans.append(Plan(name=name, precision=precision, reduce_range=narrow, rare_rows_in_4_bits=rare))
    return tuple(plans)


def build(plan: Plan, converted: Path, shown: Shown, work: Path) -> Built:
    """Make one candidate in ``work`` from the folder of the conversion.

    Raises :class:`PromiseBroken` (``fusion``, ``symmetric`` or ``opset``).
    """
    session = BUILDERS[plan.precision](plan, converted, shown, work)
    for leftover in (work / "quantized.onnx", work / "optimized.onnx"):
        steps.remove(leftover)
    built = Built(session=session, operators=dict(graph.operator_counts(work / graph.MODEL)))
    (work / "candidate.json").write_bytes(msgspec.json.encode(built))
    return built


def load_built(folder: Path) -> Built:
    """Read ``candidate.json``."""
    return msgspec.json.decode((folder / "candidate.json").read_bytes(), type=Built)


def _fp32(plan: Plan, converted: Path, shown: Shown, work: Path) -> SessionSpec:
    return _offline(converted, _best_graph(converted), work)


def _dynamic_s8(plan: Plan, converted: Path, shown: Shown, work: Path) -> SessionSpec:
    model = graph.load(_best_graph(converted))
    equalize.equalize(model, observe(model, shown.calibration), weight_levels=_LEVELS[plan.reduce_range])
    equalized, quantized = work / "equalized.onnx", work / "quantized.onnx"
    steps.save(model, equalized)
    ort.quantize_dynamic_s8(equalized, quantized, operators=_DYNAMIC_OPERATORS, reduce_range=plan.reduce_range)
    steps.remove(equalized)
    model = graph.load(quantized)
    tables.quantize_tables(model, shown.counts if plan.rare_rows_in_4_bits else {})
    steps.save(model, quantized)
    return _offline(converted, quantized, work)


def observe(model: Any, calibration: Sequence[Sample]) -> dict[str, equalize.Seen]:
    """What calibration shows of each activation that is multiplied with a constant matrix."""
    names = list(equalize.products(model))
    if not names:  # convolutions only, say; a runtime that is asked for nothing gives everything
        return {}
    parts: dict[str, list[equalize.Seen]] = {name: [] for name in names}
    for arrays in ort.activations(model, names, calibration):
        for name, array in zip(names, arrays, strict=True):
            parts[name].append(equalize.Seen.of(array))
    return {name: equalize.Seen.joined(seen) for name, seen in parts.items()}


def _fp16(plan: Plan, converted: Path, shown: Shown, work: Path) -> SessionSpec:
    # Standard operators only: TensorRT knows none of onnxruntime's fused ones, and fuses by itself.
    graph.save(ort.to_float16(graph.load(converted / convert.STANDARD)), work)
    return _AT_LOAD


def _qdq_s8_sym(plan: Plan, converted: Path, shown: Shown, work: Path) -> SessionSpec:
    source, quantized = converted / convert.STANDARD, work / "quantized.onnx"
    ort.quantize_static_s8(source, quantized, shown.calibration, nodes=graph.constant_matmuls(source))
    graph.check_zero_points(quantized)
    graph.save(graph.load(quantized), work)
    return _AT_LOAD


def _best_graph(converted: Path) -> Path:
    fused = converted / convert.FUSED
    return fused if fused.is_file() else converted / convert.STANDARD


def _offline(converted: Path, model: Path, work: Path) -> SessionSpec:
    """Optimise ahead of time, so that a device loads faster and gets no slow fusion back."""
    optimized = work / "optimized.onnx"
    ort.optimize_offline(model, optimized)
    graph.save(graph.load(optimized), work)
    facts = convert.load_converted(converted)
    if facts.fused:
        counts = graph.operator_counts(work / graph.MODEL)
        graph.check_fusion(counts, layers=facts.layers, where="quantize", gelu=facts.gelu)
    return _OFFLINE


Builder = Callable[[Plan, Path, Shown, Path], SessionSpec]
BUILDERS: dict[str, Builder] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "dynamic-s8": _dynamic_s8,
    "qdq-s8-sym": _qdq_s8_sym,
}
