"""What lies behind the last attention is computed for the one token that is read, and the answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from exporters import convert, first_token, graph
from exporters.source import load_torch

pytestmark = pytest.mark.export
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def answers(model: Any, feeds: dict[str, Any]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(4, 40, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(scope="module")
def converted(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_torch(workshop / "tiny", labels=("negative", "positive"))
    for weight in model.parameters():
        weight.data *= 6 if weight.dim() > 1 else 1
    folder = tmp_path_factory.mktemp("converted")
    convert.convert(model, INPUTS, folder)
    return folder


def test_the_whole_end_of_the_last_layer_is_passed(converted: Path) -> None:
    assert first_token.read_first(graph.load(converted / convert.RAW)) >= 10
    assert first_token.read_first(graph.load(converted / convert.STANDARD)) == 0  # nothing is left to pass


@pytest.mark.parametrize("name", [convert.STANDARD, convert.FUSED])
def test_the_last_layer_sees_one_token_and_answers_the_same(converted: Path, name: str) -> None:
    model = graph.load(converted / name)
    norms = [node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"]
    for output in norms[-2:]:  # the last layer's, and they come out without a token axis
        model.graph.output.extend([type(model.graph.output[0])(name=output)])
    raw = graph.load(converted / convert.RAW)
    for batch, length in ((1, 9), (3, 20)):
        wanted = answers(raw, feeds(batch, length))[0]
        seen, *normed = answers(model, feeds(batch, length))
        assert np.abs(seen - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
        assert [array.shape for array in normed] == [(batch, 64), (batch, 64)]


def test_what_somebody_else_reads_whole_stays_whole(converted: Path) -> None:
    raw = graph.load(converted / convert.RAW)
    last = [node.output[0] for node in raw.graph.node if node.op_type == "LayerNormalization"][-1]
    raw.graph.output.extend([type(raw.graph.output[0])(name=last)])
    before = raw.SerializeToString()
    assert first_token.read_first(raw) == 0
    assert raw.SerializeToString() == before


def hand_made(*, bias: list[int], axis: int = 2) -> Any:
    """x [b, s, 4] -> LayerNormalization -> Add(Identity(bias)) -> Gather one token."""
    from onnx import TensorProto, helper, numpy_helper

    def weight(name: str, shape: list[int]) -> Any:
        return numpy_helper.from_array(np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape), name)

    nodes = [
        helper.make_node("Identity", ["bias"], ["shared"]),
        helper.make_node("LayerNormalization", ["x", "scale"], ["n"], axis=axis),
        helper.make_node("Add", ["n", "shared"], ["a"]),
        helper.make_node("Gather", ["a", "zero"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    zero = numpy_helper.from_array(np.asarray(0, dtype=np.int64), "zero")
    made = helper.make_graph(nodes, "g", [x], [y], [weight("scale", [4]), weight("bias", bias), zero])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_shared_weights_and_counted_axes() -> None:
    """torch gives equal weights once, through Identity; an axis may be counted from the front."""
    x = {"x": np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)}
    model = hand_made(bias=[4])
    wanted = answers(model, x)[0]
    assert first_token.read_first(model) == 2
    assert np.allclose(answers(model, x)[0], wanted)


def test_a_weight_per_token_is_left_alone() -> None:
    """Added to one token of another place, it would be the wrong one."""
    model = hand_made(bias=[5, 4])
    assert first_token.read_first(model) == 0
    assert first_token.read_first(hand_made(bias=[4], axis=1)) == 1  # the sum; that norm goes over the tokens


def test_two_reads_of_one_tensor_keep_apart() -> None:
    from onnx import helper, numpy_helper

    model = hand_made(bias=[4])
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(1, dtype=np.int64), "one"))
    model.graph.node.extend(
        [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("Gather", ["t", "one"], ["z"], axis=1)]
    )
    model.graph.output.extend([type(model.graph.output[0])(name="z")])
    x = {"x": np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)}
    wanted = answers(model, x)
    assert first_token.read_first(model) == 3
    assert all(np.allclose(a, b) for a, b in zip(answers(model, x), wanted, strict=True))


@pytest.mark.parametrize(("scale", "passed"), [([4], 2), ([5, 4], 0)])
def test_an_operand_that_is_computed_is_judged_by_its_shape(scale: list[int], passed: int) -> None:
    """[4] is the same for every token; [5, 4] holds one row a token, and has no axis 1 to read."""
    from onnx import helper, numpy_helper

    model = hand_made(bias=[4])
    weight = numpy_helper.from_array(np.full(scale, 4, dtype=np.float32), "scale_squared")
    model.graph.initializer.append(weight)
    model.graph.node.insert(0, helper.make_node("Sqrt", ["scale_squared"], ["root"]))
    (add,) = (node for node in model.graph.node if node.op_type == "Add")
    add.input[1] = "root"
    x = {"x": np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)}
    wanted = answers(model, x)[0]
    assert first_token.read_first(model) == passed
    assert np.allclose(answers(model, x)[0], wanted)
