"""Sabotage in the middle of whole exports: each promise's own check finds it, and nothing ships."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import exporters
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import AiosEdgeError, PromiseBroken
from aios_edge.profile import DeviceProfile
from aios_edge.profile_files import load_profile
from exporters import (
    convert,
    evaluate,
    first_token,
    graph,
    measure,
    observe,
    ort,
    pipeline,
    qdq,
    quantize,
    sensitivity,
    stages,
    steps,
    verify,
)
from exporters.encode import Sample
from exporters.progress import SilentProgress
from exporters.quantize import Rows
from exporters.report import ExportReport
from exporters.source import load_torch

pytestmark = pytest.mark.export
RPI5 = "rpi5"
FIRST = ("tokenizer", "finetune", "convert")


class Workbench:
    """A copy of the workshop and of the stages of its finished export, which a test may spoil."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.out = folder, cache, folder / "out"

    def export(self, *profiles: DeviceProfile | str, progress: Any = None) -> ExportReport:
        recipe = self.folder / "recipe.toml"
        return exporters.export(recipe, profiles or (RPI5,), self.out, cache=self.cache, progress=progress)

    def forget(self, *stage_names: str) -> None:
        for name in stage_names:
            shutil.rmtree(self.cache / name)

    @property
    def shipped(self) -> list[str]:
        return [path.name for path in self.out.iterdir() if path.is_dir()] if self.out.exists() else []


