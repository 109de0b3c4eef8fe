"""The stages with their caching: what goes into each one's digest, and what it leaves behind."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aios_edge.golden import RawInput
from aios_edge.host import Host, describe
from aios_edge.profile import Threads
from aios_edge.tasks import TASKS
from aios_edge.version import __version__
from exporters import (
    convert,
    encode,
    equalize,
    evaluate,
    finetune,
    first_token,
    graph,
    measure,
    measure_rss,
    observe,
    ort,
    product_codes,
    prune,
    qdq,
    quantize,
    ranges,
    rare_rows,
    rounding,
    scheme,
    sensitivity,
    signature,
    source,
    steps,
    tables,
    training,
    verify,
)
from exporters.bundle import Identity, draft, text_input
from exporters.cache import StageCache, code_digest
from exporters.data import Data, Labelled
from exporters.encode import Encoder, Sample
from exporters.evaluate import Logits
from exporters.finetune import Tuned
from exporters.plans import Plan
from exporters.progress import Progress
from exporters.quantize import Built, Rows
from exporters.recipe import ExportRecipe
from exporters.source import Source

_TOOLS = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "numpy")
_QUIET = Threads()
#: Whatever decides what a quantized candidate looks like.
_QUANTIZING = (
    quantize, observe, equalize, graph, ort, product_codes, qdq, ranges, rare_rows, rounding, scheme, sensitivity,
    steps, tables,
)  # fmt: skip
_BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def tool_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"aios-edge": __version__} | {name: importlib.metadata.version(name) for name in _TOOLS}


@dataclass(frozen=True)
class Made:
    """A built candidate: its name in the report, its plan, its folder (named by its digest), and how it must be run."""

    name: str
    plan: Plan
    folder: Path
    built: Built

    @property
    def model(self) -> Path:
        """The model file."""
        return self.folder / graph.MODEL


def picked_texts(train: Labelled) -> tuple[tuple[RawInput, ...], tuple[RawInput, ...]]:
    """The training texts that calibrate, and those between them on which the result is tried."""
    stride = max(1, len(train) // quantize.CALIBRATION_SAMPLES)
    between = train.texts[stride // 2 :: stride][: quantize.TRIAL_SAMPLES]
    return train.spread(quantize.CALIBRATION_SAMPLES), between


class Stages:
    """The steps of one export; each returns a value and keeps its files in the cache."""

    def __init__(self, recipe: ExportRecipe, cache: StageCache, host: Host, progress: Progress) -> None:
        self.recipe, self.progress, self.tools = recipe, progress, tool_versions()
        self._cache, self._host = cache, host
        self.task = importlib.import_module(TASKS[recipe.model.task].__module__)  # its code decides answers too
        self.threads = recipe.finetune.threads or os.cpu_count() or 1

    def produce(
        self, stage: str, ingredients: dict[str, Any], build: Callable[[Path], None], *, resumes: bool = False
    ) -> Path:
        """See :meth:`StageCache.produce`."""
        return self._cache.produce(stage, ingredients, build, resumes=resumes)

    def tokenizer(self, origin: Source) -> Path:
        """A folder with tokenizer.json."""
        ingredients = {"source": origin.digest, "tools": self.tools, "code": code_digest(source)}

        def build(work: Path) -> None:
            (work / encode.TOKENIZER).write_bytes(source.tokenizer_json(origin.folder))

        return self._cache.produce("tokenizer", ingredients, build)

    def identity(self, origin: Source, labels: tuple[str, ...], *, pair: bool) -> Identity:
        """What the bundles share: name, labels, inputs, pre-processing."""
        types = int(origin.config.get("type_vocab_size", 0))
        length = min(self.recipe.finetune.max_length, origin.max_length)
        pad_id = int(origin.config.get("pad_token_id") or 0)
        return Identity(
            name=self.recipe.name,
            version=self.recipe.export.version,
            task=self.recipe.model.task,
            labels=labels,
            inputs=_BERT_INPUTS if types > 1 else _BERT_INPUTS[:2],
            text=text_input(max_length=length, pad_id=pad_id, pair=pair),
            licence=self.recipe.export.licence,
        )

    def encoder(self, identity: Identity, tokenizer: Path) -> Encoder:
        """The device's own pre-processing."""
        return Encoder(draft(identity), tokenizer)

    def finetune(self, origin: Source, data: Data, encoder: Encoder) -> tuple[Path, Tuned]:
        """The folder of the fine-tuned model, and what happened."""
        section = self.recipe.finetune
        ingredients = {
            "source": origin.digest,
            "train": data.train.digest(),
            "validation": data.validation.digest(),
            "labels": data.labels,
            "finetune": {**msgspec.to_builtins(section), "threads": None},
            "tools": self.tools,
            "code": code_digest(finetune, training, source, encode, self.task),
        }

        def build(work: Path) -> None:
            import torch

            self.progress.stage("finetune", f"{section.method}, {len(data.train)} rows")
            torch.manual_seed(section.seed)  # a fresh head starts the same way each time
            model = source.load_torch(origin.folder, labels=data.labels if section.method != "none" else None)
            tuned = finetune.finetune(model, section, data.train, data.validation, encoder, work, self.progress)
            finetune.save_tuned(tuned, work)

        folder = self._cache.produce("finetune", ingredients, build, resumes=True)
        return folder, finetune.load_tuned(folder)

    def convert(
        self, tuned: Path, identity: Identity, samples: Sequence[Sample], encoder: Encoder
    ) -> tuple[Path, float]:
        """The folder of the ONNX graphs, and their parity with torch (the worst of them)."""
        ingredients = {
            "finetune": tuned.name,
            "inputs": identity.inputs,
            "tools": {**self.tools, **signature.versions()},
            "code": code_digest(convert, first_token, graph, ort, prune, signature, steps, verify),
            "samples": len(samples),
        }

        def build(work: Path) -> None:
            self.progress.stage("convert", "torch to ONNX, fused, parity with torch")
            model = source.load_torch(tuned / "model")
            convert.save_converted(convert.convert(model, identity.inputs, work), work)
            batches = verify.parity_batches(samples, encoder)

            def torch_run(batch: Sample) -> Any:
                return training.batch_logits(model, batch)

            worst = 0.0
            for name in convert.GRAPHS:
                if (work / name).is_file():
                    run = ort.Session(work / name, ort.DEFAULT_SPEC, threads=self.threads).run
                    worst = max(worst, verify.check_parity(name, run, torch_run, batches))
            (work / "parity.json").write_bytes(msgspec.json.encode(worst))

        folder = self._cache.produce("convert", ingredients, build)
        return folder, msgspec.json.decode((folder / "parity.json").read_bytes(), type=float)

    def candidate(self, name: str, plan: Plan, converted: Path, data: Data, encoder: Encoder) -> Made:
        """One candidate, built. Only what calibrates depends on the training rows."""
        picked, trial = picked_texts(data.train)
        ingredients = {
            "convert": converted.name,
            "plan": [plan.name, plan.precision, plan.reduce_range, plan.rare_row_bits],
            "tools": self.tools,
            "code": code_digest(*_QUANTIZING, encode, self.task),
            "calibration": [picked, trial],
        }
        if plan.counts_rows:  # which rows are rare is counted in all texts, as the encoder sees them
            ingredients["counted"] = [data.in_use, encoder.digest()]

        def build(work: Path) -> None:
            self.progress.stage("quantize", name)
            rows = Rows(
                calibration=encoder.samples(picked),
                trial=encoder.samples(trial),
                counts=encoder.counts(data.in_use) if plan.counts_rows else {},
            )
            quantize.build(plan, converted, rows, work)

        folder = self._cache.produce("quantize", ingredients, build)
        return Made(name=name, plan=plan, folder=folder, built=quantize.load_built(folder))

    def baseline(self, converted: Path) -> Made:
        """fp32 as converted, run at onnxruntime's defaults: what candidates are compared with."""
        built = Built(session=ort.DEFAULT_SPEC, operators={})
        return Made(name="baseline", plan=Plan(name="baseline", precision="fp32"), folder=converted, built=built)

    def answers(self, made: Made, split: str, rows: Labelled, encoder: Encoder) -> Logits:
        """A model's answers to a split. They depend on the CPU as well (8-bit products saturate on some)."""
        model = made.folder / convert.RAW if made.name == "baseline" else made.model
        ingredients = {
            "model": [made.folder.name, model.name],
            "rows": rows.digest(),
            "host": self._host_key(),
            "tools": self.tools,
            "code": code_digest(evaluate, ort, encode, self.task),
        }

        def build(work: Path) -> None:
            self.progress.stage("verify", f"{made.name}, {len(rows)} {split} rows")
            session = ort.Session(model, made.built.session)
            samples = encoder.samples(rows.texts)

            def tick(done: int) -> None:
                self.progress.update(done, len(samples))

            logits = evaluate.answers(session, samples, threads=self.threads, tick=tick)
            np.save(work / "logits.npy", logits, allow_pickle=False)

        folder = self._cache.produce("evaluate", ingredients, build)
        logits: Logits = np.load(folder / "logits.npy", allow_pickle=False)
        return logits

    def measured(
        self, made: Made, baseline: Made, shapes: tuple[tuple[int, int, int], ...], threads: Threads = _QUIET
    ) -> measure.Measured:
        """A candidate's latency, memory and useful batch size on this machine. ``threads``: whether they spin, and how
        many run beside each other; those within an operator come with the shapes."""
        fp32 = baseline.folder / convert.RAW
        model = fp32 if made.name == "baseline" else made.model
        ingredients = {
            "model": [made.folder.name, model.name],
            "fp32": baseline.folder.name,
            "shapes": shapes,
            "threads": [threads.inter_op, threads.spinning],
            "host": self._host_key(),
            "tools": self.tools,
            "code": code_digest(measure, measure_rss, ort),
        }

        def build(work: Path) -> None:
            self.progress.stage("measure", made.name)
            spec, fp32_spec = (
                msgspec.structs.replace(built.session, inter_op_threads=threads.inter_op, spinning=threads.spinning)
                for built in (made.built, baseline.built)
            )
            figures = measure.measure(model, spec, fp32, fp32_spec, shapes)
            (work / "measured.json").write_bytes(msgspec.json.encode(figures))

        folder = self._cache.produce("measure", ingredients, build)
        return msgspec.json.decode((folder / "measured.json").read_bytes(), type=measure.Measured)

    def _host_key(self) -> list[Any]:
        return [describe(self._host), sorted(self._host.cpu_flags)]
