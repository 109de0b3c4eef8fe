"""Embedding tables in 8 bits: a quarter of the size, each channel with its own scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.tables import halve_tables, quantize_tables

pytestmark = pytest.mark.export


def model(table: np.ndarray, *, axis: int = 0, multiplied: bool = False) -> Any:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["found"], axis=axis)]
    if multiplied:
        nodes.append(helper.make_node("MatMul", ["x", "table"], ["y"]))
    outputs = ["found", "y"] if multiplied else ["found"]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", len(table)]))
    made = helper.make_graph(
        nodes,
        "g",
        inputs if multiplied else inputs[:1],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def found(made: Any, ids: list[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["found"], {"ids": np.asarray(ids)})[0]


def test_one_large_entry_costs_its_own_channel_only() -> None:
    table = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)
    table[7, 3] = 100.0
    table[:, 9] = 0.0
    made = model(table)
    assert quantize_tables(made) == (1, 0)
    (weight,) = (tensor for tensor in made.graph.initializer if tensor.name == "table")
    assert weight.data_type == TensorProto.INT8
    ids = [0, 7, 299, 7]
    error = np.abs(found(made, ids) - table[ids])
    step = np.abs(table).max(axis=0) / 127
    assert (error <= step / 2 + 1e-6).all()
    assert error[:, [c for c in range(32) if c != 3]].max() < 0.02
    assert error[1, 3] < 1e-4


@pytest.mark.parametrize(
    ("rows", "options"),
    [(300, {"multiplied": True}), (300, {"axis": 1}), (20, {})],
    ids=["multiplied", "axis", "small"],
)
def test_what_is_no_lookup_of_rows_alone_stays(rows: int, options: dict[str, Any]) -> None:
    made = model(np.ones((rows, 32), dtype=np.float32), **options)
    before = made.SerializeToString()
    assert quantize_tables(made) == (0, 0)
    assert made.SerializeToString() == before


def test_half_the_bits_in_standard_operators() -> None:
    table = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)
    made = model(table)
    assert halve_tables(made) == 1
    assert [node.op_type for node in made.graph.node] == ["Gather", "Cast"]
    np.testing.assert_array_equal(found(made, [0, 7, 299]), table[[0, 7, 299]].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "made",
    [model(np.ones((300, 32), np.float32), multiplied=True), model(np.full((300, 32), 7e4, np.float32))],
    ids=["multiplied", "beyond fp16"],
)
def test_what_fp16_cannot_be_stays(made: Any) -> None:
    assert halve_tables(made) == 0
    assert {tensor.data_type for tensor in made.graph.initializer} == {TensorProto.FLOAT}
