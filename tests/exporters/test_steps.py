"""Graphs on the way to a candidate, with their weights beside them as a model of more than 2 GB needs it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import convert, graph, ort, quantize, source, steps
from exporters.plans import Plan
from exporters.quantize import Rows

pytestmark = pytest.mark.export

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PLANS = (
    Plan("fp32", "fp32"),
    Plan("fp16", "fp16"),
    Plan("dynamic-s8", "dynamic-s8"),
    Plan("dynamic-s8-e4", "dynamic-s8", rare_row_bits=4),
    Plan("qdq-s8-sym", "qdq-s8-sym"),
)


def samples(count: int = 10) -> list[dict[str, np.ndarray]]:
    chance = np.random.default_rng(0)
    found = []
    for length in chance.integers(4, 20, count):
        ids = chance.integers(0, 40, (1, length))
        found.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    return found


def built(workshop: Path, work: Path) -> dict[str, Any]:
    """The answers of every graph and candidate, by its name."""
    converted = work / "converted"
    converted.mkdir(parents=True)
    model = source.load_torch(workshop / "tiny")
    convert.save_converted(convert.convert(model, INPUTS, converted), converted)
    answers = {name: run(converted / name, ort.DEFAULT_SPEC) for name in convert.GRAPHS}
    for plan in PLANS:
        folder = work / plan.name
        folder.mkdir()
        made = quantize.build(plan, converted, Rows(calibration=samples(), trial=samples()), folder)
        assert sorted(path.name for path in folder.iterdir()) == ["candidate.json", *sorted(graph.model_files(folder))]
        answers[plan.name] = run(folder / graph.MODEL, made.session)
    return answers


def run(model: Path, spec: Any) -> np.ndarray:
    session = ort.Session(model, spec)
    return np.concatenate([session.run(sample) for sample in samples()])


def test_a_large_model_takes_the_same_way(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = built(workshop, tmp_path / "whole")
    monkeypatch.setattr(steps, "APART_FROM_BYTES", 10_000)
    apart = built(workshop, tmp_path / "apart")
    for name in convert.GRAPHS:
        assert not steps.lies_apart(tmp_path / "whole" / "converted" / name)
        graph_file = tmp_path / "apart" / "converted" / name
        assert steps.lies_apart(graph_file) and graph_file.stat().st_size < 60_000
        assert steps.size_bytes(graph_file) > 250_000
    for name, answers in whole.items():
        assert np.allclose(apart[name], answers, atol=1e-5), name
    for plan in PLANS:
        sizes = [graph.size_bytes(tmp_path / way / plan.name) for way in ("apart", "whole")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def tiny() -> Any:
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(3, dtype=np.float32), "small")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="us")


def check_same(loaded: Any) -> None:
    """As tiny made it, but for the mark where the weights were."""
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
    assert loaded == tiny()


def test_the_model_stays_as_it_is_and_a_step_replaces_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "APART_FROM_BYTES", 10_000)
    model, path = tiny(), tmp_path / "step.onnx"
    for _ in range(2):
        steps.save(model, path)
        assert steps.beside(path).stat().st_size == 64 * 64 * 4
    assert model == tiny()
    check_same(graph.load(path))
    monkeypatch.undo()
    steps.save(model, path)
    assert not steps.lies_apart(path) and graph.load(path) == model
    steps.remove(path)
    assert not list(tmp_path.iterdir())


def test_files_that_torch_scatters_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw.onnx"
    onnx.save_model(tiny(), str(path), save_as_external_data=True, all_tensors_to_one_file=False)
    assert (tmp_path / "w").is_file()
    monkeypatch.setattr(steps, "APART_FROM_BYTES", 10_000)
    steps.settle(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["raw.onnx", "raw.onnx.data"]
    check_same(graph.load(path))


def test_shapes_are_inferred_without_weights() -> None:
    bare = steps.without_weights(tiny())
    assert bare.ByteSize() < 400
    (found,) = onnx.shape_inference.infer_shapes(bare).graph.output
    assert len(found.type.tensor_type.shape.dim) == 2


def test_weights_come_back_in_the_type_that_their_place_has_now() -> None:
    model, weight = tiny(), np.linspace(-1e6, 1e6, 4096, dtype=np.float32).reshape(64, 64)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    bare = steps.without_weights(model)
    assert steps.with_weights(steps.without_weights(model), model).graph.initializer[1] == model.graph.initializer[0]
    next(entry for entry in bare.graph.input if entry.name == "w").type.tensor_type.elem_type = TensorProto.FLOAT16
    made = steps.with_weights(bare, model)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert [entry.name for entry in made.graph.input] == ["x"]
    assert found["w"].dtype == np.float16 and found["small"].dtype == np.float32
    assert np.array_equal(found["w"], np.clip(weight, -65504, 65504).astype(np.float16))  # and nothing infinite


def test_fp16_needs_no_message_of_the_whole_model(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.transformers import float16

    model = graph.load(converted / convert.STANDARD)

    def infer(graph_only: Any) -> Any:
        assert graph_only.ByteSize() < model.ByteSize() / 4, "beyond 2 GB this ends in an error of protobuf"
        return onnx.shape_inference.infer_shapes(graph_only)

    monkeypatch.setattr(float16, "infer_shapes", infer)
    halves = ort.to_float16(model)
    large = [tensor for tensor in halves.graph.initializer if np.prod(tensor.dims) > 1024]
    assert large and {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}
    assert [entry.name for entry in halves.graph.input] == list(INPUTS)


def models() -> set[int]:
    return {id(kept) for kept in gc.get_objects() if type(kept) is onnx.ModelProto}


def test_a_large_model_is_gone_when_it_was_converted(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "APART_FROM_BYTES", 10_000)
    model = source.load_torch(workshop / "tiny")
    weights = weakref.ref(model)
    gc.collect()
    others = models()  # that other tests hold
    gc.disable()  # what hangs in a cycle stays until enough small objects were made, whatever it holds
    try:
        convert.convert(model, INPUTS, tmp_path)
        del model
        assert weights() is None
        assert models() <= others
    finally:
        gc.enable()
