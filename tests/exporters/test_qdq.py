"""Static quantization of a graph: three forms with one answer, only inputs of products, one answer in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from aios_edge.errors import DataError, PromiseBroken
from exporters import convert, graph, observe, ort, qdq, quantize
from exporters.plans import Plan
from exporters.quantize import Rows
from exporters.scheme import Scheme

pytestmark = pytest.mark.export
TokenRows = Callable[[int, int], list[dict[str, np.ndarray]]]
S8 = Scheme(static=True, symmetric=True)
U8 = Scheme(static=True)


def copied(model: Any) -> Any:
    return type(model).FromString(model.SerializeToString())


def quantized(
    folder: Path, rows: list[dict[str, np.ndarray]], name: str, scheme: Scheme, form: qdq.Form
) -> tuple[Any, Any]:
    plain = graph.load(folder / name)
    graph.split_gemms(plain)
    made = copied(plain)
    assert qdq.quantize(made, observe.ranges_of(plain, rows, scheme), scheme, form) >= 8
    return plain, made


@pytest.mark.parametrize(
    ("name", "scheme", "form"),
    [(convert.STANDARD, S8, "qdq"), (convert.FUSED, U8, "integer"), (convert.FUSED, S8, "simulated")],
)
def test_a_quantized_graph_answers_nearly_as_before(
    converted: Path,
    token_rows: TokenRows,
    name: str,
    scheme: Scheme,
    form: qdq.Form,
) -> None:
    plain, made = quantized(converted, token_rows(24, 1), name, scheme, form)
    rows = token_rows(40, 2)
    wanted, found = ort.answers(plain, rows), ort.answers(made, rows)
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize(("name", "scheme", "form"), [(convert.STANDARD, S8, "qdq"), (convert.FUSED, U8, "integer")])
def test_the_trial_form_answers_as_the_shipped_one(
    converted: Path,
    token_rows: TokenRows,
    name: str,
    scheme: Scheme,
    form: qdq.Form,
) -> None:
    rows = token_rows(20, 2)
    shipped, trial = (
        ort.answers(quantized(converted, token_rows(24, 1), name, scheme, f)[1], rows) for f in (form, "simulated")
    )
    assert np.abs(shipped - trial).max() < 2e-2 * np.abs(shipped).max()


def test_only_inputs_of_products_are_quantized(converted: Path, token_rows: TokenRows) -> None:
    plain, made = quantized(converted, token_rows(24, 1), convert.STANDARD, S8, "qdq")
    products = {node.output[0] for node in plain.graph.node if node.op_type == "MatMul"}
    read = {node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert read and not read & products
    graph.check_zero_points(made)


def test_biases_and_heads_go_into_the_integer_operators(converted: Path, token_rows: TokenRows) -> None:
    _, made = quantized(converted, token_rows(24, 1), convert.FUSED, U8, "integer")
    nodes = [node for node in made.graph.node if node.op_type == "MatMulIntegerToFloat"]
    heads = [node for node in nodes if len(node.input) == 7]
    assert len(heads) >= 4  # attention output and feed forward output of each layer, pooler, classifier
    assert not any(node.op_type in ("Gemm", "MatMul", "Attention") for node in made.graph.node)


@pytest.mark.parametrize(("name", "most"), [("qdq-u8s8", 127), ("qdq-u8s8-r7", 64), ("dynamic-s8-r7", 64)])
def test_reduced_weights_stay_within_seven_bits(
    converted: Path, token_rows: TokenRows, tmp_path: Path, name: str, most: int
) -> None:
    rows = token_rows(24, 1)
    plan = Plan(name=name, precision="dynamic-s8" if "dynamic" in name else "qdq-u8s8", reduce_range="r7" in name)
    built = quantize.build(plan, converted, Rows(calibration=rows, trial=rows), tmp_path)
    assert built.operators["QAttention"] == 2
    model = graph.load(tmp_path / graph.MODEL)
    products = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    largest = [
        int(np.abs(numpy_helper.to_array(tensor).astype(int)).max())
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2 and tensor.name in products
    ]
    assert len(largest) >= 8 and set(largest) == {most}


def test_an_answer_does_not_depend_on_batch_mates(converted: Path, token_rows: TokenRows) -> None:
    _, made = quantized(converted, token_rows(24, 1), convert.FUSED, U8, "integer")
    rows = [row for row in token_rows(200, 3) if row["input_ids"].shape[1] == 9][:4]
    together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert len(rows) == 4
    assert np.abs(ort.answers(made, [together]) - ort.answers(made, rows)).max() < 1e-5


def test_a_gemm_becomes_a_product_and_a_sum() -> None:
    chance = np.random.default_rng(0)
    weight, bias = chance.standard_normal((4, 8)).astype(np.float32), np.arange(4, dtype=np.float32)
    shape = [helper.make_tensor_value_info(*entry) for entry in (("x", 1, [None, 8]), ("y", 1, [None, 4]))]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="head", transB=1)
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    made = helper.make_graph([node], "g", shape[:1], shape[1:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    rows = [{"x": chance.standard_normal((1, 8)).astype(np.float32)} for _ in range(3)]
    wanted = ort.answers(model, rows)
    assert graph.split_gemms(model) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert np.allclose(ort.answers(model, rows), wanted, atol=1e-5)
    assert graph.split_gemms(model) == 0


def test_grams_are_those_of_all_tokens_in_one_pass_or_many(
    converted: Path, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = graph.load(converted / convert.FUSED), token_rows(12, 1)
    names = list(observe.products(model))
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for arrays in ort.activations(model, names, rows):
        for name, array in zip(names, arrays, strict=True):
            tokens[name].append(array.reshape(-1, array.shape[-1]))
    wanted = {name: np.concatenate(found).T @ np.concatenate(found) for name, found in tokens.items()}
    for bytes_at_once, tokens_at_once in ((256_000_000, 512), (1, 512), (20_000, 20)):
        monkeypatch.setattr(observe, "_GRAM_BYTES", bytes_at_once)
        monkeypatch.setattr(observe, "_TOKENS", tokens_at_once)
        found = dict(observe.grams(model, names, rows))
        assert found.keys() == wanted.keys()
        assert all(np.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-3) for name in names)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_calibration_is_exit_3_and_names_the_activation(
    converted: Path, token_rows: TokenRows, value: float
) -> None:
    model = graph.load(converted / convert.FUSED)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("word_embeddings.weight"))
    entries = numpy_helper.to_array(table).copy()
    entries[entries.shape[0] - 1 :] = value
    table.CopyFrom(numpy_helper.from_array(entries, table.name))
    rows = token_rows(12, 1)
    rows[7]["input_ids"] = np.full_like(rows[7]["input_ids"], len(entries) - 1)
    for passing in (observe.channels, lambda m, r: observe.ranges_of(m, r, U8)):
        with pytest.raises(PromiseBroken, match=r"sample 8 of 12 makes activation '.*' NaN or infinite") as caught:
            passing(model, rows)
        assert (caught.value.promise, caught.value.exit_code) == ("calibration", 3)


def test_one_row_is_enough_for_dynamic_ranges_only(token_rows: TokenRows) -> None:
    one = token_rows(1, 1)
    observe.check_samples(one, Scheme())
    with pytest.raises(DataError, match=r"1 different calibration samples, this quantization needs at least 8"):
        observe.check_samples(one * 128, U8)
    with pytest.raises(DataError, match="has 0 different"):
        observe.check_samples([], Scheme())