@pytest.fixture(scope="module")
def finished(
    workshop: Path, fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, ExportReport]]:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(fine_tuned, folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_BUDGET_S", 0.0)
        report = exporters.export(workshop / "recipe.toml", [RPI5], folder / "out", cache=folder / "cache")
    yield folder / "cache", report


@pytest.fixture
def bench(
    workshop: Path, finished: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workbench:
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)  # no figure of a clock matters here
    return Workbench(
        Path(shutil.copytree(workshop, tmp_path / "workshop")), Path(shutil.copytree(finished[0], tmp_path / "cache"))
    )


class At(SilentProgress):
    """Does something when a stage begins."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self._name, self._do = name, do

    def stage(self, name: str, detail: str = "") -> None:
        if name == self._name:
            self._do()


# A validator that is dead


def test_a_parity_check_that_compares_a_wrong_model_with_itself(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides have their outputs exchanged, so parity is perfect; the accuracy that torch had is not."""

    def exchanged(folder: Path, *, labels: tuple[str, ...] | None = None) -> Any:
        model = load_torch(folder, labels=labels)
        model.classifier.weight.data = model.classifier.weight.data.flip(0)
        model.classifier.bias.data = model.classifier.bias.data.flip(0)
        return model

    bench.forget("convert", "evaluate")
    monkeypatch.setattr(stages.source, "load_torch", exchanged)
    with pytest.raises(
        PromiseBroken, match=r"converted model: is right on 0\.0\d+ of the validation rows, torch was"
    ) as caught:
        bench.export()
    assert (caught.value.promise, bench.shipped) == ("parity", [])


def test_a_parity_check_without_rows_or_answers() -> None:
    def gone(batch: Sample) -> Any:
        return None

    batch = {"input_ids": np.ones((2, 4), dtype=np.int64)}
    for batches in ([], [([0, 1], batch)]):
        with pytest.raises(PromiseBroken) as caught:
            verify.check_parity("raw", gone, gone, batches)
        assert caught.value.promise == "parity"


def test_an_evaluation_that_crashes(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("validator")

    bench.forget("evaluate")
    monkeypatch.setattr(evaluate, "answers", crash)
    with pytest.raises(AiosEdgeError, match=r"stage evaluate: ended with ZeroDivisionError \(validator\)"):
        bench.export()
    assert bench.shipped == []


@pytest.mark.parametrize("nothing", [np.empty((0, 2), np.float32), np.full((200, 2), np.nan, np.float32)])
def test_an_evaluation_that_gives_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, nothing: np.ndarray
) -> None:
    bench.forget("evaluate")
    monkeypatch.setattr(evaluate, "answers", lambda *_, **__: nothing)
    with pytest.raises(PromiseBroken, match="so nothing can be compared with them") as caught:
        bench.export()
    assert (caught.value.promise, bench.shipped) == ("reference", [])


def test_an_evaluation_that_repeats_the_reference(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate agrees with fp32 in every bit; the model that would ship doesn't."""
    real, first = evaluate.answers, {}

    def repeated(session: Any, samples: list[Sample], **more: Any) -> Any:
        key = samples[0]["input_ids"].tobytes()
        if key not in first:
            first[key] = real(session, samples, **more)
        return first[key]

    bench.forget("evaluate")
    monkeypatch.setattr(evaluate, "answers", repeated)
    with pytest.raises(PromiseBroken, match="dynamic-s8 as it would ship doesn't answer validation row") as caught:
        bench.export()
    assert (caught.value.promise, bench.shipped) == ("golden", [])


# A figure that is missing


def test_a_candidate_without_accuracy_is_not_chosen(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = evaluate.answers, []

    def second_fails(session: Any, samples: list[Sample], **more: Any) -> Any:
        calls.append(session)
        found = real(session, samples, **more)
        return found * np.nan if len(calls) == 2 else found  # after the baseline

    bench.forget("evaluate")
    monkeypatch.setattr(evaluate, "answers", second_fails)
    profile = bench.export().profiles[RPI5]
    assert profile.chosen == "fp32"
    assert profile.candidates[0].reason.startswith("has no accuracy measured")
    assert profile.candidates[0].not_measured == "the outputs are not finite"


# Drift between what was evaluated and what ships


def change_vocabulary(document: dict[str, Any]) -> None:
    words = document["model"]["vocab"]
    words["great"], words["awful"] = words["awful"], words["great"]


def change_normalizer(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Replace", "pattern": {"String": "great"}, "content": "awful"}


@pytest.mark.parametrize("change", [change_vocabulary, change_normalizer])
def test_a_tokenizer_that_drifts_after_the_evaluation(
    bench: Workbench, finished: tuple[Path, ExportReport], change: Callable[[dict[str, Any]], None]
) -> None:
    (path,) = bench.cache.glob("tokenizer/*/tokenizer.json")

    def drift() -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    with pytest.raises(
        PromiseBroken, match=r"the tokenizer that would ship splits validation row \d+ otherwise"
    ) as caught:
        bench.export(progress=At("bundle", drift))
    assert (caught.value.promise, bench.shipped) == ("tokenizer", [])
    assert json.loads((bench.out / "report.json").read_bytes())["error"] in str(caught.value)
    report = bench.export()  # the same command again: what was altered is built anew
    assert report.profiles[RPI5].bundle_id == finished[1].profiles[RPI5].bundle_id
    assert [text.split(" was damaged")[0].split("/")[0] for text in report.warnings] == ["the kept result tokenizer"]
    assert report.stages["built"] == (f"tokenizer/{path.parent.name}",)


def test_a_model_that_is_exchanged_after_the_evaluation(bench: Workbench) -> None:
    def exchange() -> None:
        for data in bench.cache.glob("quantize/*/model.onnx.data"):
            content = bytearray(data.read_bytes())
            content[: len(content) // 2] = bytes(len(content) // 2)
            data.write_bytes(content)

    with pytest.raises(PromiseBroken, match="doesn't answer validation row") as caught:
        bench.export(progress=At("bundle", exchange))
    assert (caught.value.promise, bench.shipped) == ("golden", [])


# What makes a model slow, or useless on its device, while its answers stay right


def test_a_graph_that_lost_its_fused_layers(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused one was counted when it was converted; then another one is taken."""
    bench.forget("quantize", "evaluate")
    monkeypatch.setattr(quantize, "_best_graph", lambda folder: folder / convert.STANDARD)
    with pytest.raises(PromiseBroken, match="quantize: the graph optimizer fused attention 0 of 2") as caught:
        bench.export()
    assert (caught.value.promise, caught.value.exit_code, bench.shipped) == ("fusion", 3, [])
    assert all(f"layer.{layer}/attention/self/Softmax' (layer {layer})" in str(caught.value) for layer in (0, 1))


@pytest.mark.parametrize(
    ("piece", "lost"),
    [
        ("/model/bert/encoder/layer.1/attention/self/Softmax", "attention 1 of 2"),
        ("/model/bert/encoder/layer.0/intermediate/intermediate_act_fn/Erf", "GELU 1 of 2"),
    ],
)
@pytest.mark.parametrize("step", ["convert", "quantize"])
def test_a_layer_that_was_not_fused_is_named(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str, piece: str, lost: str
) -> None:
    """Its node is read by one that no pattern knows; the answers are the same."""
    from onnx import helper

    real = ort.fuse_bert

    def hampered(source: Path, out: Path, **more: Any) -> None:
        model = graph.load(source)
        at, node = next((at, node) for at, node in enumerate(model.graph.node) if node.name == piece)
        output, node.output[0] = node.output[0], "apart"
        model.graph.node.insert(at + 1, helper.make_node("Neg", ["apart"], ["negative"]))
        model.graph.node.insert(at + 2, helper.make_node("Neg", ["negative"], [output]))
        steps.save(model, out.with_name("hampered.onnx"))
        real(out.with_name("hampered.onnx"), out, **more)

    monkeypatch.setattr(ort, "fuse_bert", hampered)
    if step == "quantize":  # the first check is dead
        check = graph.check_fusion
        monkeypatch.setattr(graph, "check_fusion", lambda m, **more: more["where"] == "convert" or check(m, **more))
    bench.forget("convert", "quantize", "evaluate")
    layer = re.search(r"layer\.(\d)", piece)
    assert layer
    with pytest.raises(PromiseBroken) as caught:
        bench.export()
    assert f"{step}: the graph optimizer fused {lost}; left: '{piece}' (layer {layer[1]})." in str(caught.value)
    assert (caught.value.promise, caught.value.exit_code, bench.shipped) == ("fusion", 3, [])


def test_integer_products_that_fall_apart(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ("DynamicQuantizeMatMulFusion", "MatMulIntegerToFloatFusion")
    bench.forget("quantize", "evaluate")
    monkeypatch.setattr(ort, "optimize_offline", partial(ort.optimize_offline, apart=lost))
    with pytest.raises(PromiseBroken, match=r"quantize: 2 of 10 products .* not '/model/bert/.*MatMul'") as caught:
        bench.export()
    assert (caught.value.promise, caught.value.exit_code, bench.shipped) == ("fusion", 3, [])


def test_a_zero_point_that_the_device_refuses(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one in a single tensor: here the answers hardly move, TensorRT takes none of it."""
    from onnx import numpy_helper

    real = qdq.quantize

    def shifted(model: Any, ranges: Any, scheme: Any, form: qdq.Form) -> int:
        count = real(model, ranges, scheme, form)
        if form == "qdq":
            name = next(node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear")
            (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(1, dtype=np.int8), name))
        return count

    monkeypatch.setattr(qdq, "quantize", shifted)
    with pytest.raises(PromiseBroken, match="has a zero point other than 0, which TensorRT refuses") as caught:
        bench.export("jetson-orin-nano")
    assert (caught.value.promise, caught.value.exit_code, bench.shipped) == ("symmetric", 3, [])


# Calibration


def garbage(count: int) -> list[Sample]:
    chance = np.random.default_rng(0)
    rows = [chance.integers(0, 50, (1, 32)) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0} for ids in rows]


def poison(bench: Workbench, monkeypatch: pytest.MonkeyPatch, scale: float) -> DeviceProfile:
    """Rows of random tokens calibrate, and activations of the first of them are beyond all reason."""
    real, build = ort.activations, quantize.build

    def poisoned(model: Any, names: list[str], samples: list[Sample]) -> Iterator[list[np.ndarray]]:
        for number, arrays in enumerate(real(model, names, samples)):
            yield [array * np.float32(scale) for array in arrays] if number == 0 else arrays

    bench.forget("quantize", "evaluate")
    monkeypatch.setattr(ort, "activations", poisoned)

    def misled(plan: Any, folder: Path, rows: Rows, work: Path) -> Any:
        return build(plan, folder, replace(rows, calibration=garbage(len(rows.calibration))), work)

    monkeypatch.setattr(quantize, "build", misled)
    preferred = ("dynamic-s8", "qdq-s8-sym", "fp32")
    return msgspec.structs.replace(load_profile(RPI5), precision_preference=preferred)


@pytest.mark.parametrize("scale", [np.inf, np.nan], ids=["infinite", "nan"])
def test_calibration_without_end_stops_the_export(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    with pytest.raises(PromiseBroken, match="NaN or infinite") as caught:
        bench.export(poison(bench, monkeypatch, scale))
    assert (caught.value.promise, bench.shipped) == ("calibration", [])


@pytest.mark.parametrize("scale", [1.0, 1e6], ids=["garbage", "outliers"])
def test_poisoned_calibration_never_ships_a_worse_model(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    report = bench.export(poison(bench, monkeypatch, scale))
    for candidate in report.profiles[RPI5].candidates:
        kept = candidate.drop is not None and candidate.drop.value <= 0.01 and (candidate.agreement or 0) >= 0.9
        assert kept or (not candidate.chosen and candidate.reason), candidate
    chosen = next(c for c in report.profiles[RPI5].candidates if c.chosen)
    assert chosen.test is not None and chosen.test.metrics is not None and chosen.test.metrics.accuracy > 0.9


def test_ranges_that_calibration_got_wrong_reject_the_candidate(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One activation far beyond the others makes the fixed scale of a tensor so coarse that all else becomes 0."""
    real = observe.ranges_of

    def coarse(*args: Any) -> Any:
        return {name: replace(found, low=found.low * 1e3, high=found.high * 1e3) for name, found in real(*args).items()}

    monkeypatch.setattr(observe, "ranges_of", coarse)
    monkeypatch.setattr(sensitivity, "most_harmful", lambda *_: ())  # it would find all of them
    profile = msgspec.structs.replace(load_profile(RPI5), precision_preference=("qdq-s8-sym", "dynamic-s8"))
    report = bench.export(profile)
    poisoned, kept = report.profiles[RPI5].candidates
    assert kept.chosen and not poisoned.chosen
    assert "misses max_drop by" in poisoned.reason or "agrees with fp32 on" in poisoned.reason
    shutil.rmtree(bench.out)
    tight = msgspec.structs.replace(profile.budgets, bundle_size_bytes=1000)
    alone = msgspec.structs.replace(profile, precision_preference=("qdq-s8-sym",), budgets=tight)
    with pytest.raises(
        PromiseBroken, match=r"allow max_drop = 0\.\d+.*raise budgets\.bundle_size_bytes to \d+"
    ) as caught:
        bench.export(alone)
    assert (caught.value.promise, bench.shipped) == ("accuracy_drop", [])


# The test split


def test_a_test_split_that_is_touched_before_the_choice(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def peeks(profile: DeviceProfile, common: Any, _: Any) -> Any:
        return common.data.test.read_once()

    monkeypatch.setattr(pipeline, "hold", peeks)
    with pytest.raises(AiosEdgeError, match="the test split was asked for before the choice was made"):
        bench.export()
    assert bench.shipped == []


def test_rows_of_other_splits_in_the_test_split_are_counted(bench: Workbench) -> None:
    lines = {
        name: (bench.folder / name).read_text(encoding="utf-8").splitlines()
        for name in ("train.csv", "val.csv", "test.csv")
    }
    mixed = [*lines["test.csv"], *lines["val.csv"][1:8], *lines["train.csv"][1:4]]
    (bench.folder / "test.csv").write_text("\n".join(mixed), encoding="utf-8")
    warnings = bench.export().warnings
    assert warnings == (
        "3 of 210 test rows have a text that is in the training data as well",
        "7 of 210 test rows have a text that is in the validation data as well",
    )


# The cache


@pytest.mark.parametrize(
    ("module", "rebuilt"),
    [
        (convert, {"convert", "quantize", "evaluate", "measure"}),
        (first_token, {"convert", "quantize", "evaluate", "measure"}),
        (quantize, {"quantize", "evaluate", "measure"}),
        (evaluate, {"evaluate"}),
        (measure, {"measure"}),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_changed_code_never_meets_an_old_result(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, rebuilt: set[str]
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text(Path(module.__file__).read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert {entry.split("/")[0] for entry in bench.export().stages["built"]} == rebuilt


def test_a_changed_tool_never_meets_an_old_result(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    version = stages.importlib.metadata.version
    monkeypatch.setattr(
        stages.importlib.metadata, "version", lambda name: "9.9" if name == "onnxruntime" else version(name)
    )
    assert bench.export().stages["reused"] == ()


def test_a_second_profile_builds_only_what_the_first_has_not(
    bench: Workbench, finished: tuple[Path, ExportReport]
) -> None:
    """The Jetson takes other precisions, and fp32 as well: two candidates are new, the third and all before are not."""
    first = {*finished[1].stages["built"], *finished[1].stages["reused"]}
    second = bench.export("jetson-orin-nano")
    built = second.stages["built"]
    assert not first & set(built)
    count = {name: sum(entry.startswith(f"{name}/") for entry in built) for name in ("quantize", "measure", "evaluate")}
    assert count == {"quantize": 2, "measure": 2, "evaluate": 3}  # two on validation, the chosen one on test
    assert len(built) == 7
    assert {entry.split("/")[0] for entry in second.stages["reused"]} >= set(FIRST)
    assert open_bundle(bench.out / "jetson-orin-nano").manifest.provenance.candidate == "fp16"


def test_the_most_memory_that_was_held_is_reported(finished: tuple[Path, ExportReport]) -> None:
    from exporters.memory import peak_rss_bytes

    peak = finished[1].peak_rss_bytes
    assert peak is not None and 100e6 < peak < peak_rss_bytes() + 500e6
