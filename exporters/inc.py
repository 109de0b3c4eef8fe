"""neural-compressor as one more candidate: static int8, tuned until it keeps the accuracy promise.

It runs in a process of its own (:mod:`exporters.inc_worker`): importing it takes seconds, sets up logging and patches
torch. What comes back is an ONNX file in standard operators, which is folded (:mod:`exporters.fold_weights`), optimised
ahead of time and judged like every other candidate. See docs/adr/0020.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aios_edge.errors import MissingExtra, RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from exporters import first_token, graph, ort, steps, tables
from exporters.encode import Sample
from exporters.fold_weights import fold_weights, integer_products
from exporters.plans import Plan
from exporters.quantize import Built, Tuned

EXTRA = "neural-compressor"
#: Validation rows that each trial is judged on; all of them judge the candidate.
TUNING_ROWS = 1000
TUNING, QUANTIZED = "tuning.json", "quantized.onnx"
_MODULES = ("neural_compressor", "torchao", "cpuinfo", "onnxscript")
_PACKAGES = ("neural-compressor", "torchao", "onnxscript")
_TIMEOUT_S = 3600
#: With the bias in the product (Gemm) onnxruntime finds no 8-bit kernel for it, and dequantizes the weight each time.
_APART = "MatMulAddFusion"
#: How a trial runs: as the finished candidate does, which is optimised ahead of time.
AT_TRIAL = SessionSpec(graph_optimization_level="extended", disabled_optimizers=(ort.SKIP_FUSION, _APART))


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """``job.json``: what the other process is to do.

    ``model``: folder of the fine-tuned torch model. ``accuracy``: of fp32 on the rows; a trial that loses no more than
    ``max_drop`` of it ends the search. ``levels``: largest integer of a weight.
    """

    model: str
    inputs: tuple[str, ...]
    accuracy: float
    max_drop: float
    levels: int
    threads: int


@dataclass(frozen=True)
class Rows:
    """Validation rows that trials are judged on: tokens, the right answers and fp32's."""

    samples: Sequence[Sample]
    labels: Sequence[int]
    reference: Sequence[int]


def versions() -> dict[str, str]:
    """Versions of what the result depends on beside the usual tools; raises :class:`MissingExtra`."""
    check_installed()
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_installed() -> None:
    """Raise :class:`MissingExtra` unless all it needs can be found. Nothing is imported."""
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module.replace("_", "-"), EXTRA, why="This candidate")


def build(plan: Plan, job: Job, calibration: Sequence[Sample], rows: Rows, work: Path) -> Built:
    """Make the candidate in ``work``.

    Raises :class:`RuntimeUnavailable` when the other process fails or leaves products in fp32 that it says are s8.
    """
    trials = _run(job, calibration, rows, work)
    model = graph.load(work / QUANTIZED)
    wanted = integer_products(model)
    optimized = work / "optimized.onnx"
    ort.optimize_offline(work / QUANTIZED, optimized, apart=(_APART,))
    graph.save(graph.load(optimized), work)
    for leftover in (optimized, work / QUANTIZED):
        steps.remove(leftover)
    counts = graph.operator_counts(work / graph.MODEL)
    if not wanted or counts["MatMulIntegerToFloat"] < wanted:
        what = f"onnxruntime fused {counts['MatMulIntegerToFloat']} of {wanted} 8-bit products"
        raise RuntimeUnavailable(what, where=plan.name, remedy="Use the versions in constraints.txt")
    session = SessionSpec(graph_optimization_level="basic", disabled_optimizers=(_APART,))
    built = Built(session=session, operators=dict(counts), tuning=trials)
    (work / "candidate.json").write_bytes(msgspec.json.encode(built))
    return built


def finish(proto: Any, *, levels: int, out: Path) -> None:
    """What torch exported, as the candidate runs it: s8 weights and tables, one token behind the last attention."""
    graph.split_gemms(proto)
    fold_weights(proto, levels=levels)
    first_token.read_first(proto)
    tables.quantize_tables(proto)
    steps.save(proto, out)


def _run(job: Job, calibration: Sequence[Sample], rows: Rows, work: Path) -> tuple[Tuned, ...]:
    (work / "job.json").write_bytes(msgspec.json.encode(job))
    _pack(work / "calibration.npz", calibration)
    _pack(work / "rows.npz", rows.samples)
    np.savez(work / "answers.npz", labels=np.asarray(rows.labels), reference=np.asarray(rows.reference))
    command = [sys.executable, "-m", "exporters.inc_worker", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(f"took more than {_TIMEOUT_S} s", where="neural-compressor") from error
    if done.returncode != 0 or not (work / TUNING).is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = "Use the versions in constraints.txt, or remove neural_compressor from [search]"
        raise RuntimeUnavailable(f"failed ({last})", where="neural-compressor", remedy=remedy)
    trials = msgspec.json.decode((work / TUNING).read_bytes(), type=tuple[Tuned, ...])
    for name in ("job.json", "calibration.npz", "rows.npz", "answers.npz", TUNING):
        (work / name).unlink()
    return trials


def _pack(path: Path, samples: Sequence[Sample]) -> None:
    packed: dict[str, Any] = {f"{i}/{name}": array for i, s in enumerate(samples) for name, array in s.items()}
    np.savez(path, **packed)


def unpack(path: Path) -> list[Sample]:
    """The samples that :func:`build` wrote, in order."""
    samples: dict[int, Sample] = {}
    with np.load(path, allow_pickle=False) as packed:
        for key in packed.files:
            number, name = key.split("/", 1)
            samples.setdefault(int(number), {})[name] = packed[key]
    return [samples[number] for number in sorted(samples)]
