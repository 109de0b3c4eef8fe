"""Every product that is quantized runs in one operator on integers; what stays in float or falls apart is loud."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime.quantization
import pytest

from aios_edge.errors import PromiseBroken
from exporters import convert, graph, ort, prune, qdq, quantize, tables
from exporters.plans import Plan
from exporters.prune import Importance
from exporters.quantize import Built, Rows
from exporters.source import load_torch
from exporters.structure import Structure

pytestmark = pytest.mark.export
TokenRows = Callable[[int, int], list[dict[str, np.ndarray]]]
PLANS = {
    "dynamic-s8": Plan(name="dynamic-s8", precision="dynamic-s8"),
    "dynamic-s8-r7": Plan(name="dynamic-s8-r7", precision="dynamic-s8", reduce_range=True),
    "dynamic-s8-e4": Plan(name="dynamic-s8-e4", precision="dynamic-s8", rare_row_bits=4),
    "dynamic-s8-e2": Plan(name="dynamic-s8-e2", precision="dynamic-s8", rare_row_bits=2),
    "qdq-u8s8": Plan(name="qdq-u8s8", precision="qdq-u8s8"),
}
PRODUCTS = 2 * 4 + 2  # the fused attention and three more of each layer, pooler and classifier
OUTPUT = "/model/bert/encoder/layer.0/output/dense/MatMul"


@pytest.fixture(scope="module")
def pruned(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_torch(workshop / "tiny", labels=("negative", "positive"))
    joined, neurons = (np.eye(count, dtype=np.float32) for count in (65, 129))
    found = Importance(np.ones((2, 4)), np.ones((2, 128)), [joined] * 2, [neurons] * 2)
    prune.prune(model, Structure(layers=2, heads=2, ffn=64, vocabulary=46), found)
    folder = tmp_path_factory.mktemp("pruned")
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    convert.save_converted(convert.convert(model, inputs, folder), folder)
    return folder


@pytest.fixture(params=["whole", "pruned"])
def network(request: pytest.FixtureRequest, converted: Path, pruned: Path) -> Path:
    return converted if request.param == "whole" else pruned


@pytest.fixture
def build(token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Built]:
    monkeypatch.setattr(tables, "LEAST_ENTRIES", 1)  # or the table of a tiny model would not be worth it
    rows = token_rows(16, 1)
    counts = {"input_ids": np.bincount(np.concatenate([row["input_ids"][0] for row in rows]), minlength=46)}

    def made(name: str, folder: Path) -> Built:
        return quantize.build(PLANS[name], folder, Rows(calibration=rows, trial=rows, counts=counts), tmp_path)

    return made


@pytest.mark.parametrize("name", PLANS)
def test_all_products_run_on_integers(name: str, network: Path, build: Callable[[str, Path], Built]) -> None:
    built = build(name, network)
    found = built.operators
    assert built.rare_row_bits == PLANS[name].rare_row_bits
    assert sum(found.get(operator, 0) for operator in graph._INTEGER) == PRODUCTS
    assert not {"MatMul", "Gemm", "Attention", "MatMulInteger"} & found.keys()
    if name in ("dynamic-s8-e4", "dynamic-s8-e2"):
        assert ("BitShift" in found) == (name == "dynamic-s8-e4")


@pytest.mark.parametrize("name", PLANS)
def test_a_product_that_stays_in_float_is_named(
    name: str, network: Path, build: Callable[[str, Path], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers would be right."""
    real = onnxruntime.quantization.quantize_dynamic
    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", partial(real, nodes_to_exclude=[OUTPUT]))
    written = qdq.quantize

    def without(model: Any, ranges: dict[str, Any], *more: Any) -> int:
        (node,) = (node for node in model.graph.node if node.name == OUTPUT)
        return written(model, {name: found for name, found in ranges.items() if name != node.input[0]}, *more)

    monkeypatch.setattr(qdq, "quantize", without)
    with pytest.raises(PromiseBroken, match=rf"9 of 10 products .* not '{OUTPUT}' \(\w+\)\.") as caught:
        build(name, network)
    assert (caught.value.promise, caught.value.exit_code) == ("fusion", 3)


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("dynamic")])
def test_a_product_that_falls_apart_is_named(
    name: str, network: Path, build: Callable[[str, Path], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an onnxruntime that lost its fusions would leave it."""
    lost = ("DynamicQuantizeMatMulFusion", "MatMulIntegerToFloatFusion")
    monkeypatch.setattr(ort, "optimize_offline", partial(ort.optimize_offline, apart=lost))
    with pytest.raises(PromiseBroken, match=r"2 of 10 products .* \(MatMulInteger\), .* and 5 more\.") as caught:
        build(name, network)
    assert caught.value.promise == "fusion"


@pytest.mark.parametrize(
    ("wanted", "there", "said"),
    [
        ("a b", "a:QAttention c_quant:DynamicQuantizeMatMul b:MatMul", r"1 of 2 products .* not 'b' \(MatMul\)\."),
        ("a b", "a:QAttention c_quant:DynamicQuantizeMatMul", r"1 of 2 products .* not 'b' \(gone\)\."),
        ("a a", "a:QAttention a:MatMul", r"1 of 2 products .* not 'a' \(MatMul\)\."),
    ],
    ids=["in float", "gone", "same name"],
)
def test_another_operator_does_not_stand_in_for_a_lost_product(wanted: str, there: str, said: str) -> None:
    from onnx import helper

    kinds = [entry.split(":") for entry in there.split()]
    nodes = [helper.make_node(operator, ["x"], ["y"], name=name) for name, operator in kinds]
    with pytest.raises(PromiseBroken, match=said):
        graph.check_products(helper.make_model(helper.make_graph(nodes, "g", [], [])), wanted.split(), where="here")


def test_products_with_what_no_input_decides_are_not_asked_for() -> None:
    """They are multiplied once and for all when the graph is optimised."""
    from onnx import helper, numpy_helper

    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("w", "c")]
    nodes = [
        helper.make_node("MatMul", ["c", "w"], ["fixed"], name="fixed"),
        helper.make_node("Add", ["x", "fixed"], ["sum"], name="sum"),
        helper.make_node("MatMul", ["sum", "w"], ["y"], name="computed"),
        helper.make_node("MatMul", ["y", "sum"], ["z"], name="of two"),
    ]
    shapes = [helper.make_tensor_value_info(name, 1, [None, 4]) for name in ("x", "z")]
    assert graph.products(helper.make_model(helper.make_graph(nodes, "g", shapes[:1], shapes[1:], weights))) == [
        "computed"
    ]
