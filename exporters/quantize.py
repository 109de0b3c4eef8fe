"""The candidates: how each is made (which ones: :mod:`exporters.plans`). One entry in ``BUILDERS`` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.manifest import SessionSpec
from exporters import convert, equalize, graph, observe, ort, qdq, rounding, sensitivity, steps, tables
from exporters.encode import Sample
from exporters.plans import Plan
from exporters.scheme import LEVELS, REDUCED_LEVELS, Scheme

CALIBRATION_SAMPLES = 128
TRIAL_SAMPLES = 128
_DYNAMIC_OPERATORS = ("MatMul", "Attention")
_OFFLINE = SessionSpec(graph_optimization_level="basic")
_AT_LOAD = SessionSpec(graph_optimization_level="all", disabled_optimizers=(ort.SKIP_FUSION,))


@dataclass(frozen=True)
class Rows:
    """What the training rows show. ``calibration``: encoded ones that ranges, factors and roundings are made for;
    ``trial``: others, on which the result is tried; ``counts``: how often each value of an input occurs in all of them
    (counts by value)."""

    calibration: Sequence[Sample]
    trial: Sequence[Sample]
    counts: Mapping[str, NDArray[np.intp]] = field(default_factory=dict)


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """One trial of an accuracy-aware search, on that many validation rows; ``kept`` is the one that became the
    candidate."""

    configuration: str
    accuracy: float
    agreement: float
    rows: int
    kept: bool = False


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """``candidate.json`` beside ``model.onnx``: the session options it must be run with, the operators it has.

    ``kept_float``: activations whose products were left in float because they harm the answers most. ``tuning``: the
    trials of a search. ``rare_row_bits``: what rows of tables that training didn't look up really have, which is 8
    where no table could be split, whatever the plan asks for.
    """

    session: SessionSpec
    operators: dict[str, int]
    kept_float: tuple[str, ...] = ()
    tuning: tuple[Tuned, ...] = ()
    rare_row_bits: int = 8


def check_calibration(plan: Plan, calibration: Sequence[Sample]) -> None:
    """Raise :class:`DataError` where there are too few different samples for the plan."""
    if plan.fixes_ranges:
        observe.check_samples(calibration, Scheme(static=True))


def build(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    """Make one candidate in ``work`` from the folder of the conversion.

    Raises :class:`PromiseBroken` (``fusion``, ``symmetric``, ``calibration`` or ``opset``) and :class:`DataError` for
    too few calibration samples.
    """
    built = BUILDERS[plan.precision](plan, converted, rows, work)
    for leftover in (work / "quantized.onnx", work / "optimized.onnx"):
        steps.remove(leftover)
    built = msgspec.structs.replace(built, operators=dict(graph.operator_counts(work / graph.MODEL)))
    (work / "candidate.json").write_bytes(msgspec.json.encode(built))
    return built


def load_built(folder: Path) -> Built:
    """Read ``candidate.json``."""
    return msgspec.json.decode((folder / "candidate.json").read_bytes(), type=Built)


def _fp32(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    return _offline(converted, _best_graph(converted), work)


def _dynamic_s8(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    scheme = Scheme(weight_levels=REDUCED_LEVELS if plan.reduce_range else LEVELS)
    model = graph.load(_best_graph(converted))
    _equalize(model, rows.calibration, scheme)
    _compensate(model, list(equalize.products(model)), rows.calibration, scheme)
    wanted = graph.products(model)
    prepared, quantized = work / "prepared.onnx", work / "quantized.onnx"
    steps.save(model, prepared)
    ort.quantize_dynamic_s8(prepared, quantized, operators=_DYNAMIC_OPERATORS, reduce_range=plan.reduce_range)
    steps.remove(prepared)
    model = graph.load(quantized)
    _, split = tables.quantize_tables(model, rows.counts if plan.counts_rows else {}, plan.rare_row_bits)
    steps.save(model, quantized)
    built = _offline(converted, quantized, work, wanted)
    return msgspec.structs.replace(built, rare_row_bits=plan.rare_row_bits if split else 8)


def _qdq_u8s8(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    scheme = Scheme(static=True, weight_levels=REDUCED_LEVELS if plan.reduce_range else LEVELS)
    model, quantized = graph.load(_best_graph(converted)), work / "quantized.onnx"
    _equalize(model, rows.calibration, scheme)
    found = observe.ranges_of(model, rows.calibration, scheme)
    kept = sensitivity.most_harmful(model, found, scheme, rows.trial, least=1) if plan.mixed else ()
    fixed = {name: entry for name, entry in found.items() if name not in kept}
    _compensate(model, list(fixed), rows.calibration, scheme)
    own = {node.name for name, nodes in equalize.products(model).items() if name in fixed for node in nodes}
    wanted = [name for name in graph.products(model) if name in own]
    qdq.quantize(model, fixed, scheme, "integer")
    tables.quantize_tables(model)
    steps.save(model, quantized)
    return msgspec.structs.replace(_offline(converted, quantized, work, wanted), kept_float=kept)


def _fp16(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    # Standard operators only: TensorRT knows none of onnxruntime's fused ones, and fuses by itself.
    graph.save(ort.to_float16(graph.load(converted / convert.STANDARD)), work)
    return Built(operators={}, session=_AT_LOAD)


def _qdq_s8_sym(plan: Plan, converted: Path, rows: Rows, work: Path) -> Built:
    scheme = Scheme(static=True, symmetric=True)
    model = graph.load(converted / convert.STANDARD)
    _equalize(model, rows.calibration, scheme)
    found = observe.ranges_of(model, rows.calibration, scheme)
    kept = sensitivity.most_harmful(model, found, scheme, rows.trial)
    quantized = {name: entry for name, entry in found.items() if name not in kept}
    _compensate(model, list(quantized), rows.calibration, scheme)
    qdq.quantize(model, quantized, scheme, "qdq")
    graph.check_zero_points(model)
    tables.halve_tables(model)
    graph.save(model, work)
    return Built(operators={}, session=_AT_LOAD, kept_float=kept)


def _equalize(model: Any, calibration: Sequence[Sample], scheme: Scheme) -> None:
    observe.check_samples(calibration, scheme)
    graph.split_gemms(model)
    equalize.equalize(model, observe.channels(model, calibration), scheme)


def _compensate(model: Any, names: Sequence[str], calibration: Sequence[Sample], scheme: Scheme) -> None:
    """Round the weights behind these activations so that their errors cancel; what is left in float keeps its own."""
    products = equalize.products(model)
    for name, gram in observe.grams(model, names, calibration):
        rounding.compensate(model, products[name], gram, scheme.weight_levels)


def _best_graph(converted: Path) -> Path:
    fused = converted / convert.FUSED
    return fused if fused.is_file() else converted / convert.STANDARD


def _offline(converted: Path, model: Path, work: Path, products: Sequence[str] = ()) -> Built:
    """Optimise ahead of time, so that a device loads faster and gets no slow fusion back. ``products``: those that must
    run on integers."""
    optimized = work / "optimized.onnx"
    ort.optimize_offline(model, optimized)
    finished = graph.load(optimized)
    graph.check_products(finished, products, where="quantize")
    facts = convert.load_converted(converted)
    if facts.fused:
        graph.check_fusion(finished, layers=facts.layers, where="quantize", gelu=facts.gelu)
    graph.save(finished, work)
    return Built(operators={}, session=_OFFLINE)


Builder = Callable[[Plan, Path, Rows, Path], Built]
BUILDERS: dict[str, Builder] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "dynamic-s8": _dynamic_s8,
    "qdq-u8s8": _qdq_u8s8,
    "qdq-s8-sym": _qdq_s8_sym,
}
