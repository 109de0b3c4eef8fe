"""``report.json``: what was tried, measured, chosen, and why. Keys are a promise to those who read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from aios_edge.errors import PromiseBroken
from aios_edge.measurement import MeasuredOn
from exporters.calibration import Calibration
from exporters.class_drop import ClassDrop
from exporters.confusion import Confusion
from exporters.evaluate import Metrics, Quality
from exporters.measure import Timing
from exporters.quantize import Tuned
from exporters.recipe import DistillSection
from exporters.recovery_search import ShortTraining
from exporters.structure import Structure

REPORT_SCHEMA = "1.0"


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one request of 32 tokens on one thread."""

    p50: float
    p95: float


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy lost against fine-tuned fp32, with its paired 95 % interval and the split it was seen on."""

    value: float
    low: float
    high: float
    split: str


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bench`` measured of a candidate on the target, in the report. ``speedup`` is against the profile's fp32
    candidate on the same device: ``interleaved`` with it, or from its own measurement; None where there was none."""

    p50: float
    p95: float
    batch: int
    length: int
    threads: int
    speedup: float | None
    interleaved: bool
    rss_bytes: int | None
    provider: str
    bundle_id: str
    measured_on: MeasuredOn


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """A pruned network in fp32, run as the baseline is: what pruning bought by itself, before the candidate's
    quantization. Accuracy on validation, latency and speed of one request of 32 tokens on one thread of this machine;
    ``whole``: the structure it was pruned from."""

    whole: Structure
    size_bytes: int
    accuracy: float | None
    drop: Interval | None
    agreement: float | None
    latency_s: Latency | None
    speedup: float | None


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate of one profile. ``test``, ``calibration`` and ``confusion`` are filled for the chosen one only: the
    others never meet that split. ``structure``, ``pruned`` and ``recovery``: what was kept by pruning, the network
    before it was quantized, and the training that it went through; None for the whole network. ``rare_row_bits``: of
    words that the training data use least or not at all, where they have fewer than others. ``class_drops``: the
    classes that changed, on test where that was read, else on validation. ``target``: what was measured on a device and
    brought; all other figures are of ``measured_on``. ``measuring_bundle``: the folder of the bundle that was given out
    to be measured."""

    name: str
    precision: str
    chosen: bool
    reason: str
    size_bytes: int | None
    bundle_size_bytes: int | None
    metrics: Metrics | None
    drop: Interval | None
    agreement: float | None
    speedup: float | None
    latency_s: Latency | None
    latency: tuple[Timing, ...]
    rss_bytes: int | None
    max_batch_size: int | None
    measured_on: MeasuredOn
    operators: dict[str, int]
    kept_float: tuple[str, ...] = ()  # activations whose products were not quantized: they harm the answers most
    test: Quality | None = None
    calibration: Calibration | None = None
    eligible: bool = False  # keeps every promise
    confusion: Confusion | None = None
    class_drops: tuple[ClassDrop, ...] = ()
    not_measured: str | None = None  # why figures are None
    rare_row_bits: int | None = None
    structure: Structure | None = None
    pruned: Pruned | None = None
    recovery: Training | None = None
    target: Target | None = None
    measuring_bundle: str | None = None
    tuning: tuple[Tuned, ...] = ()  # the trials of an accuracy-aware search
    same_model_as: str | None = None  # another candidate, whose figures these are


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """The fine-tuned model as fp32 ONNX under onnxruntime's defaults; what everything else is compared with.

    ``majority_accuracy``: always answering the most frequent training label, on the test split.
    """

    size_bytes: int
    latency_s: Latency | None
    rss_bytes: int | None
    metrics: Metrics  # validation
    test: Metrics | None
    majority_accuracy: float | None
    parity: float


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """The distillation that a pruned network went through; accuracy on validation and mean loss per epoch.

    ``settings`` are those it really had: the recipe's, or what ``trials`` (short trainings) found better.
    """

    epochs: int
    best_epoch: int | None
    validation_accuracy: tuple[float, ...]
    training_loss: tuple[float, ...]
    settings: DistillSection
    trials: tuple[ShortTraining, ...] = ()


class Finetuned(msgspec.Struct, frozen=True, kw_only=True):
    """The fine-tuning and its result in torch."""

    method: str
    epochs: int
    best_epoch: int | None
    validation_accuracy: tuple[float, ...]
    precision: str
    trained_parameters: int
    metrics: Metrics  # validation, as fp32
    training_loss: tuple[float, ...] = ()


class ProfileReport(msgspec.Struct, frozen=True, kw_only=True):
    """One profile: its candidates in order of preference, and where its bundle is (None: nothing was shipped)."""

    chosen: str | None
    bundle: str | None
    bundle_id: str | None
    max_drop: float
    candidates: tuple[Candidate, ...]
    problem: str | None = None

    @property
    def models(self) -> tuple[Candidate, ...]:
        """Each model once: candidates that came out as another one are last, so numbers stay."""
        return tuple(candidate for candidate in self.candidates if candidate.same_model_as is None)


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report."""

    schema: str
    name: str
    version: str
    recipe: dict[str, Any]
    source: str
    data: str
    labels: tuple[str, ...]
    tools: dict[str, str]
    baseline: Baseline
    finetuned: Finetuned
    profiles: dict[str, ProfileReport]
    warnings: tuple[str, ...]
    wall_s: float
    stages: dict[str, tuple[str, ...]]  # built, reused
    peak_rss_bytes: int | None = None  # of this run, with the largest process that it started
    error: str | None = None  # why nothing was shipped

    def to_json(self) -> bytes:
        """The document, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class NothingShipped(PromiseBroken):
    """A promise was broken after the candidates were tried; ``report`` says how, as the files do."""

    def __init__(self, problem: PromiseBroken, report: ExportReport, *, remedy: str) -> None:
        super().__init__(problem.promise, problem.what, where=problem.where, remedy=remedy)
        self.report = report


def write_report(report: ExportReport, out: Path) -> None:
    """Write ``report.json`` and ``report.html``, each whole or not at all."""
    from exporters.report_page import page

    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.json", report.to_json()), ("report.html", page(report).encode())):
        fresh = out / f".{name}.part"
        fresh.write_bytes(content)
        fresh.replace(out / name)
