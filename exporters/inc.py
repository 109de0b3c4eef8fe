"""neural-compressor as two more candidates: static int8 at its defaults, and tuned until it keeps the accuracy promise.

It runs in a process of its own (:mod:`exporters.inc_worker`): importing it takes seconds, sets up logging and patches
torch. What comes back is an ONNX file in standard operators, which is folded (:mod:`exporters.fold_weights`), optimised
ahead of time and judged like every other candidate. See docs/adr/0020 and 0023.
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
from numpy.typing import NDArray

from aios_edge.errors import MissingExtra, RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from exporters import first_token, graph, ort, steps, tables
from exporters.encode import Sample
from exporters.fold_weights import fold_weights, integer_products
from exporters.plans import Plan
from exporters.quantize import Built, Tuned

EXTRA = "neural-compressor"
WORKER = ("-m", "exporters.inc_worker")
#: What the static backend does unasked, and so what a tuning begins with.
DEFAULT = "all products, ranges from extremes"
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


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What a tuning is to keep: of the ``accuracy`` of fp32 on its rows no more than ``max_drop`` is lost."""

    accuracy: float
    max_drop: float

    def kept_by(self, trial: Tuned) -> bool:
        """Whether that trial ends the tuning."""
        return trial.accuracy >= self.accuracy - self.max_drop


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """``job.json``: what the other process is to do.

    ``model``: folder of the fine-tuned torch model. ``levels``: largest integer of a weight. ``promise``: what to tune
    for, beginning behind the default configuration; without it that one is all there is.
    """

    model: str
    inputs: tuple[str, ...]
    levels: int
    threads: int
    promise: Promise | None = None


@dataclass(frozen=True)
class Rows:
    """Validation rows that trials are judged on: tokens, the right answers and fp32's."""

    samples: Sequence[Sample]
    labels: NDArray[np.intp]
    reference: NDArray[np.intp]

    def judge(self, configuration: str, answers: NDArray[np.intp]) -> Tuned:
        """A trial by what it answers."""
        right, same = float(np.mean(answers == self.labels)), float(np.mean(answers == self.reference))
        return Tuned(configuration=configuration, accuracy=right, agreement=same, rows=len(self.labels))


def best_of(trials: Sequence[Tuned], promise: Promise) -> int:
    """The number of the trial to keep: the first that keeps the promise, else the most accurate, the faster of two."""
    first = next((number for number, trial in enumerate(trials) if promise.kept_by(trial)), None)
    return first if first is not None else max(range(len(trials)), key=lambda number: trials[number].accuracy)


def marked(trials: Sequence[Tuned], kept: int) -> tuple[Tuned, ...]:
    """The same with one of them kept."""
    return tuple(msgspec.structs.replace(trial, kept=number == kept) for number, trial in enumerate(trials))


def versions() -> dict[str, str]:
    """Versions of what the result depends on beside the usual tools; raises :class:`MissingExtra`."""
    check_installed()
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_installed() -> None:
    """Raise :class:`MissingExtra` unless all it needs can be found. Nothing is imported."""
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module.replace("_", "-"), EXTRA, why="This candidate")


def build(plan: Plan, job: Job, calibration: Sequence[Sample], work: Path) -> None:
    """Make the static candidate in ``work``.

    Raises :class:`RuntimeUnavailable` when the other process fails or leaves products in fp32 that it says are s8.
    """
    _run(job, calibration, None, work)
    _save(_finished(plan, work), work)


def tune(
    plan: Plan, job: Job, calibration: Sequence[Sample], rows: Rows, first: Tuned, static: Built, work: Path
) -> None:
    """Make the tuned candidate in ``work``; raises as :func:`build` does.

    ``first``: how the ``static`` candidate did, which is the first trial and breaks the promise. Where none of the
    others does better, ``work`` has no model: the static candidate is the one to keep.
    """
    assert job.promise is not None
    _run(job, calibration, rows, work)
    trials = (first, *msgspec.json.decode((work / TUNING).read_bytes(), type=tuple[Tuned, ...]))
    (work / TUNING).unlink()
    kept = best_of(trials, job.promise)
    built = _finished(plan, work) if kept else static
    steps.remove(work / QUANTIZED)
    _save(msgspec.structs.replace(built, tuning=marked(trials, kept)), work)


def _save(built: Built, work: Path) -> None:
    (work / "candidate.json").write_bytes(msgspec.json.encode(built))


def _finished(plan: Plan, work: Path) -> Built:
    """Optimised ahead of time; every 8-bit product must be one operator then."""
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
    return Built(session=session, operators=dict(counts))


def finish(proto: Any, *, levels: int, out: Path) -> None:
    """What torch exported, as the candidate runs it: s8 weights and tables, one token behind the last attention."""
    graph.split_gemms(proto)
    fold_weights(proto, levels=levels)
    first_token.read_first(proto)
    tables.quantize_tables(proto)
    steps.save(proto, out)


def _run(job: Job, calibration: Sequence[Sample], rows: Rows | None, work: Path) -> None:
    """Leaves QUANTIZED, and TUNING where it had ``rows`` to tune on."""
    (work / "job.json").write_bytes(msgspec.json.encode(job))
    _pack(work / "calibration.npz", calibration)
    if rows is not None:
        _pack(work / "rows.npz", rows.samples)
        np.savez(work / "answers.npz", labels=rows.labels, reference=rows.reference)
    command = [sys.executable, *WORKER, str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(f"took more than {_TIMEOUT_S} s", where="neural-compressor") from error
    if done.returncode != 0 or not (work / QUANTIZED).is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = "Use the versions in constraints.txt, or leave its candidates out"
        raise RuntimeUnavailable(f"failed ({last})", where="neural-compressor", remedy=remedy)
    for name in ("job.json", "calibration.npz", "rows.npz", "answers.npz"):
        (work / name).unlink(missing_ok=True)


def _pack(path: Path, samples: Sequence[Sample]) -> None:
    packed: dict[str, Any] = {f"{i}/{name}": array for i, s in enumerate(samples) for name, array in s.items()}
    np.savez(path, **packed)


def unpack(path: Path) -> list[Sample]:
    """The samples that were given to the other process, in order."""
    samples: dict[int, Sample] = {}
    with np.load(path, allow_pickle=False) as packed:
        for key in packed.files:
            number, name = key.split("/", 1)
            samples.setdefault(int(number), {})[name] = packed[key]
    return [samples[number] for number in sorted(samples)]


def rows_in(work: Path) -> Rows:
    """The validation rows that were given to it."""
    with np.load(work / "answers.npz") as answers:
        return Rows(samples=unpack(work / "rows.npz"), labels=answers["labels"], reference=answers["reference"])
