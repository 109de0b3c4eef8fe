"""Equalized products answer the same before quantization, and lose less by it where a channel stands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporters import convert, equalize, graph, observe, ort, steps
from exporters.equalize import Seen, choose_factors
from exporters.scheme import Scheme

pytestmark = pytest.mark.export
TokenRows = Callable[[int, int], list[dict[str, np.ndarray]]]


def answers(model: Any, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, row)[0] for row in rows])


@pytest.mark.parametrize("name", [convert.FUSED, convert.STANDARD])
def test_the_answers_stay_the_same(converted: Path, token_rows: TokenRows, name: str) -> None:
    plain, equal = graph.load(converted / name), graph.load(converted / name)
    assert equalize.equalize(equal, observe.channels(equal, token_rows(24, 1)), Scheme()) >= 3
    rows = token_rows(40, 2)
    wanted = answers(plain, rows)
    assert np.abs(answers(equal, rows) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_product_loses_less_by_quantization(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    weight = chance.standard_normal((32, 16)).astype(np.float32)
    weight[7] /= 30
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None]) for name in "xy"]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    made = helper.make_graph([product], "g", shape[:1], shape[1:], [numpy_helper.from_array(weight, "w")])
    plain = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    equal = type(plain).FromString(plain.SerializeToString())
    tokens = chance.standard_normal((40, 1, 12, 32)).astype(np.float32)
    tokens[..., 7] *= 30
    rows = [{"x": part} for part in tokens]
    assert equalize.equalize(equal, observe.channels(equal, rows[:20]), Scheme()) == 1
    wanted, losses = answers(plain, rows[20:]), []
    for model in (plain, equal):
        steps.save(model, tmp_path / "in.onnx")
        ort.quantize_dynamic_s8(tmp_path / "in.onnx", tmp_path / "out.onnx", operators=("MatMul",), reduce_range=False)
        losses.append(float(np.mean((answers(graph.load(tmp_path / "out.onnx"), rows[20:]) - wanted) ** 2)))
    assert losses[1] < losses[0] / 10


def test_behind_an_attention_it_costs_no_operator(converted: Path, token_rows: TokenRows) -> None:
    model = graph.load(converted / convert.FUSED)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    attended = {node.output[0] for node in model.graph.node if node.op_type == "Attention"}
    rows, behind = token_rows(24, 1), {}
    for name, found in observe.channels(model, rows).items():
        if name.split("/read_for/")[0] not in attended:
            continue
        (node,) = equalize.products(model)[name]
        weight = numpy_helper.to_array(weights[node.input[1]]).copy()
        weight[3] /= 50
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(weight, node.input[1]))
        behind[name] = replace(found, high=found.high * np.where(np.arange(found.high.shape[1]) == 3, 50, 1))
    assert len(behind) == 2  # the last one behind the read of one token
    before, wanted = [node.op_type for node in model.graph.node], answers(model, rows)
    assert equalize.equalize(model, behind, Scheme()) == 2
    assert [node.op_type for node in model.graph.node] == before
    assert np.abs(answers(model, rows) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_weight_that_two_products_share_stays(converted: Path) -> None:
    model = graph.load(converted / convert.FUSED)
    first, second = (node for node in model.graph.node if node.op_type == "MatMul" and "attention/output" in node.name)
    assert first.input[0] in equalize.products(model)
    second.input[1] = first.input[1]
    assert first.input[0] not in equalize.products(model)


def seen_of(rows: np.ndarray) -> Seen:
    return Seen.joined([Seen.of(part) for part in np.array_split(rows.astype(np.float32), 4)])


def test_joined_samples_keep_their_own_ranges() -> None:
    rows = np.arange(48, dtype=np.float32).reshape(16, 3)
    seen = seen_of(rows)
    assert seen.low[:, 0].tolist() == [0, 12, 24, 36]
    assert all(low <= row <= high for row, low, high in zip(
        seen.rows[:, 0], seen.low[seen.sample, 0], seen.high[seen.sample, 0], strict=True
    ))  # fmt: skip


SCHEMES = [Scheme(), Scheme(weight_levels=64), Scheme(static=True), Scheme(static=True, symmetric=True)]


@given(st.integers(0, 1000), st.sampled_from(SCHEMES), st.booleans())
@settings(max_examples=40, deadline=None)
def test_factors_never_enlarge_and_are_one_where_nothing_stands_out(seed: int, scheme: Scheme, free: bool) -> None:
    chance = np.random.default_rng(seed)
    # Uniform: of normal values one may stand out by chance, and then a factor is right.
    rows, weight = chance.uniform(-2, 2, (64, 32)), chance.standard_normal((32, 16)).astype(np.float32)
    plain = choose_factors(seen_of(rows), weight, scheme=scheme, free=False)
    assert (plain == 1).all()
    rows[:, 7] *= 60
    weight[7] /= 60
    found = choose_factors(seen_of(rows), weight, scheme=scheme, free=free)
    assert found.shape == (32,) and np.isfinite(found).all() and (found >= 1).all()
    assert found.argmax() == 7 and found[7] > 5


def test_an_activation_of_zeros_is_left_alone() -> None:
    weight = np.ones((8, 4), dtype=np.float32)
    assert (choose_factors(seen_of(np.zeros((16, 8))), weight, scheme=Scheme(), free=True) == 1).all()


def test_a_model_without_a_product_of_constants_has_nothing_to_observe() -> None:
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    made = helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "g", shape[:1], shape[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert observe.channels(model, [{"x": np.ones((1, 4), dtype=np.float32)}]) == {}
