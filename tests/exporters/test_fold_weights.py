"""Weights behind QuantizeLinear are stored as the integers that onnxruntime would compute, and answer the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from exporters import first_token, graph
from exporters.fold_weights import fold_weights, integer_products
from exporters.scheme import REDUCED_LEVELS

pytestmark = pytest.mark.export

WIDE, NARROW, TOKENS = 24, 8, 5


def simulated(*, second_reader: bool = False, gemm: bool = False) -> Any:
    """As torch exports a linear layer: u8 activation, fp32 weight [out, in] quantized per channel, then transposed."""
    weight = np.random.default_rng(1).standard_normal((NARROW, WIDE)).astype(np.float32)
    weight[3] *= 40
    scale = (np.abs(weight).max(axis=1) / 127.5).astype(np.float32)
    constants = {
        "w": weight,
        "w_scale": scale,
        "w_zero": np.zeros(NARROW, dtype=np.int8),
        "low": np.asarray(-128, dtype=np.int8),
        "high": np.asarray(127, dtype=np.int8),
        "x_scale": np.asarray(0.03, dtype=np.float32),
        "x_zero": np.asarray(120, dtype=np.uint8),
        "bias": np.linspace(-1, 1, NARROW, dtype=np.float32),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["w_q"], axis=0),
        node("Clip", ["w_q", "low", "high"], ["w_c"]),
        node("DequantizeLinear", ["w_c", "w_scale", "w_zero"], ["w_d"], axis=0),
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_d"]),
    ]
    if gemm:
        nodes.append(node("Gemm", ["x_d", "w_d", "bias"], ["y"], transB=1))
    else:
        nodes += [
            node("Transpose", ["w_d"], ["w_t"], perm=[1, 0]),
            node("MatMul", ["x_d", "w_t"], ["product"]),
            node("Add", ["product", "bias"], ["y"]),
        ]
    outputs = ["y"]
    if second_reader:
        nodes.append(node("Abs", ["w_c"], ["seen"]))
        outputs.append("seen")
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", WIDE])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT if name == "y" else TensorProto.INT8, None)
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answer(model: Any) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((TOKENS, WIDE)).astype(np.float32)
    return session.run(["y"], {"x": x})[0]


def weight_of(model: Any) -> np.ndarray:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("/s8"))
    return numpy_helper.to_array(tensor)


def test_the_integers_are_those_that_onnxruntime_computes() -> None:
    model = simulated()
    wanted = answer(model)
    assert integer_products(model) == 0
    assert fold_weights(model) == 1
    assert integer_products(model) == 1
    assert weight_of(model).dtype == np.int8 and weight_of(model).shape == (WIDE, NARROW)
    assert np.array_equal(answer(model), wanted)
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 1  # the activation's
    assert "w" not in {tensor.name for tensor in model.graph.initializer}


def test_seven_bits_have_scales_of_their_own() -> None:
    model = simulated()
    wanted = answer(model)
    assert fold_weights(model, levels=REDUCED_LEVELS) == 1
    assert (np.abs(weight_of(model)).max(axis=0) == REDUCED_LEVELS).all()
    error = (answer(model) - wanted).std(axis=0) / wanted.std(axis=0)
    assert 0 < error.max() < 0.05


def test_what_somebody_else_reads_stays() -> None:
    model = simulated(second_reader=True)
    before = model.SerializeToString()
    assert fold_weights(model) == 0
    assert model.SerializeToString() == before


def test_a_gemm_becomes_a_product_that_has_an_8_bit_kernel() -> None:
    model = simulated(gemm=True)
    wanted = answer(model)
    assert graph.split_gemms(model) == 1
    assert fold_weights(model) == 1
    assert integer_products(model) == 1
    assert np.allclose(answer(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "passed"), [(0.1, 3), ([0.1, 0.2, 0.3, 0.4], 1)], ids=["one", "per channel"])
def test_one_token_is_read_before_a_quantizer_with_one_scale(scale: Any, passed: int) -> None:
    """x [b, s, 4] -> Quantize -> Dequantize -> Tanh -> one token. A scale per channel would need another axis."""
    array = np.asarray(scale, dtype=np.float32)
    constants = {"scale": array, "zero": np.zeros_like(array, dtype=np.uint8), "first": np.asarray(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=2),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], axis=2),
        helper.make_node("Tanh", ["d"], ["t"]),
        helper.make_node("Gather", ["t", "first"], ["y"], axis=1),
    ]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 4])
    known = helper.make_tensor_value_info("d", TensorProto.FLOAT, ["b", "s", 4])  # torch's newer exporter writes shapes
    made = helper.make_graph(
        nodes,
        "g",
        [shape],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[known],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)

    def run() -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["y"], {"x": x})[0]

    wanted = run()
    assert first_token.read_first(model) == passed
    assert np.array_equal(run(), wanted)
    shape_inference.infer_shapes(model, strict_mode=True)  # raises where a shape isn't true any more
