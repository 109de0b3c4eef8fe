"""The candidates: which ones a profile asks for, and how each is made. One entry in ``BUILDERS`` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from aios_edge.errors import ProfileError
from aios_edge.manifest import Precision, SessionSpec
from aios_edge.profile import DeviceProfile
from exporters import convert, equalize, graph, ort, tables
from exporters.encode import Sample

CALIBRATION_SAMPLES = 128
_DYNAMIC_OPERATORS = ("MatMul", "Attention")
_LEVELS = {True: 64, False: 127}  # of an s8 weight, with and without reduce_range, as onnxruntime has them
#: Not built here: it starts from torch and needs a package that may not be there (:mod:`exporters.inc`).
STATIC: Precision = "static-s8"
_NAMES = {STATIC: "inc-static-s8"}  # named after who makes it
_NARROWED = ("dynamic-s8", STATIC)
_OFFLINE = SessionSpec(graph_optimization_level="basic")
_AT_LOAD = SessionSpec(graph_optimization_level="all", disabled_optimizers=(ort.SKIP_FUSION,))


@dataclass(frozen=True)
class Plan:
    """A candidate to build. ``name`` tells variants of one precision apart (``dynamic-s8-r7``: 7-bit weights)."""

    name: str
    precision: Precision
    reduce_range: bool = False


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """One trial of an accuracy-aware search, on that many validation rows; ``kept`` is the one that was built."""

    configuration: str
    accuracy: float
    agreement: float
    rows: int
    kept: bool = False


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """``candidate.json`` beside ``model.onnx``: the session options it must be run with, the operators it has."""

    session: SessionSpec
    operators: dict[str, int]
    tuning: tuple[Tuned, ...] = ()


def plans_for(profile: DeviceProfile, *, tuned_static: bool = False) -> tuple[Plan, ...]:
    """The candidates of a profile in its order of preference; raises :class:`ProfileError` for an unknown one.

    ``tuned_static``: neural-compressor's as well, last, where the first provider is the CPU (its zero points aren't 0).
    """
    plans = []
    for precision in profile.precision_preference:
        if precision not in (*BUILDERS, STATIC):
            remedy = f"Known are: {', '.join(get_args(Precision))}"
            raise ProfileError(f"unknown precision '{precision}'", where=f"profile {profile.name}", remedy=remedy)
        plans.append(_plan(cast(Precision, precision), profile))
    on_cpu = bool(profile.providers) and profile.providers[0].name == "CPUExecutionProvider"
    if tuned_static and on_cpu and STATIC not in profile.precision_preference:
        plans.append(_plan(STATIC, profile))
    return tuple(plans)


def _plan(precision: Precision, profile: DeviceProfile) -> Plan:
    narrow = precision in _NARROWED and profile.reduce_range
    name = _NAMES.get(precision, precision)
    return Plan(name=f"{name}-r7" if narrow else name, precision=precision, reduce_range=narrow)


def build(plan: Plan, converted: Path, calibration: Sequence[Sample], work: Path) -> Built:
    """Make one candidate in ``work`` from the folder of the conversion.

    Raises :class:`PromiseBroken` (``fusion``, ``symmetric`` or ``opset``).
    """
    session = BUILDERS[plan.precision](plan, converted, calibration, work)
    for leftover in (work / "quantized.onnx", work / "optimized.onnx"):
        leftover.unlink(missing_ok=True)
    built = Built(session=session, operators=dict(graph.operator_counts(work / graph.MODEL)))
    (work / "candidate.json").write_bytes(msgspec.json.encode(built))
    return built


def load_built(folder: Path) -> Built:
    """Read ``candidate.json``."""
    return msgspec.json.decode((folder / "candidate.json").read_bytes(), type=Built)


def _fp32(plan: Plan, converted: Path, calibration: Sequence[Sample], work: Path) -> SessionSpec:
    return _offline(converted, _best_graph(converted), work)


def _dynamic_s8(plan: Plan, converted: Path, calibration: Sequence[Sample], work: Path) -> SessionSpec:
    model = graph.load(_best_graph(converted))
    equalize.equalize(model, observe(model, calibration), weight_levels=_LEVELS[plan.reduce_range])
    equalized, quantized = work / "equalized.onnx", work / "quantized.onnx"
    graph.save_whole(model, equalized)
    ort.quantize_dynamic_s8(equalized, quantized, operators=_DYNAMIC_OPERATORS, reduce_range=plan.reduce_range)
    equalized.unlink()
    model = graph.load(quantized)
    tables.quantize_tables(model)
    graph.save_whole(model, quantized)
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


def _fp16(plan: Plan, converted: Path, calibration: Sequence[Sample], work: Path) -> SessionSpec:
    # Standard operators only: TensorRT knows none of onnxruntime's fused ones, and fuses by itself.
    graph.save(ort.to_float16(graph.load(converted / convert.STANDARD)), work)
    return _AT_LOAD


def _qdq_s8_sym(plan: Plan, converted: Path, calibration: Sequence[Sample], work: Path) -> SessionSpec:
    source, quantized = converted / convert.STANDARD, work / "quantized.onnx"
    ort.quantize_static_s8(source, quantized, calibration, nodes=graph.constant_matmuls(source))
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


Builder = Callable[[Plan, Path, Sequence[Sample], Path], SessionSpec]
BUILDERS: dict[str, Builder] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "dynamic-s8": _dynamic_s8,
    "qdq-s8-sym": _qdq_s8_sym,
}
